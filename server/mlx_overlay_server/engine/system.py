"""What the operating system says of memory: what is free right now, and what a container may have.

A process in a container is ended when its control group has used what that may have, whatever the machine has left.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_UNLIMITED = 1 << 60
"""Limits from here on are none: version 1 of control groups writes them so."""


class Group(NamedTuple):
    """The memory of a control group, in bytes."""

    limit: int
    free: int
    """What it may still take, files that the system only keeps in memory for later not counted as taken."""


class _Statistics(ctypes.Structure):
    """Numbers of pages, as macOS gives them: `vm_statistics64` of <mach/vm_statistics.h>, the rest without names."""

    _fields_ = [
        ("free", ctypes.c_uint32),
        ("active", ctypes.c_uint32),
        ("inactive", ctypes.c_uint32),
        ("wired", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 34),
    ]


_HOST_VM_INFO64 = 4
"""Of <mach/host_info.h>."""


def limit(root: Path = Path("/")) -> int | None:
    """Return how many bytes the control groups of this process may have; None: as many as the machine has."""
    return min((group.limit for group in _groups(root)), default=None)


def free(root: Path = Path("/")) -> int | None:
    """Return how many bytes can be taken now without memory being paged out that programs use; None: nobody knows."""
    if sys.platform == "darwin":
        library = ctypes.CDLL(None)
        task = ctypes.c_uint32.in_dll(library, "mach_task_self_")  # `mach_task_self()` is a macro for it
        return mac_free(library, task.value, os.sysconf("SC_PAGE_SIZE"))
    known = [group.free for group in _groups(root)]
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            known.append(int(rest.split()[0]) * 1024)
    return min(known, default=None)


def mac_free(library: Any, task: int, page: int) -> int | None:
    """Return the same on macOS: what nobody has, and what nobody has used lately.

    `library` is the C library, `task` the port of this process, `page` the bytes of a page.
    """
    statistics = _Statistics()
    count = ctypes.c_uint32(ctypes.sizeof(statistics) // 4)
    host = library.mach_host_self()  # a reference, which is to be given back
    try:
        failed = library.host_statistics64(host, _HOST_VM_INFO64, ctypes.byref(statistics), ctypes.byref(count))
    finally:
        library.mach_port_deallocate(task, host)
    if failed:
        return None
    return int(statistics.free + statistics.inactive) * page


def _groups(root: Path) -> Iterator[Group]:
    """Yield the control groups of this process that have a limit, from the innermost on."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if not controllers
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            if (group := _group(folder, *names)) is not None:
                yield group
            if folder == top:
                break


def _group(folder: Path, limit: str, usage: str, cached: str) -> Group | None:
    most, used = (_number(next(_lines(folder / name), "")) for name in (limit, usage))
    if most is None or most >= _UNLIMITED or used is None:
        return None
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    kept = next((int(pair[1]) for pair in pairs if pair[0] == cached), 0)
    return Group(most, max(0, most - used + kept))


def _lines(file: Path) -> Iterator[str]:
    try:
        yield from file.read_text(encoding="ascii").splitlines()
    except OSError:  # another system, or another kind of control groups
        return


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None
