"""Acting on a plan: the only file that creates or removes anything, and all of it inside one session's folder.

    <session>/
      home/               an HF_HOME: everything in it leads to the user's real one, but
        hub  -> ../hubs/2     the current hub folder; switching it is the one atomic step of every change
      hubs/2/             the plan's entries, each a link of ours; what is no link was written by a client
        models--acme--tiny  -> ../../shadows/models--acme--tiny.0123456789abcdef
        models--org--other  -> <real cache>/models--org--other
      shadows/            one repo folder a user's model, made once, never edited; another where a client deletes in it

A client resolves HF_HUB_CACHE when it begins (huggingface_hub >= 1.0), so one that is in the middle of a load stays
in the hub folder it began in. Those are kept for an hour.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection
from typing import NamedTuple

from hf_overlay import hfcache
from hf_overlay.catalog.plan import Plan
from hf_overlay.models import Model

KEEP_SECONDS = 3600
ASIDE = "new"
"""In a session's folder: the repo folder that is being made."""
MADE = "made"
"""In a session's folder: what was made in the real cache for downloads that were announced, a path a line."""
_TOKENS = ("token", "stored_tokens")
_UNTOUCHED_NS = 10**18
"""The time of a shadow's folders until a client changes something in them: no clock is too coarse to tell that."""


class Shadowed(NamedTuple):
    """A user's model as the tree shows it."""

    model: Model
    commit: str
    link: str
    """Where its repo folder is, as its entry in a hub folder links to it."""


