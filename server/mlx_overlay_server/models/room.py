"""The rules for room in memory: which load begins next, and which models leave for it. Pure functions.

1. Loads wait in the order in which they came. The first that fits begins; what does not fit yet is passed by what does.
2. A load that has waited `PATIENCE_SECONDS` is passed only by loads that fit in memory together with it, so that no
   number of small models keeps a large one away.
3. Room is made only where it is enough for the load to begin. Loads under way that nobody waits for any more go first,
   then idle models, least recently used first. A model that is in use, or pinned, never goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

PATIENCE_SECONDS = 30.0
"""Seconds that a load waits for room before those that came later have to leave it its room."""


class Held(NamedTuple):
    """A model that is in memory, or on its way there."""

    id: str
    nbytes: int
    number: int
    """Its place in the order in which loads came."""
    used: float
    """When a request last used it, in monotonic seconds."""
    is_busy: bool
    """Whether requests use it or wait for it."""
    is_pinned: bool
    is_loading: bool


class Waiting(NamedTuple):
    """A load that waits for room."""

    id: str
    nbytes: int
    number: int
    since: float
    """When it began to wait, in monotonic seconds."""


class Plan(NamedTuple):
    """The load that begins next, and the models that leave for it, in their order."""

    load: Waiting
    leaving: tuple[Held, ...]


def pinned_bytes(held: Iterable[Held]) -> int:
    """Return the bytes of pinned models in memory, which never become free."""
    return sum(each.nbytes for each in held if each.is_pinned and not each.is_loading)


def plan(waiting: Sequence[Waiting], held: Sequence[Held], budget: int, now: float) -> Plan | None:
    """Choose the load that begins next; None while none can.

    `waiting` is in the order in which the loads came, `budget` in bytes, `now` in monotonic seconds.
    """
    for index, load in enumerate(waiting):
        overdue = [older for older in waiting[:index] if now - older.since >= PATIENCE_SECONDS]
        if any(_delays(load, older, held, budget) for older in overdue):
            continue
        leaving = _leaving(load, held, budget)
        if leaving is not None:
            return Plan(load, leaving)
    return None


def _delays(load: Waiting, older: Waiting, held: Iterable[Held], budget: int) -> bool:
    """Return whether `older` would have to wait until `load` is unloaded, if `load` began first."""
    passed = sum(each.nbytes for each in held if each.is_pinned or (each.is_busy and each.number > older.number))
    return passed + older.nbytes + load.nbytes > budget


def _leaving(load: Waiting, held: Sequence[Held], budget: int) -> tuple[Held, ...] | None:
    """Return the models that must leave before a load can begin; None when there would still be too little room."""
    free = budget - sum(each.nbytes for each in held)
    idle = [each for each in held if not each.is_busy and not each.is_pinned]
    leaving = []
    for each in sorted(idle, key=lambda each: (not each.is_loading, each.used)):
        if free >= load.nbytes:
            break
        leaving.append(each)
        free += each.nbytes
    return tuple(leaving) if free >= load.nbytes else None
