"""The thread that reads kept KV caches from disk, so that the engine's thread never waits for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

from mlx_overlay_server.engine.arrays import Array
from mlx_overlay_server.engine.disk import blocks
from mlx_overlay_server.engine.disk.blocks import BLOCK, Content, Damaged, Gathered, Plan
from mlx_overlay_server.engine.disk.store import Store


class Found(NamedTuple):
    """What was read of a sequence."""

    size: int
    """Its tokens."""
    arrays: dict[str, Array]
    """All arrays of its KV cache; whoever takes one removes it here, which frees its memory."""
    outline: Any


class Reading:
    """Something that is being read, or was."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.progress_at = time.monotonic()
        """When a file was read last."""
        self.is_over = False
        self.found: Found | None = None
        """What was found, once it is over; None: nothing that can be used."""


class Reader:
    """Reads what it is asked for, one after another, in a thread of its own."""

    def __init__(self, store: Store, remove: Callable[[str], None], notify: Callable[[], None]) -> None:
        """`remove` gets the names of files that are missing or damaged; `notify` is called when a reading is over.

        Both are called in that thread.
        """
        self._store = store
        self._remove = remove
        self._notify = notify
        self._queue: SimpleQueue[Reading | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-disk-reader", daemon=True)
        self._thread.start()

    def ask(self, plan: Plan) -> Reading:
        """Read what a plan says."""
        reading = Reading(plan)
        self._queue.put(reading)
        return reading

    def close(self) -> None:
        """End the thread after what it reads. Nobody waits for it."""
        self._queue.put(None)

    def _run(self) -> None:
        while (reading := self._queue.get()) is not None:
            reading.progress_at = time.monotonic()
            try:
                reading.found = self._read(reading)
            except MemoryError:
                pass
            reading.is_over = True
            self._notify()

    def _read(self, reading: Reading) -> Found | None:
        plan = reading.plan
        state = Content({}, {})
        if plan.state is not None:
            if (file := self._file(plan.state)) is None:
                return None
            state = file
        tail = {name: array for name, array in state.arrays.items() if not name.startswith("state.")}
        gathered = Gathered(plan.size)
        for name in plan.blocks:
            if not self._gather(gathered, self._file(name), BLOCK, name):
                break
            reading.progress_at = time.monotonic()
        if plan.state is None:
            return Found(gathered.done, gathered.arrays(), None) if gathered.done else None
        if tail and not self._gather(gathered, Content(tail), plan.size % BLOCK, plan.state):
            return None
        if gathered.done != plan.size and (plan.blocks or tail):
            return None
        whole = {name: array for name, array in state.arrays.items() if name not in tail}
        return Found(plan.size, {**gathered.arrays(), **whole}, state.outline)

    def _gather(self, gathered: Gathered, content: Content | None, count: int, name: str) -> bool:
        if content is None:
            return False
        try:
            gathered.add(content.arrays, count)
        except Damaged:
            self._remove(name)
            return False
        return True

    def _file(self, name: str) -> Content | None:
        try:
            return blocks.decode(name, self._store.read(name))
        except (OSError, Damaged):
            self._remove(name)
            return None