class Tree:
    """One session's tree, built by `publish` and changed by publishing again."""

    def __init__(self, session: str, hf_home: str) -> None:
        """Make the folders and the links to the rest of the user's HF_HOME. Raises OSError."""
        self._session = session
        self._shadows: dict[str, Shadowed] = {}
        self._watched: dict[str, tuple[str, ...]] = {}
        """By the link of a shadow, the folders in it that tell whether a client deleted something."""
        self._entries: dict[str, str] = {}
        self._earlier: dict[str, set[str]] = {}
        """Hub folders that were replaced: where their entries led."""
        self._generation = 0
        for folder in ("home", "hubs", "shadows"):
            os.mkdir(f"{session}/{folder}", 0o700)
        for name in _home_entries(hf_home):
            os.symlink(f"{hf_home}/{name}", f"{session}/home/{name}")

    @property
    def hub(self) -> str:
        """The folder to use as HF_HUB_CACHE."""
        return f"{self._session}/home/hub"

    @property
    def is_case_insensitive(self) -> bool:
        """Whether its volume takes names that differ in case only for one (APFS by default)."""
        return os.path.exists(f"{self._session}/HOME")

    @property
    def home(self) -> str:
        """The folder to use as HF_HOME, for programs that know no other variable."""
        return f"{self._session}/home"

    def publish(self, plan: Plan) -> None:
        """Make the tree hold what the plan says; nothing happens when it does. Raises OSError, the old tree intact."""
        shadows: dict[str, Shadowed] = {}
        entries: dict[str, str] = {}
        for name, entry in plan.entries.items():
            if isinstance(entry, str):
                entries[name] = entry
                continue
            shadowed = self._shadows.get(name)
            if shadowed is None or shadowed.model != entry or not self._is_untouched(shadowed.link):
                shadowed = self._make_shadow(name, entry)
            shadows[name] = shadowed
            entries[name] = shadowed.link
        entries |= {name: path for name, path in self._written().items() if name not in shadows}
        if self._generation == 0 or entries != self._entries or not self._is_whole():
            gone = {name for name, each in self._shadows.items() if not os.path.isdir(each.model.path)}
            self._switch(entries)
            self._shadows = shadows
            try:
                self._catch_up(gone)
            except OSError:
                pass  # only older loads miss something; the tree is switched
        self._shadows = shadows

    def shadowed(self, model_id: str) -> Shadowed | None:
        """The user's model that stands at an id."""
        found = self._shadows.get(hfcache.repo_folder(model_id))
        return found if found is not None and found.model.id == model_id else None

    def expect(self, name: str, real_hub: str) -> None:
        """Make the real cache's folder for a repo, and link it, so that a download lands there. Raises OSError.

        Made again, too, where it was removed while we link to it: by the user, or by another session that found it
        empty at its end.
        """
        for entry in (hfcache.LOCKS, name):
            if os.path.isdir(f"{self.hub}/{entry}"):
                continue
            # Scans warn of a repo without snapshots, and some that are announced are only looked at.
            self._make_real(f"{real_hub}/{entry}" if entry == hfcache.LOCKS else f"{real_hub}/{entry}/snapshots")
            self._entries[entry] = f"{real_hub}/{entry}"
            for hub in _entries(f"{self._session}/hubs"):
                if not os.path.lexists(f"{hub.path}/{entry}"):
                    os.symlink(f"{real_hub}/{entry}", f"{hub.path}/{entry}")

    def _make_real(self, folder: str) -> None:
        """Make a folder, noting first what is made: what is still empty at the end is taken away again."""
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for path in reversed(missing):
            with open(f"{self._session}/{MADE}", "a", encoding="utf-8", errors="surrogateescape") as made:
                made.write(f"{path}\n")
            os.makedirs(path, exist_ok=True)

    def _make_shadow(self, name: str, model: Model) -> Shadowed:
        fingerprint = hfcache.fingerprint(model)
        commit = model.commit or fingerprint
        shadow = hfcache.shadow(model, commit)
        for number in itertools.count():  # of those in which a client deleted something: loads may still be reading
            folder = f"{name}.{fingerprint[:12]}{number:04x}"
            path = f"{self._session}/shadows/{folder}"
            made = Shadowed(model, commit, f"../../shadows/{folder}")
            self._watched[made.link] = tuple(f"{path}/{inner}" for inner in shadow.watched)
            if not os.path.lexists(path):
                break
            if _is_whole(path, shadow):  # the user's folder is again as it was at an earlier refresh
                return made
        aside = f"{self._session}/{ASIDE}"
        if os.path.isdir(aside):  # cut short by a full disk
            _remove_folder(aside)
        os.mkdir(aside)
        for inner in shadow.folders:
            os.mkdir(f"{aside}/{inner}")
        for where, target in shadow.links:
            os.symlink(target, f"{aside}/{where}")
        for where, content in shadow.files:
            with open(f"{aside}/{where}", "wb") as file:
                file.write(content)
        _mark(aside, shadow)
        os.rename(aside, path)
        for where in shadow.sealed:
            os.chmod(f"{path}/{where}", 0o500)
        return made

    def _is_untouched(self, link: str) -> bool:
        """Whether nothing came or went where a client may delete. Two system calls a model, at every refresh."""
        try:
            for folder in self._watched[link]:
                if os.stat(folder).st_mtime_ns != _UNTOUCHED_NS:
                    return False
        except OSError:
            return False
        return True

    def _written(self) -> dict[str, str]:
        """What clients made in the hub folders: it stays where it is and stays visible."""
        written = {}
        for hub in sorted(os.scandir(f"{self._session}/hubs"), key=lambda entry: int(entry.name)):
            for entry in os.scandir(hub.path):
                if not entry.is_symlink() and entry.is_dir():
                    written[entry.name] = f"../{hub.name}/{entry.name}"
        return written

    def _is_whole(self) -> bool:
        """Whether every entry is still there: a client's `hf cache rm` takes links away."""
        return set(os.listdir(f"{self._session}/hubs/{self._generation}")) >= self._entries.keys()

    def _switch(self, entries: dict[str, str]) -> None:
        generation = self._generation + 1
        hub = f"{self._session}/hubs/{generation}"
        if os.path.isdir(hub):  # cut short by a full disk
            _remove_links(hub)
        else:
            os.mkdir(hub, 0o700)
        for name, target in entries.items():
            os.symlink(target, f"{hub}/{name}")
        link = f"{self._session}/hub.next"
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(f"../hubs/{generation}", link)
        os.replace(link, self.hub)
        if self._generation:
            os.utime(f"{self._session}/hubs/{self._generation}")  # from now on its hour runs
            self._earlier[str(self._generation)] = set(self._entries.values())
        self._generation = generation
        self._entries = entries
        self._prune()

    def _catch_up(self, gone: set[str]) -> None:
        """Give loads that began in an earlier hub folder what cannot disturb them.

        That is what is new, and, for models whose folder is gone, what stands there now: the cache's copy, or nothing.
        """
        for hub in _entries(f"{self._session}/hubs"):
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
        """Drop hub folders, and the shadows only they led to, once no load can still be going on in them."""
        needed = set(self._entries.values())
        oldest = time.time() - KEEP_SECONDS
        for hub in list(os.scandir(f"{self._session}/hubs")):
            if hub.name == str(self._generation):
                continue
            if hub.stat().st_mtime > oldest:
                needed |= self._earlier.get(hub.name, set())
            else:
                _remove_links(hub.path)
                _rmdir_if_empty(hub.path)
        for shadow in list(os.scandir(f"{self._session}/shadows")):
            if f"../../shadows/{shadow.name}" not in needed and not has_payload(shadow.path):
                _remove_folder(shadow.path)


