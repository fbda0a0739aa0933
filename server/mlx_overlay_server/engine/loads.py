"""The loads that the engine's thread works on, as the event loop sees them: results, progress, and silent disks.

The thread calls `reading` and `has_read`; everything else is called on the event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.errors import ServerError

HELD_SECONDS = 10
"""A step of a load takes less than this, unless a disk does not answer."""


class Held(NamedTuple):
    """A load that holds up the engine's thread, because the disk of its model does not answer."""

    path: str
    """The model's folder."""
    seconds: float
    """Since when."""


def new_key(number: int, path: str) -> str:
    """Return the key of a load, and of the model that comes of it; `number` tells loads of one folder apart."""
    return f"{number}:{path}"


def path_of(key: str) -> str:
    """Return the folder of the model that a key belongs to."""
    return key.partition(":")[2]


class Loads:
    """The loads that have not ended, by their keys."""

    def __init__(self) -> None:
        self._results: dict[str, Future[AnyLoaded]] = {}
        self._read: Counter[str] = Counter()
        """The bytes of weights that each load has read."""
        self._reading: tuple[str, float] | None = None
        """The key of the load whose step the thread makes now, and since when, in monotonic seconds."""

    @property
    def keys(self) -> list[str]:
        """The keys of all loads that have not ended."""
        return list(self._results)

    @contextmanager
    def begun(self, key: str) -> Iterator[Future[AnyLoaded]]:
        """Give the future of a new load's result; with the end of this context, the load is forgotten."""
        self._results[key] = Future()
        try:
            yield self._results[key]
        finally:
            del self._results[key]
            self._read.pop(key, None)

    def bytes_read(self, key: str) -> int:
        """Return how many bytes of weights a load has read."""
        return self._read[key]

    def settle(self, key: str, result: AnyLoaded | ServerError) -> None:
        """Give a load its result, unless it has one or was given up."""
        future = self._results.get(key)
        if future is None or future.done():
            return
        if isinstance(result, ServerError):
            future.set_exception(result)
        else:
            future.set_result(result)

    @property
    def held(self) -> Held | None:
        """The load that holds up the thread; None while none does."""
        if (reading := self._reading) is None or (seconds := time.monotonic() - reading[1]) < HELD_SECONDS:
            return None
        return Held(path_of(reading[0]), seconds)

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Note that the thread makes a step of a load while this context is open."""
        self._reading = (key, time.monotonic())
        try:
            yield
        finally:
            self._reading = None

    def has_read(self, key: str, nbytes: int) -> None:
        """Note that a load has read some bytes of weights."""
        if key in self._results:
            self._read[key] += nbytes
