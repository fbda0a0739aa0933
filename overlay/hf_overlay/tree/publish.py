"""Acting on a plan: hub folders of links are made, and the session's home is switched to the newest.

    <session>/
      home/               an HF_HOME: everything in it leads to the user's real one, but
        hub  -> ../hubs/2     the current hub folder; switching it is the one atomic step of every change
      hubs/2/             the plan's entries, each a link of ours; anything else was written by a client
        models--acme--tiny  -> ../../repos/models--acme--tiny.0123456789abcdef
        models--org--other  -> <real cache>/models--org--other
      repos/              one linked repo a user's model (see store), unless the session shares it with others:
        models--acme--tiny  -> ../../../shared/models--acme--tiny.0123456789abcdef

A client resolves HF_HUB_CACHE when it begins (huggingface_hub >= 1.0), so one that is in the middle of a load stays
in the hub folder it began in. Those are kept for an hour.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from typing import Any

from hf_overlay import hfcache
from hf_overlay.catalog.plan import Plan, fold
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.tiers import MergedRepo
from hf_overlay.tree import announced, files, shared, store
from hf_overlay.tree.shared import Shared
from hf_overlay.tree.store import Placed

KEEP_SECONDS = 3600
_TOKENS = ("token", "stored_tokens")


class Tree:
    """One session's tree, built by `publish` and changed by publishing again."""

    def __init__(self, session: str, shared: Shared | None = None) -> None:
        """Make the folders. With `shared`, the repos of the user's models are those that sessions share.

        Raises OSError.
        """
        self._session = session
        self._shared = shared
        self._placed: dict[str, Placed] = {}
        """Linked repos of the current hub folder, by the name of their entry. Replaced as a whole."""
        self._entries: dict[str, str] = {}
        """Links of the current hub folder: name -> target."""
        self._earlier: dict[str, set[str]] = {}
        """Hub folders that were replaced: the targets of their links."""
        self._written_to: set[str] = set()
        """The names of entries that stand for the user's models, and beside which clients have said they will write."""
        self._generation = 0
        self._home: dict[str, str] = {}
        """The links to what the user's HF_HOME holds: name -> target."""
        self._make_folders()

    def link_home(self, hf_home: str, names: Collection[str]) -> None:
        """Make the links to the rest of the user's HF_HOME, which has these names. Raises OSError."""
        self._home = {name: f"{hf_home}/{name}" for name in names}
        self._make_folders()

    @property
    def hub(self) -> str:
        """The folder to use as HF_HUB_CACHE."""
        return f"{self._session}/home/hub"

    @property
    def is_there(self) -> bool:
        """Whether the folders of the tree are there, which a program that cleans up may have removed."""
        is_whole = os.path.islink(self.hub) and os.path.isdir(self.hub)
        is_shared_there = self._shared is None or self._shared.is_there
        return is_whole and is_shared_there and os.path.isdir(f"{self._session}/{store.FOLDER}")

    def restore(self) -> None:
        """Make the folders of the tree again, empty, if something has removed them. Raises OSError."""
        if not self.is_there:
            self._make_folders()

    @property
    def is_case_insensitive(self) -> bool:
        """Whether two names that differ in case only are one on its volume (APFS by default)."""
        return os.path.exists(f"{self._session}/HOME")

    @property
    def home(self) -> str:
        """The folder to use as HF_HOME, for programs that know no other variable."""
        return f"{self._session}/home"

    def publish(self, plan: Plan, *, is_there: Callable[[str, str], bool]) -> None:
        """Make the tree hold what the plan says; do nothing if it does. Raises OSError, the old tree intact.

        `is_there` says whether a folder, in a model path, cache or tier, is there.
        """
        with nullcontext() if self._shared is None else self._shared.in_use():
            self._publish(plan, is_there)

    def _publish(self, plan: Plan, is_there: Callable[[str, str], bool]) -> None:
        placed: dict[str, Placed] = {}
        entries: dict[str, str] = {}
        for name, entry in plan.entries.items():
            if isinstance(entry, str):
                entries[name] = entry
                continue
            there = self._placed.get(name)
            if there is None or there.repo != entry or not store.is_untouched(there):
                there = self._place(name, entry)
            placed[name] = there
            entries[name] = there.link
        try:
            store.carry_over(self._session, placed)
        except OSError:
            pass  # what clients added is not shown for now; it is none of the plan's
        # Folders that clients wrote stand where links to the cache would, but not where repos made here do.
        if found := self._written():
            key = fold if self.is_case_insensitive else str
            written = {key(name): (name, path) for name, path in found.items()}
            entries = {name: target for name, target in entries.items() if name in placed or key(name) not in written}
            entries |= dict(written[folded] for folded in written.keys() - {key(name) for name in placed})
        if self._generation == 0 or entries != self._entries or not self._is_whole():
            gone = {
                name
                for name, each in self._placed.items()
                # What is placed as before was found a moment ago, and each further look takes a thread.
                if placed.get(name) != each and not all(is_there(path, root) for path, root in each.repo.sources)
            }
            self._switch(entries)
            self._placed = placed
            try:
                self._catch_up(gone)
            except OSError:
                pass  # only older loads miss something; the tree is switched
        self._placed = placed

    def repo(self, repo_id: str, kind: str = "models") -> LinkedRepo | MergedRepo | None:
        """The repo with this id that was made in the tree; None when it holds none, or the real cache's."""
        found = self._placed.get(hfcache.repo_folder(repo_id, kind))
        is_other = found is not None and isinstance(found.repo, LinkedRepo) and found.repo.model.id != repo_id
        return found.repo if found is not None and not is_other else None

    def _place(self, name: str, repo: LinkedRepo | MergedRepo) -> Placed:
        placed = None
        if self._shared is not None and name not in self._written_to and isinstance(repo, LinkedRepo):
            placed = self._shared.place(name, repo)  # merged ones are never shared: clients add to them
        if placed is None:
            placed = store.place(self._session, name, repo)
            if name in self._written_to:
                store.unseal_refs(self._session, placed)
        return placed

    def is_shared(self, name: str) -> bool:
        """Whether an entry leads to a repo that other sessions may lead to, too."""
        placed = self._placed.get(name)
        return placed is not None and shared.is_shared(placed)

    def is_closed(self, name: str) -> bool:
        """Whether an entry stands for a user's model, and clients cannot write beside it before `let_write`."""
        placed = self._placed.get(name)
        return placed is not None and isinstance(placed.repo, LinkedRepo) and name not in self._written_to

    def let_write(self, name: str) -> None:
        """Let clients write beside a user's model: what they download, refs, and which files it lacks. Raises OSError.

        They write into a repo of this session's own, so that no other session sees it.
        """
        if self.is_shared(name):
            self._own(name)
        store.unseal_refs(self._session, self._placed[name])
        self._written_to.add(name)

    def _own(self, name: str) -> None:
        """Lead an entry to a repo of this session's own, with the same content, in place of a shared one.

        In all hub folders, for programs that began in an earlier one. Raises OSError.
        """
        before = self._placed[name]
        mine = store.place(self._session, name, before.repo)
        link = f"{self._session}/link.next"
        for hub in self._hubs():
            try:
                if os.readlink(f"{hub.path}/{name}") != before.link:
                    continue
            except OSError:  # a client has removed it, or wrote something else in its place
                continue
            if os.path.lexists(link):
                os.unlink(link)
            os.symlink(mine.link, link)
            os.replace(link, f"{hub.path}/{name}")
            self._earlier.setdefault(hub.name, set()).add(mine.link)
        self._entries[name] = mine.link
        self._placed = {**self._placed, name: mine}

    def path_of(self, name: str) -> str:
        """The path of an entry in the current hub folder, which a refresh does not change."""
        return f"{self._session}/hubs/{self._generation}/{name}"

    def expect(self, name: str, real_hub: str, ask: Callable[[Callable[[], Any]], Any]) -> None:
        """Make the real cache's folder for a repo, and link it, so that a download lands there. Raises OSError.

        `ask` calls what touches the real cache, and gives it up where its disk does not answer.
        It is made again where it was removed while we link to it: by the user, or by another session that found it
        empty at its end.
        """
        for entry in (hfcache.LOCKS, name):
            if ask(partial(os.path.isdir, f"{self.hub}/{entry}")):
                continue
            # Scans warn of a repo without snapshots, and some that are announced are only looked at.
            folder = f"{real_hub}/{entry}"
            made = folder if entry == hfcache.LOCKS else f"{folder}/snapshots"
            ask(partial(announced.make, self._session, made))
            self._entries[entry] = folder
            for hub in self._hubs():
                if not os.path.lexists(f"{hub.path}/{entry}"):
                    os.symlink(folder, f"{hub.path}/{entry}")

    def _make_folders(self) -> None:
        """Make what every generation needs, as far as it is not there. Raises OSError."""
        for folder in ("home", "hubs", store.FOLDER):
            os.makedirs(f"{self._session}/{folder}", 0o700, exist_ok=True)
        for name, target in self._home.items():
            if not os.path.lexists(f"{self._session}/home/{name}"):
                os.symlink(target, f"{self._session}/home/{name}")
        if os.path.isdir(self.hub) and not os.path.islink(self.hub):  # a client made it after the link was removed
            self._generation += 1
            os.rename(self.hub, f"{self._session}/hubs/{self._generation}")

    def _hubs(self) -> list[os.DirEntry[str]]:
        """The hub folders, without what others may put beside them, such as `.DS_Store`."""
        found = files.entries(f"{self._session}/hubs")
        return [entry for entry in found if entry.name.isdecimal() and entry.is_dir(follow_symlinks=False)]

    def _written(self) -> dict[str, str]:
        """Folders that clients made in the hub folders: they stay where they are and stay visible."""
        written = {}
        for hub in sorted(self._hubs(), key=lambda entry: int(entry.name)):
            if store.is_ours(hub.path):
                continue
            for entry in os.scandir(hub.path):
                if not entry.is_symlink() and entry.is_dir():
                    written[entry.name] = f"../{hub.name}/{entry.name}"
        return written

    def _is_whole(self) -> bool:
        """Whether every entry is still there: a client's `hf cache rm` takes links away."""
        if not self.is_there:
            return False
        return store.is_ours(os.path.realpath(self.hub)) or set(os.listdir(self.hub)) >= self._entries.keys()

    def _switch(self, entries: dict[str, str]) -> None:
        generation = self._generation + 1
        hub = f"{self._session}/hubs/{generation}"
        if os.path.isdir(hub):  # cut short by a full disk
            files.remove_links(hub)
        else:
            os.mkdir(hub, 0o700)
        for name, target in entries.items():
            os.symlink(target, f"{hub}/{name}")
        store.mark_untouched(f"{self._session}/hubs", [str(generation)])  # until a client adds or removes something
        link = f"{self._session}/hub.next"
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(f"../hubs/{generation}", link)
        os.replace(link, self.hub)
        if os.path.isdir(f"{self._session}/hubs/{self._generation}"):
            os.utime(f"{self._session}/hubs/{self._generation}")  # from now on its hour runs
            self._earlier[str(self._generation)] = set(self._entries.values())
        self._generation = generation
        self._entries = entries
        self._prune()

    def _catch_up(self, gone: set[str]) -> None:
        """Give loads that began in an earlier hub folder what cannot disturb them.

        That is what is new, and, for models whose folder is gone, what stands there now: the cache's copy, or nothing.
        """
        for hub in self._hubs():
            if hub.name == str(self._generation):
                continue
            there = set(os.listdir(hub.path))
            # Only links are ours: a folder under that name is what a client wrote.
            broken = {name for name in gone & there if os.path.islink(f"{hub.path}/{name}")}
            for name in broken:
                os.unlink(f"{hub.path}/{name}")
            for name in self._entries.keys() - (there - broken):
                os.symlink(self._entries[name], f"{hub.path}/{name}")

    def _prune(self) -> None:
        """Remove hub folders, and linked repos that only they led to, once no load can still be going on in them."""
        needed = set(self._entries.values())
        oldest = time.time() - KEEP_SECONDS
        for hub in self._hubs():
            if hub.name == str(self._generation):
                continue
            if hub.stat().st_mtime > oldest:
                needed |= self._earlier.get(hub.name, set())
            else:
                files.remove_links(hub.path)
                files.remove_if_empty(hub.path)
        store.prune(self._session, needed)


def home_entries(hf_home: str) -> set[str]:
    """The names in a session's home that lead to the user's real one."""
    try:
        # A token that is not there yet: logging in through the link makes the real one.
        return {*os.listdir(hf_home), *_TOKENS} - {"hub"}
    except OSError:  # there is no home, or it cannot be read
        return set()