def _is_whole(repo: str, shadow: hfcache.Shadow) -> bool:
    """Whether all that was made of a shadow is there; if so, it counts as untouched from now on.

    Looked at on both sides of the mark, so that it neither covers what is missing nor what goes meanwhile.
    """
    made = [f"{repo}/{where}" for where, _ in (*shadow.links, *shadow.files)]
    if not all(map(os.path.lexists, made)):
        return False
    try:
        _mark(repo, shadow)
    except FileNotFoundError:
        return False
    return all(map(os.path.lexists, made))


def _mark(repo: str, shadow: hfcache.Shadow) -> None:
    for folder in shadow.watched:
        os.utime(f"{repo}/{folder}", ns=(_UNTOUCHED_NS, _UNTOUCHED_NS))


def _home_entries(hf_home: str) -> set[str]:
    """What a session's home leads on to; nothing of a home that does not exist or cannot be read."""
    try:
        # A token that is not there yet: logging in through the link makes the real one.
        return {*os.listdir(hf_home), *_TOKENS} - {"hub"}
    except OSError:
        return set()


def remove(session: str, unfinished: Collection[str] = ()) -> list[str]:
    """Remove a session's tree, and nothing that a client downloaded into it: returns those paths, which stay.

    So do the `unfinished`: of those not all is in the real cache, even if the bytes are.
    """
    kept: list[str] = []
    for hub in _entries(f"{session}/hubs"):
        _remove_links(hub.path)
        kept += _remove_unless_downloaded(hub.path, unfinished)
        _rmdir_if_empty(hub.path)
    kept += _remove_unless_downloaded(f"{session}/shadows", unfinished)
    if os.path.isdir(f"{session}/{ASIDE}"):
        _remove_folder(f"{session}/{ASIDE}")
    _remove_links(session)
    _remove_links(f"{session}/home")
    kept += _remove_unless_downloaded(f"{session}/home", unfinished)
    for folder in ("home", "hubs", "shadows"):
        _rmdir_if_empty(f"{session}/{folder}")
    _unmake_real(f"{session}/{MADE}")
    return kept


def has_payload(repo: str) -> bool:
    """Whether a repo folder holds a byte that was downloaded: refs, listings and links are none."""
    return any(_has_files(f"{repo}/{folder}") for folder in ("blobs", "snapshots", hfcache.VIEWS))


def _remove_unless_downloaded(folder: str, unfinished: Collection[str]) -> list[str]:
    kept = []
    for entry in _entries(folder):
        is_repo = hfcache.is_repo(entry.name)
        if entry.name in (hfcache.LOCKS, hfcache.CACHEDIR_TAG):
            is_payload = False  # clients put them beside what they download
        else:
            is_payload = has_payload(entry.path) if is_repo else _has_files(entry.path)
        if is_payload or entry.path in unfinished:
            kept.append(entry.path)
        else:
            _remove_folder(entry.path)
    return kept


def _unmake_real(record: str) -> None:
    """Take away the folders made in the real cache for downloads that never came."""
    try:
        with open(record, encoding="utf-8", errors="surrogateescape") as made:
            paths = made.read().splitlines()
    except FileNotFoundError:
        return
    for path in reversed(paths):
        _rmdir_if_empty(path)
    os.unlink(record)


def _remove_folder(path: str) -> None:
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    if not os.access(path, os.W_OK):
        os.chmod(path, 0o700)  # sealed by us
    # Last what tells ours from a client's, so that whoever goes on after a kill can tell, too.
    for entry in sorted(_entries(path), key=lambda entry: entry.name == hfcache.ORIGIN):
        _remove_folder(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    os.rmdir(path)


def _has_files(path: str) -> bool:
    """Whether there is a byte in a file (not a link) at or below a path."""
    if os.path.islink(path):
        return False
    if os.path.isfile(path):
        return os.path.getsize(path) > 0
    for entry in _entries(path):
        if entry.is_dir(follow_symlinks=False):
            if _has_files(entry.path):
                return True
        elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size > 0:
            return True
    return False


def _remove_links(folder: str) -> None:
    for entry in _entries(folder):
        if entry.is_symlink():
            os.unlink(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _rmdir_if_empty(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError:
        return
