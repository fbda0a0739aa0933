"""The thread that writes kept KV caches to disk. It never holds up the engine's thread, which only hands over views."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from mlx_overlay_server.engine.arrays import Array
from mlx_overlay_server.engine.disk import blocks
from mlx_overlay_server.engine.disk.blocks import BLOCK, Chain, Content
from mlx_overlay_server.engine.disk.store import Store

logger = logging.getLogger("mlx_overlay_server")

PAUSE_SECONDS = 60.0
"""After a failure, such as a full disk, nothing is written for so long."""
_NICENESS = 10
_DARWIN_THREAD, _DARWIN_BACKGROUND = 3, 0x1000
"""<sys/resource.h>: PRIO_DARWIN_THREAD and PRIO_DARWIN_BG, which Python has names for from 3.12 on."""


@dataclass(slots=True, eq=False)
class Job:
    """A KV cache to write."""

    key: str
    """The model's, `Loaded.key`."""
    chain: Chain
    rows: dict[str, Array]
    state: Content | None
    """What cannot be cut, and the rows since the last full block; None where there is no such part."""
    nbytes: int
    """Bytes of the arrays, which stay in memory until they are written."""
    is_kept: bool = True
    """Whether the cache is kept in memory as well."""
    is_written: bool = False


class Writer:
    """Writes what it is given, one after another, in a thread of its own."""

    def __init__(self, store: Store, notify: Callable[[], None]) -> None:
        """`notify` is called, in that thread, each time after something was written."""
        self._store = store
        self._notify = notify
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._paused_until = 0.0
        self._has_said = False
        self.written = self.failures = 0
        """Bytes written, and what could not be."""
        self.is_open = threading.Event()
        """Set once it is known what is on the disk."""
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Bytes of arrays that wait to be written."""
        return sum(job.nbytes for job in list(self._jobs))

    @property
    def held(self) -> int:
        """The same, of caches that nobody else keeps in memory."""
        return sum(job.nbytes for job in list(self._jobs) if not job.is_kept)

    def put(self, job: Job) -> None:
        """Write a KV cache once its turn comes."""
        self._jobs.append(job)
        self._queue.put(lambda: self._write(job))

    def touch(self, chain: Chain) -> None:
        """Note that a sequence was used now."""
        self._queue.put(lambda: self._touch(chain))

    def remove(self, name: str) -> None:
        """Remove a file, which is damaged."""
        self._queue.put(lambda: self._store.remove([name]))

    def refresh(self) -> None:
        """See what other servers have written."""
        self._queue.put(self._store.refresh)

    def close(self, seconds: float) -> None:
        """Write what is left, for so many seconds at most."""
        self._paused_until = 0.0
        self._queue.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        self._try(self._store.open)
        self.is_open.set()
        _step_behind()
        while (work := self._queue.get()) is not None:
            self._try(work)
            del work  # it holds what was written
            self._notify()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, MemoryError) as error:
            self.failures += 1
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            if not self._has_said:
                self._has_said = True
                logger.warning("KV caches are not written to disk for now: %s", str(error) or type(error).__name__)

    def _write(self, job: Job) -> None:
        try:
            if time.monotonic() >= self._paused_until:
                self._write_parts(job)
        finally:
            self._jobs.remove(job)

    def _write_parts(self, job: Job) -> None:
        """Write what is not there yet. What comes later in a sequence counts as used earlier: it goes first."""
        now = time.time_ns()
        for number, name in enumerate(job.chain.blocks if job.rows else ()):
            part = blocks.rows(job.rows, number * BLOCK, (number + 1) * BLOCK)
            if not self._write_file(name, Content(part), now - number):
                return
        if job.state is not None:
            name = job.chain.state(len(job.chain.tokens))
            if not self._write_file(name, job.state, now - len(job.chain.blocks)):
                return
        job.is_written = True

    def _write_file(self, name: str, content: Content, used: int) -> bool:
        if name in self._store:
            self._store.touch(name, used)
            return True
        parts = blocks.encode(name, content)
        if not self._store.write(name, parts, used):
            return False
        self.written += sum(len(part) for part in parts)
        self._has_said = False
        return True

    def _touch(self, chain: Chain) -> None:
        now = time.time_ns()
        for number, name in enumerate(chain.blocks):
            self._store.touch(name, now - number)
        self._store.touch(chain.state(len(chain.tokens)), now - len(chain.blocks))


def _step_behind() -> None:
    """Let all other threads go first."""
    with suppress(OSError):
        if sys.platform == "darwin":
            os.setpriority(_DARWIN_THREAD, 0, _DARWIN_BACKGROUND)
        else:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
