"""Turns on the event loop for large requests, each step of which blocks it for up to a tenth of a second.

Large requests make one step at a time, and after each the loop is free for as long as the step took. So small requests
wait for one such step at most, however many large requests there are.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

from mlx_overlay_server.errors import Unavailable

LARGE_BYTES = 1 << 18
"""A request whose body has this many bytes is large."""


class Turns:
    """The queue of large requests for their next steps. Everything here runs on the event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._is_closed = False

    async def take(self) -> None:
        """Wait for a turn, which lasts until the caller awaits anything else. Raises Unavailable after `close`."""
        await self._lock.acquire()
        if self._is_closed:
            self._lock.release()
            raise Unavailable("the server is shutting down")
        # Processor time, because on a busy machine the clock also counts what others take.
        asyncio.get_running_loop().call_soon(self._rest, time.thread_time())

    def close(self) -> None:
        """Refuse all requests that wait for a turn, or will: the server is stopping."""
        self._is_closed = True

    def _rest(self, begun: float) -> None:
        asyncio.get_running_loop().call_later(time.thread_time() - begun, self._lock.release)


_current: ContextVar[Turns | None] = ContextVar("turns", default=None)


async def becomes_large(turns: Turns) -> None:
    """Count the request of this task as large, and wait for its first turn. Raises Unavailable."""
    _current.set(turns)
    await turns.take()


async def turn() -> None:
    """Wait for a turn if the request of this task is large. Raises Unavailable."""
    if (turns := _current.get()) is not None:
        await turns.take()
