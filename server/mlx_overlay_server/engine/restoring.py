"""The sequences that wait for KV caches from disk. The disk is read meanwhile, and the engine goes on with others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_overlay_server.engine import mlx_arrays
from mlx_overlay_server.engine.commands import Submit
from mlx_overlay_server.engine.disk.blocks import BLOCK
from mlx_overlay_server.engine.disk.reader import Found, Reading
from mlx_overlay_server.engine.disk.tier import SILENT_SECONDS, Sought, Tier
from mlx_overlay_server.engine.prefix_cache import PrefixCache

SLICE_BYTES = 1 << 26
"""Bytes that are copied into MLX's memory between two steps of the models."""


@dataclass(slots=True)
class _Current:
    """The sequence whose turn it is."""

    submit: Submit
    sought: Sought
    reading: Reading
    copying: Iterator[None] | None = None


@dataclass(slots=True)
class Restoring:
    """Sequences that wait, one after another: what was read for one may serve the next."""

    tier: Tier
    prefixes: PrefixCache
    clock: Callable[[], float] = time.monotonic
    _waiting: deque[Submit] = field(default_factory=deque)
    _current: _Current | None = None

    def __len__(self) -> int:
        return len(self._waiting) + (self._current is not None)

    @property
    def is_copying(self) -> bool:
        """Whether a step has something to do; else it waits for the disk."""
        return self._current is None or self._current.reading.is_over

    def add(self, submit: Submit) -> bool:
        """Return whether a sequence has to wait here, because more of its prompt is on disk than in memory."""
        reads_all = not submit.keeps_cache or submit.images or submit.params.prompt_logprobs is not None
        if reads_all or self._sought(submit) is None:
            return False
        self._waiting.append(submit)
        return True

    def drop(self, id_: int) -> None:
        """Forget a sequence that nobody waits for."""
        self._waiting = deque(submit for submit in self._waiting if submit.id != id_)
        if self._current is not None and self._current.submit.id == id_:
            self._end()

    def _end(self) -> None:
        """Let the next sequence have its turn."""
        self._current = None
        self.prefixes.coming = 0

    def step(self) -> list[Submit]:
        """Copy a slice of what was read. Returns the sequences that need not wait any more."""
        ready: list[Submit] = []
        while (current := self._current) is None and self._waiting:
            submit = self._waiting.popleft()
            sought = self._sought(submit)
            if sought is None or not self.prefixes.expect(sought.plan.nbytes):
                ready.append(submit)
            else:
                self._current = _Current(submit, sought, self.tier.read(sought))
        if current is None:
            return ready
        reading = current.reading
        if not reading.is_over:
            if self.clock() - reading.progress_at > SILENT_SECONDS:
                self.tier.give_up(reading)
                self._end()
                ready.append(current.submit)
            return ready
        if reading.found is not None and reading.found.size >= current.sought.kind.least:
            if current.copying is None:
                current.copying = self._copy(current, reading.found)
            if next(current.copying, self) is None:
                return ready
        self._end()
        ready.append(current.submit)
        return ready

    def _sought(self, submit: Submit) -> Sought | None:
        if len(submit.prompt) <= BLOCK:
            return None
        known = self.prefixes.known(submit.key, submit.prompt)
        return self.tier.seek(submit.key, submit.prompt, known)

    def _copy(self, current: _Current, found: Found) -> Iterator[None]:
        made: dict[str, mx.array] = {}
        size = 0
        for name in list(found.arrays):
            array = found.arrays.pop(name)
            made[name] = mlx_arrays.inside(array)
            size += array.values.nbytes
            if size >= SLICE_BYTES:
                size = 0
                yield None
        cache = self.tier.put_together(current.sought, found, made)
        tokens = np.asarray(current.submit.prompt[: found.size], dtype=np.int64)
        self.prefixes.restore(current.submit.key, tokens, cache, system=min(current.submit.system, found.size))
