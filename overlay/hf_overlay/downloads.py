"""What programs download while a session is open, and how it gets to the real cache.

Where a client tells the gateway what it is about to download, it writes straight to the real cache. All else lands in
the tree, and comes home when the session is over (see tree.writeback); what lies beside a tier, already before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import partial

from hf_overlay import hfcache
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.messages import Messages
from hf_overlay.tree import blobstore, clear, writeback
from hf_overlay.tree.publish import Tree


class Downloads:
    """The downloads of one session. Safe to use from several threads."""

    def __init__(
        self,
        session: str,
        catalog: Catalog,
        tree: Tree,
        lock: threading.Lock,
        messages: Messages,
        *,
        shares_blobs: bool,
    ) -> None:
        """`lock` is held by whoever changes the tree. `shares_blobs`: the user's client shares files between repos."""
        self._session = session
        self._catalog = catalog
        self._tree = tree
        self._lock = lock
        self._messages = messages
        self._shares_blobs = shares_blobs
        self._noted: dict[str, Mapping[str, str]] = {}
        """The Xet hashes that are noted for the session's end: repo folder -> etag -> hash."""
        self._noting = threading.Lock()

    def expect(self, folder: str, xet_hashes: Mapping[str, str]) -> None:
        """Let what a client is about to write to a repo folder land in the real cache, as `Session.expect_download`."""
        if self._tree.is_closed(folder):
            with self._lock:
                if self._tree.is_closed(folder):
                    self._let_write(folder)
            return
        if not hfcache.is_hub_repo(folder):  # ids are what clients send, and must neither be made nor noted
            return
        if self._catalog.real_cache.why_not_kept() is not None:
            return
        hub = self._catalog.settings.hub_cache
        ask = partial(self._catalog.patience.ask, hub)
        self._note(folder, xet_hashes)
        try:
            if all(ask(partial(os.path.isdir, f"{self._tree.hub}/{each}")) for each in (hfcache.LOCKS, folder)):
                return
            with self._lock:
                self._tree.expect(folder, hub, ask)
        except OSError as error:
            self._messages.debug(f"{folder} is downloaded into the session and moved later: {error}")

    def bring_home(self) -> None:
        """Move what programs have finished downloading of repos that tiers hold, too, to the real cache."""
        settings = self._catalog.settings
        if not settings.below or self._catalog.real_cache.why_not_kept() is not None:
            return
        try:
            bring = partial(writeback.bring_home_finished, self._session, settings.hub_cache)
            self._catalog.patience.ask(settings.hub_cache, bring, seconds=clear.STALL_SECONDS)
        except OSError as error:
            self._messages.debug(f"downloads stay in the session for now: {error}")

    def _note(self, folder: str, xet_hashes: Mapping[str, str]) -> None:
        """Have what is downloaded into a repo shared with other repos at the session's end."""
        with self._noting:
            noted = self._noted.get(folder)
            if not self._shares_blobs or (noted is not None and xet_hashes.items() <= noted.items()):
                return
            try:
                blobstore.note(self._session, folder, xet_hashes)
            except OSError as error:
                self._messages.debug(f"{folder} will share no files with other repos: {error}")
            self._noted[folder] = {**(noted or {}), **xet_hashes}

    def _let_write(self, folder: str) -> None:
        try:
            self._tree.let_write(folder)
        except OSError as error:
            self._messages.debug(f"{folder} cannot be written to for now: {error}")
