"""Downloads share their blobs with other repos in the real cache, where that has a store for it.

huggingface_hub 2 keeps a file that several repos have once, in the hub folder (utils/_shared_blobs.py of 2.4):

    <hub>/blobs/
      .huggingface-shared-blobs         "1": this is such a store
      0f/0f3a…                          a file, named by its Xet hash
      0f/0f3a….refs                     the blobs that lead to it, a line each; only a hint
      0f/0f3a….lock                     held while one of these is changed
    <hub>/models--org--name/blobs/<etag> -> ../../blobs/0f/0f3a…

Within an overlay clients cannot do that (see Session.variables). So what they are about to download is noted, and when
the session is over, that part of it which has come to the real cache goes to the store. A file goes there only if its
SHA-256 is the one that the Hub names, and its blob is there at each moment: first as a file, then as a link.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from hf_overlay import hfcache, records
from hf_overlay.progress import alive
from hf_overlay.tree import files, usage

_RECORD = "expected"
"""File in a session's folder: the repos that clients were about to download, with the Xet hashes of files by etag."""
_MARKER, _VERSION = ".huggingface-shared-blobs", b"1\n"
_PIECE_BYTES = 1 << 22
_CLOCK_SECONDS = 2
"""The times of files may be that coarse."""
_TRIES, _PAUSE_SECONDS = 50, 0.02
"""For a lock that is held only while a link is made."""


def note(session: str, repo: str, xet_hashes: Mapping[str, str]) -> None:
    """Write down that a client may download files of a repo, named as in a cache. Raises OSError."""
    with open(f"{session}/{_RECORD}", "a", encoding="ascii") as record:
        record.write(f"{json.dumps([repo, dict(xet_hashes)])}\n")


def share(session: str, hub: str, since: float) -> None:
    """Put what was noted, and has been downloaded into the real cache `hub` since then, into the store that it has.

    What cannot be put there stays a file of its repo's own.
    """
    repos = _noted(session)
    if not repos or not _is_store(f"{hub}/{hfcache.SHARED_BLOBS}"):
        return
    aside = f"{os.path.basename(session)}.incomplete"
    for repo, noted in repos.items():
        for etag, xet_hash in {**_listed(f"{hub}/{repo}"), **noted}.items():
            blob = f"{hub}/{repo}/blobs/{etag}"
            is_held = usage.is_held(f"{hub}/{hfcache.LOCKS}/{repo}/{hfcache.lock_name(etag)}")
            if is_held or not _is_file(blob, since - _CLOCK_SECONDS):
                continue
            with suppress(OSError):
                _share(hub, blob, xet_hash, f"{hub}/{repo}/blobs/{aside}")


def has_record(session: str) -> bool:
    """Whether anything was noted."""
    return os.path.isfile(f"{session}/{_RECORD}")


def remove_record(session: str) -> None:
    """Forget what was noted. Raises OSError."""
    if os.path.lexists(f"{session}/{_RECORD}"):
        files.remove(f"{session}/{_RECORD}")


def _noted(session: str) -> dict[str, dict[str, str]]:
    """The Xet hashes by etag that were noted, by repo. What cannot be read in the record is left out."""
    found: dict[str, dict[str, str]] = {}
    try:
        lines = files.read(f"{session}/{_RECORD}").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            repo, xet_hashes = json.loads(line)
        except (ValueError, TypeError):  # cut short by a full disk
            continue
        if isinstance(repo, str) and hfcache.is_hub_repo(repo) and isinstance(xet_hashes, dict):
            found.setdefault(repo, {}).update(records.checked_hashes(xet_hashes))
    return found


def _listed(repo: str) -> dict[str, str]:
    """The Xet hashes by etag that a client wrote down when it listed the files of a repo's revisions."""
    found: dict[str, str] = {}
    with suppress(OSError):  # no file of which the hash is not known is shared
        for entry in files.entries(f"{repo}/trees"):
            if entry.name.endswith(".json") and entry.is_file(follow_symlinks=False):
                found |= records.listed_xet_hashes(files.read(entry.path))
    return found


def _is_store(folder: str) -> bool:
    """Whether a folder is a store of the one layout that is known here."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(folder).st_mode) and not os.path.islink(f"{folder}/{_MARKER}")
        return is_folder and files.read(f"{folder}/{_MARKER}") == _VERSION
    except OSError:
        return False


def _is_file(path: str, since: float) -> bool:
    """Whether a file, and no link, was written since then."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_mtime >= since


def _share(hub: str, blob: str, xet_hash: str, aside: str) -> None:
    """Make a blob a link to a file in the store, which is the store's already, or becomes so. Raises OSError."""
    folder = f"{hub}/{hfcache.SHARED_BLOBS}/{xet_hash[:2]}"
    target = f"{folder}/{xet_hash}"
    if os.path.lexists(aside):
        os.unlink(aside)
    if not os.path.isdir(folder):
        os.mkdir(folder)
        os.chmod(folder, stat.S_IMODE(os.stat(hub).st_mode))
    try:
        is_new = not os.path.lexists(target)
        if is_new:
            os.link(blob, aside)  # so that what is looked at is what goes there
        if _sha256(aside if is_new else target) != os.path.basename(blob):
            return
        with _locked(f"{target}.lock"):
            with open(_opened(f"{target}.refs", os.O_WRONLY | os.O_APPEND), "ab") as refs:
                refs.write(f"{os.path.relpath(blob, hub)}\n".encode())
                refs.flush()
                os.fsync(refs.fileno())
            if is_new:
                if os.path.lexists(target):  # another process was faster
                    return
                _make_readable(aside, hub, folder)
                os.rename(aside, target)
            elif not os.path.isfile(target):  # taken away since
                return
            os.symlink(os.path.relpath(target, os.path.dirname(blob)), aside)
            if os.path.samefile(aside, target):  # the repo's folder may be a link to another drive
                os.replace(aside, blob)
    finally:
        if os.path.lexists(aside):
            os.unlink(aside)


def _make_readable(path: str, hub: str, folder: str) -> None:
    """Give a file the mode, and the group, that huggingface_hub gives what is in a store. Raises OSError."""
    mode = os.stat(hub).st_mode
    os.chmod(path, 0o400 | (0o040 if mode & stat.S_IXGRP else 0) | (0o004 if mode & stat.S_IXOTH else 0))
    group = os.stat(folder).st_gid
    if os.stat(path).st_gid != group:
        os.chown(path, -1, group)


def _sha256(path: str) -> str:
    import hashlib  # OpenSSL takes milliseconds to load, which most sessions need not wait for

    found = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            found.update(piece)
            alive()
    return found.hexdigest()


def _opened(path: str, flags: int) -> int:
    """A file descriptor of a file beside one in the store, which all users of the cache may write. Raises OSError."""
    fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if os.fstat(fd).st_uid == os.geteuid():
        os.fchmod(fd, 0o666)
    return fd


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """A context that holds a client's lock. Raises OSError."""
    fd = _opened(path, os.O_RDWR)
    try:
        for tries in range(_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if tries == _TRIES - 1:
                    raise
                time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(fd)
