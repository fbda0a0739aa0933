"""Looking at and removing files in a session's folder. Nothing here follows a link."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress

from hf_overlay import hfcache
from hf_overlay.progress import alive


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing when there is none, or it is a file or a link to itself. Raises OSError."""
    alive()
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:
            return []
        raise


def read(path: str) -> bytes:
    """The content of a regular file, to which a link may lead. Raises OSError, and for anything else FileNotFoundError.

    A pipe in its place, for instance, would never end.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FileNotFoundError(f"{path} is not a file")
        return file.read()


def write(path: str, content: bytes, mode: int) -> None:
    """Make a file. Raises OSError, also where one is there."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode)
    try:
        if os.write(fd, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    finally:
        os.close(fd)


def has_payload(repo: str) -> bool:
    """Whether a repo folder holds a byte that was downloaded; refs, listings and links do not count."""
    return any(has_bytes(f"{repo}/{folder}") for folder in ("blobs", "snapshots", hfcache.VIEWS))


def has_bytes(path: str) -> bool:
    """Whether a file (not a link, nor litter) at or below a path holds a byte."""
    if os.path.islink(path) or hfcache.is_litter(os.path.basename(path)):
        return False
    if os.path.isfile(path):
        return os.path.getsize(path) > 0
    for entry in entries(path):
        if entry.is_dir(follow_symlinks=False):
            if has_bytes(entry.path):
                return True
        elif hfcache.is_litter(entry.name):
            continue
        elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size > 0:
            return True
    return False


def below(folder: str) -> list[str]:
    """The paths of regular files and links below a folder, relative to it, sorted; nothing where it is a link."""
    found = [] if os.path.islink(folder) else _below(folder, "")
    return sorted(found)


def _below(folder: str, prefix: str) -> list[str]:
    found = []
    for entry in entries(folder):
        if entry.is_symlink() or entry.is_file(follow_symlinks=False):
            found.append(f"{prefix}{entry.name}")
        elif entry.is_dir(follow_symlinks=False):
            found += _below(entry.path, f"{prefix}{entry.name}/")
    return found


def remove_litter(folder: str) -> None:
    """Remove what an operating system put for itself into a folder and those below it, as far as that can be done."""
    with suppress(OSError):
        for entry in entries(folder):
            if entry.is_symlink():  # ours, or a client's
                continue
            if hfcache.is_litter(entry.name):
                with suppress(OSError):
                    remove(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                remove_litter(entry.path)


def size(folder: str) -> int:
    """The bytes of the files below a folder; links do not count."""
    paths = (os.path.join(inside, name) for inside, _, names in os.walk(folder) for name in names)
    return sum(os.lstat(path).st_size for path in paths if not os.path.islink(path))


def sync(path: str) -> None:
    """Wait until the bytes of a file are on the disk itself. Raises OSError.

    On macOS only F_FULLFSYNC waits for the disk; some file systems, such as network mounts, do not know it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        try:
            full: int = fcntl.F_FULLFSYNC  # type: ignore[attr-defined]  # macOS only
            fcntl.fcntl(fd, full)
        except (AttributeError, OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Remove a folder with all that is in it, or a file or link. Raises OSError."""
    if os.path.islink(path) or not os.path.isdir(path):  # a link is not looked through: its disk may not answer
        os.unlink(path)
        return
    if not os.access(path, os.W_OK):
        os.chmod(path, 0o700)  # sealed by us
    # Last the file that tells our folders from a client's, so that whoever goes on after a kill can tell them, too.
    for entry in sorted(entries(path), key=lambda entry: entry.name == hfcache.ORIGIN):
        remove(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
    os.rmdir(path)


def remove_links(folder: str) -> None:
    """Remove the links that are directly in a folder. Raises OSError."""
    for entry in entries(folder):
        if entry.is_symlink():
            os.unlink(entry.path)


def remove_if_empty(folder: str) -> None:
    """Remove a folder if there is nothing in it; leave it otherwise."""
    try:
        os.rmdir(folder)
    except OSError:
        return
