"""The linked repos that all sessions of a user share.

A session's hub folder leads straight to them. So a session of a thousand models makes a thousand links, and its end
removes as many, where repos of its own would take thirty thousand.

    <folder of all sessions>/shared/            0700
      lock                                      held by all who look for a repo, and alone by who takes one away
      cleaned                                   its time: when unused repos were removed last
      <hash><number>/                           a linked repo, made as a session's own (see store), every folder sealed;
                                                32 digits, so that the text of a link to it needs no block of the disk

They are never written to: neither by us, nor by clients, whom the modes of the folders keep from it. Before a client
that asks the gateway for a model can write, its session gets a repo of its own in place of the shared one
(`publish.Tree.own`). Root is stopped by no mode. So a repo in which something came or went is not used any more, and
another is made beside it. What was downloaded into it goes with the last session that leads to it (`adopt`), which
brings it home as it does with a repo of its own.

All of it is derived. What is lost or damaged is made again: a repo that was not looked at for a day, or since the
machine was started, is looked at link by link before it is used.
"""

from __future__ import annotations

import fcntl
import os
import time
from _blake2 import blake2b  # hashlib has the same, and takes milliseconds to import
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hf_overlay import hfcache
from hf_overlay.hfcache import LinkedRepo, Parts
from hf_overlay.tree import files, lease, store
from hf_overlay.tree.store import Placed

FOLDER = "shared"
"""In the folder of all sessions."""
KEPT_SECONDS = 7 * 86_400
"""A repo that no session has looked for in so long goes."""
_DAY = 86_400
_LEADS_THERE = f"../../../{FOLDER}/"
"""Beginning of the text of links in hub folders."""
_FORMAT = 1
"""To be raised by each change of what a linked repo is made of, so that versions use none of each other's."""
_CACHE, _NAME = "cache", "name"
"""In the ORIGIN of a shared repo: the real cache that downloads into it belong to, and the repo's name there."""
_TRIES = 100
"""Damaged repos of one model, beside which another is made. Where there are more, something is wrong with the disk."""
_NEW, _GONE = ".new-", ".gone-"
"""Beginnings of the names of folders that are being made, or removed."""


class Shared:
    """The shared repos, as sessions with one real cache use them."""

    def __init__(self, sessions: str, hub_cache: str) -> None:
        self.folder = f"{sessions}/{FOLDER}"
        self._hub_cache = hub_cache

    @property
    def is_there(self) -> bool:
        """Whether the folder is there, which a program that cleans up may have removed."""
        return os.path.isdir(self.folder)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which nobody removes a repo: for whoever looks for some and makes links to them.

        The folder is there then. Raises OSError.
        """
        with suppress(FileExistsError):
            os.mkdir(self.folder, 0o700)
        with _locked(self.folder, fcntl.LOCK_SH):
            yield

    def place(self, name: str, repo: LinkedRepo) -> Placed | None:
        """Find the linked repo whose entry in a hub folder is called `name`, or make it; None where it does not last.

        Raises OSError.
        """
        contents = os.fsencode(f"{_FORMAT} {repo.fingerprint} {self._hub_cache}")  # no two caches may share a repo
        mark = blake2b(contents, digest_size=14).hexdigest()
        for number in range(_TRIES):
            folder = f"{mark}{number:04x}"
            path = f"{self.folder}/{folder}"
            placed = Placed(repo, f"{_LEADS_THERE}{folder}", tuple([f"{path}/{inner}" for inner in repo.watched]))
            if store.is_untouched(placed) and _is_fresh(path):
                return placed
            parts = repo.parts_with({_CACHE: self._hub_cache, _NAME: name})
            if not os.path.isdir(path):
                self._make(path, parts, repo)
            if (store.is_untouched(placed) and _is_fresh(path)) or _is_exact(path, parts, repo):
                return placed
        return None

    def _make(self, path: str, parts: Parts, repo: LinkedRepo) -> None:
        """Have a repo at `path`, unless another process is faster."""
        aside = f"{self.folder}/{_NEW}{os.getpid()}-{time.monotonic_ns():x}"
        try:
            store.build(parts, repo.watched, aside, mode=0o400)
            for folder in parts.folders:
                os.chmod(f"{aside}/{folder}", 0o500)
            with suppress(FileExistsError):
                _rename_new(aside, path)
                os.chmod(path, 0o500)
        finally:
            if os.path.isdir(aside):
                files.remove(aside)


def is_shared(placed: Placed) -> bool:
    """Whether other sessions may lead to this repo, too."""
    return placed.link.startswith(_LEADS_THERE)


def _is_exact(path: str, parts: Parts, repo: LinkedRepo) -> bool:
    """Whether all of a repo is as it would be made now, and nothing was downloaded into it.

    If so, it counts as looked at, and as untouched: what else root's programs may have left in it is no matter.
    """
    try:
        if store.is_written(path) or not _holds(path, parts):
            return False
        store.mark_untouched(path, repo.watched)
        os.utime(path)
        return _holds(path, parts)  # again, so that the mark covers nothing that went meanwhile
    except OSError:
        return False


def _holds(path: str, parts: Parts) -> bool:
    """Whether all links and files of a repo are there. Raises OSError where one is missing."""
    return all(os.readlink(f"{path}/{where}") == target for where, target in parts.links) and all(
        files.read(f"{path}/{where}") == content for where, content in parts.files
    )


def _is_fresh(path: str) -> bool:
    """Whether a repo was looked at within a day, and since the machine was started.

    What was written just before a machine stopped may be there in name only.
    """
    try:
        looked = os.stat(path).st_mtime
    except FileNotFoundError:
        return False
    now = time.time()
    booted = now - time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
    return max(now - _DAY, booted) < looked <= now + 1


def _rename_new(path: str, target: str) -> None:
    """Rename a folder. Raises FileExistsError where something is in the other's place."""
    try:
        os.rename(path, target)
    except OSError:
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        raise


