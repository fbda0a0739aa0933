"""Removing a session's tree without losing a download."""

from __future__ import annotations

import os
from collections.abc import Collection

from hf_overlay import hfcache
from hf_overlay.tree import announced, files, store


def remove_tree(session: str, unfinished: Collection[str] = ()) -> list[str]:
    """Remove a session's tree, except what clients downloaded into it: those paths are returned. Raises OSError.

    The `unfinished` stay as well: not all of each is in the real cache, even if its bytes are.
    """
    kept: list[str] = []
    for hub in files.entries(f"{session}/hubs"):
        files.remove_links(hub.path)
        kept += _remove_unless_downloaded(hub.path, unfinished)
        files.remove_if_empty(hub.path)
    for repos in store.FOLDERS:
        kept += _remove_unless_downloaded(f"{session}/{repos}", unfinished)
    if os.path.isdir(f"{session}/{store.UNFINISHED}"):
        files.remove(f"{session}/{store.UNFINISHED}")
    files.remove_links(session)
    files.remove_links(f"{session}/home")
    kept += _remove_unless_downloaded(f"{session}/home", unfinished)
    for folder in ("home", "hubs", *store.FOLDERS):
        files.remove_if_empty(f"{session}/{folder}")
    announced.remove_unused(session)
    return kept


def _remove_unless_downloaded(folder: str, unfinished: Collection[str]) -> list[str]:
    kept = []
    for entry in files.entries(folder):
        if entry.name in (hfcache.LOCKS, hfcache.CACHEDIR_TAG):
            is_payload = False  # clients put them beside what they download
        else:
            is_repo = hfcache.is_repo(entry.name)
            is_payload = files.has_payload(entry.path) if is_repo else files.has_bytes(entry.path)
        if is_payload or entry.path in unfinished:
            kept.append(entry.path)
        else:
            files.remove(entry.path)
    return kept
