"""Bringing files to the real cache, so that each is complete as soon as it has its name. All raise OSError."""

from __future__ import annotations

import errno
import os

from hf_overlay.progress import alive
from hf_overlay.tree import files

_PIECE_BYTES = 1 << 23
"""Bytes that are written between two signs of life. A disk that takes seconds for them does not answer."""


def move(path: str, target: str, aside: str) -> None:
    """Rename a file, or between volumes copy it."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.rename(path, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    _copy(path, target, aside)
    os.unlink(path)


def _copy(path: str, target: str, aside: str) -> None:
    """Copy a file aside, sync and rename."""
    try:
        _copy_pieces(path, aside)
        files.sync(aside)
        os.rename(aside, target)
    except OSError:
        if os.path.exists(aside):
            os.unlink(aside)
        raise


def share(path: str, target: str, aside: str, link: str) -> None:
    """Have the file under another name as well, or a copy of it on another volume, and a link to that in its place."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if not os.path.exists(target):
        try:
            os.link(path, target)
        except OSError:
            _copy(path, target, aside)
    elif os.path.getsize(target) != os.path.getsize(path):
        return
    if os.path.lexists(link):
        os.unlink(link)
    os.symlink(target, link)
    os.replace(link, path)


def _copy_pieces(path: str, target: str) -> None:
    """Copy a file, each piece to the disk itself: so a slow one shows that it answers."""
    with open(path, "rb") as source, open(target, "wb") as copy:
        while piece := source.read(_PIECE_BYTES):
            copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
            alive()
    import shutil  # with all compressors, which starts need not wait for

    shutil.copystat(path, target)


def write(path: str, content: bytes, aside: str) -> None:
    """Write a file aside and rename it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(aside, "wb") as file:
        file.write(content)
    os.replace(aside, path)


def has_same_bytes(path: str, other: str) -> bool:
    """Whether two files hold the same."""
    with open(path, "rb") as file, open(other, "rb") as other_file:
        while True:
            piece = file.read(_PIECE_BYTES)
            if piece != other_file.read(_PIECE_BYTES):
                return False
            if not piece:
                return True
            alive()
