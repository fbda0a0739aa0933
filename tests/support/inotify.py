"""Whatever is changed below a folder, as Linux tells of it at once: also a change that is undone again."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
"""IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM and _TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF."""
_EVENT = struct.Struct("iIII")


@contextmanager
def watched(top: Path) -> Iterator[list[str]]:
    """A context whose list holds, when it ends, what has changed below a folder; nothing where there is no inotify.

    Reading is no change, nor is the time of the last reading.
    """
    changed: list[str] = []
    if sys.platform != "linux":
        yield changed
        return
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        folders = {}
        for path in (top, *(path for path in top.rglob("*") if path.is_dir() and not path.is_symlink())):
            number = libc.inotify_add_watch(fd, os.fsencode(path), _CHANGES)
            assert number >= 0, os.strerror(ctypes.get_errno())
            folders[number] = path
        yield changed
        try:
            events = os.read(fd, 1 << 20)
        except BlockingIOError:
            return
        while events:
            number, mask, _, size = _EVENT.unpack_from(events)
            name = events[_EVENT.size : _EVENT.size + size].rstrip(b"\0").decode("utf-8", "surrogateescape")
            changed.append(f"{folders[number]}/{name}: {mask:#x}")
            events = events[_EVENT.size + size :]
    finally:
        os.close(fd)
