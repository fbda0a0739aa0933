"""Acting on a plan: the only file that creates or removes anything, and all of it inside one session's folder.

    <session>/
      home/               an HF_HOME: everything in it leads to the user's real one, but
        hub  -> ../hubs/2     the current hub folder; switching it is the one atomic step of every change
      hubs/2/             the plan's entries, each a link of ours; what is no link was written by a client
        models--acme--tiny  -> ../../shadows/models--acme--tiny.0123456789abcdef
        models--org--other  -> <real cache>/models--org--other
      shadows/            one repo folder a user's model, made once, never edited

A client resolves HF_HUB_CACHE when it begins (huggingface_hub >= 1.0), so one that is in the middle of a load stays
in the hub folder it began in. Those are kept for an hour.
"""

from __future__ import annotations

import os
import time

from overlay import hfcache
from overlay.models import Model
from overlay.plan import Plan

KEEP_SECONDS = 3600
_TOKENS = ("token", "stored_tokens")


class Tree:
    """One session's tree, built by `publish` and changed by publishing again."""

    def __init__(self, session: str, hf_home: str) -> None:
        """Make the folders and the links to the rest of the user's HF_HOME. Raises OSError."""
        self._session = session
        self._shadows: dict[str, tuple[Model, str]] = {}
        self._entries: dict[str, str] = {}
        self._generation = 0
        for folder in ("home", "hubs", "shadows"):
            os.mkdir(f"{session}/{folder}", 0o700)
        if os.path.isdir(hf_home):
            # A token that is not there yet: logging in through the link makes the real one.
            for name in {*os.listdir(hf_home), *_TOKENS} - {"hub"}:
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
        shadows: dict[str, tuple[Model, str]] = {}
        entries: dict[str, str] = {}
        for name, entry in plan.entries.items():
            if isinstance(entry, str):
                entries[name] = entry
                continue
            before = self._shadows.get(name)
            if before is None or before[0] != entry:
                before = (entry, self._make_shadow(name, entry))
            shadows[name] = before
            entries[name] = before[1]
        entries |= {name: path for name, path in self._written().items() if name not in shadows}
        if self._generation == 0 or entries != self._entries or not self._is_whole():
            self._switch(entries)
        self._shadows = shadows

    def _make_shadow(self, name: str, model: Model) -> str:
        fingerprint = hfcache.fingerprint(model)
        shadow = hfcache.shadow(model, model.commit or fingerprint)
        path = f"{self._session}/shadows/{name}.{fingerprint[:16]}"
        if os.path.isdir(path):  # as it was at an earlier refresh, or cut short by a full disk
            remove_shadow(path)
        os.mkdir(path)
        for folder in shadow.folders:
            os.mkdir(f"{path}/{folder}")
        for where, target in shadow.links:
            os.symlink(target, f"{path}/{where}")
        for where, content in shadow.files:
            fd = os.open(f"{path}/{where}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            os.write(fd, content)
            os.close(fd)
        return f"../../shadows/{os.path.basename(path)}"

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
        self._generation = generation
        self._entries = entries
        self._prune()

    def _prune(self) -> None:
        """Drop hub folders, and the shadows only they led to, once no load can still be going on in them."""
        needed = set(self._entries.values())
        oldest = time.time() - KEEP_SECONDS
        for hub in list(os.scandir(f"{self._session}/hubs")):
            if hub.name == str(self._generation):
                continue
            if hub.stat().st_mtime > oldest:
                needed.update(os.readlink(entry.path) for entry in os.scandir(hub.path) if entry.is_symlink())
            else:
                _remove_links(hub.path)
                _rmdir_if_empty(hub.path)
        for shadow in list(os.scandir(f"{self._session}/shadows")):
            if f"../../shadows/{shadow.name}" not in needed and not has_payload(shadow.path):
                remove_shadow(shadow.path)


def remove(session: str) -> list[str]:
    """Remove a session's tree, and nothing that a client wrote into it: returns those paths, which stay."""
    kept: list[str] = []
    for hub in _entries(f"{session}/hubs"):
        _remove_links(hub.path)
        for written in _entries(hub.path):
            if written.name == hfcache.LOCKS or not _has_files(written.path):
                _remove_folder(written.path)
            else:
                kept.append(written.path)
        _rmdir_if_empty(hub.path)
    for shadow in _entries(f"{session}/shadows"):
        if has_payload(shadow.path):
            kept.append(shadow.path)
        else:
            remove_shadow(shadow.path)
    _remove_links(session)
    _remove_links(f"{session}/home")
    for written in _entries(f"{session}/home"):
        if _has_files(written.path):
            kept.append(written.path)
        else:
            _remove_folder(written.path)
    for folder in ("home", "hubs", "shadows"):
        _rmdir_if_empty(f"{session}/{folder}")
    return kept


def has_payload(shadow: str) -> bool:
    """Whether a client downloaded into a repo of ours: our own hold no file but refs and tree listings."""
    return any(_has_files(f"{shadow}/{folder}") for folder in ("blobs", "snapshots"))


def remove_shadow(path: str) -> None:
    """Remove a repo of ours; links are unlinked, never followed."""
    _remove_folder(path)


def _remove_folder(path: str) -> None:
    if not os.path.isdir(path) or os.path.islink(path):
        os.unlink(path)
        return
    for entry in _entries(path):
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
