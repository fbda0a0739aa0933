"""Turns on the event loop for large requests, each step of which keeps it busy for up to a tenth of a second.

They take one step at a time, and leave the loop alone for as long after each: whoever asks for little waits for one
such step, however many large requests there are.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

LARGE_BYTES = 1 << 18
"""Bytes of a body from which on its request is large."""


class Turns:
    """The queue of the steps of large requests. All on the event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._is_closed = False

    async def take(self) -> None:
        """Wait for a turn, which lasts until the caller awaits something else."""
        await self._lock.acquire()
        if self._is_closed:
            self._lock.release()
        else:  # in processor time: what others on the machine take makes neither the step longer nor the rest
            asyncio.get_running_loop().call_soon(self._rest, time.thread_time())

    def close(self) -> None:
        """Let all have their turns at once from now on: the server stops, and refuses them then."""
        self._is_closed = True

    def _rest(self, begun: float) -> None:
        asyncio.get_running_loop().call_later(time.thread_time() - begun, self._lock.release)


_current: ContextVar[Turns | None] = ContextVar("turns", default=None)


async def becomes_large(turns: Turns) -> None:
    """Make the request of this task a large one, and wait for its first turn."""
    _current.set(turns)
    await turns.take()


async def turn() -> None:
    """Wait for a turn if the request of this task is a large one."""
    if (turns := _current.get()) is not None:
        await turns.take()
