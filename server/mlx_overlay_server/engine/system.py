"""What the operating system says of memory: what is free right now, and what a container may have.

A process in a container is ended when its control group has used what that may have, whatever the machine has left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60
"""Limits from here on are none: version 1 of control groups writes them so."""


class Group(NamedTuple):
    """The memory of a control group, in bytes."""

    limit: int
    free: int
    """What it may still take, files that the system only keeps in memory for later not counted as taken."""


def limit(root: Path = Path("/")) -> int | None:
    """Return how many bytes the control groups of this process may have; None: as many as the machine has."""
    return min((group.limit for group in _groups(root)), default=None)


def free(root: Path = Path("/")) -> int | None:
    """Return how many bytes can be taken now without another program's memory being paged out; None: nobody knows."""
    known = [group.free for group in _groups(root)]
    for line in _lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            known.append(int(rest.split()[0]) * 1024)
    return min(known, default=None)


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