# Written to, by root --------------------------------------------------------------------------------------------------


def written(session: str) -> dict[str, str]:
    """The shared repos that a session leads to and into which something was downloaded: path -> name in a cache.

    Raises OSError.
    """
    found: dict[str, str] = {}
    shared = f"{os.path.dirname(session)}/{FOLDER}"
    is_root = False
    for folder, name in _led_to(session):
        path = f"{shared}/{folder}"
        if not is_root and os.path.isdir(path):
            if not os.access(path, os.W_OK):
                return {}  # nor can this user have written into any other
            is_root = True
        if store.has_other_blobs(path) and files.has_payload(path) and hfcache.is_repo(name):
            found[path] = name
    return found


def adopt(session: str) -> None:
    """Make what was downloaded into shared repos a matter of the session, unless another one leads to it as well.

    From then on they are repos of its own. Raises OSError.
    """
    if not (found := written(session)):
        return
    sessions = os.path.dirname(session)
    with _locked(f"{sessions}/{FOLDER}", fcntl.LOCK_EX):
        others = [other for other in lease.sessions_in(sessions) if other != session]
        used = {folder for other in others for folder, _ in _led_to(other)}
        for path, name in found.items():
            if os.path.basename(path) not in used:
                _take(path, session, name)


def _take(path: str, session: str, name: str) -> None:
    """Make a shared repo one of a session's own, which has the name `name` in a cache."""
    os.makedirs(f"{session}/{store.FOLDER}", 0o700, exist_ok=True)
    os.chmod(path, 0o700)
    os.rename(path, f"{session}/{store.FOLDER}/{name}.{os.path.basename(path)[-16:]}")


def _led_to(session: str) -> Iterator[tuple[str, str]]:
    """The shared repos that a session's hub folders lead to: the folder of each, and the entry that leads there."""
    for hub in files.entries(f"{session}/hubs"):
        for entry in files.entries(hub.path) if not hub.is_symlink() else ():
            try:
                text = os.readlink(entry.path) if entry.is_symlink() else ""
            except OSError:  # gone since
                continue
            folder = text.removeprefix(_LEADS_THERE)
            if folder != text and folder.isalnum():
                yield folder, entry.name


# No longer used -------------------------------------------------------------------------------------------------------


def remove_unused(session: str, *, after: float = KEPT_SECONDS) -> None:
    """Remove shared repos that no session leads to, and that none has looked for in `after` seconds.

    What was downloaded into one becomes a matter of `session`, which is alive. Raises OSError.
    """
    sessions = os.path.dirname(session)
    folder = f"{sessions}/{FOLDER}"
    owner = lease.read_owner(session)
    with _locked(folder, fcntl.LOCK_EX):
        os.utime(_touched(f"{folder}/cleaned"))
        used = {name for each in lease.sessions_in(sessions) for name, _ in _led_to(each)}
        for number, entry in enumerate(files.entries(folder)):
            if entry.name in used or not entry.is_dir(follow_symlinks=False) or entry.name.startswith(_GONE):
                continue
            is_new = entry.name.startswith(_NEW)
            if time.time() - entry.stat(follow_symlinks=False).st_mtime < (_DAY if is_new else after):
                continue
            if not files.has_payload(entry.path):
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, f"{folder}/{_GONE}{os.getpid()}-{number:x}-{time.monotonic_ns():x}")
                continue
            origin = store.recorded(entry.path)
            name = origin.get(_NAME)
            if owner is not None and origin.get(_CACHE) == owner.hub_cache and isinstance(name, str) and _is_name(name):
                _take(entry.path, session, name)
    for entry in files.entries(folder):
        if entry.name.startswith(_GONE):
            with suppress(FileNotFoundError):  # another process is at it
                files.remove(entry.path)


def _is_name(name: str) -> bool:
    return hfcache.is_repo(name) and "/" not in name


def is_due(sessions: str) -> bool:
    """Whether a day has gone since unused repos were looked for last. Raises OSError."""
    return time.time() - os.stat(_touched(f"{sessions}/{FOLDER}/cleaned")).st_mtime > _DAY


def _touched(path: str) -> str:
    """The path of a file, which is made if it is not there."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    return path


@contextmanager
def _locked(folder: str, how: int) -> Iterator[None]:
    fd = os.open(f"{folder}/lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)
