"""The ticket of a request: what it waits for now, and the means to stop it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from mlx_overlay_server.errors import Stopped


@dataclass(slots=True)
class Ticket:
    """The progress of one request: for streams that keep its client waiting, and for the list of running requests."""

    started: float = field(default_factory=time.monotonic)
    """When the request came, in monotonic seconds."""
    note: Callable[[], str] = lambda: "waiting"
    """Returns what the request is waiting for now, in a few words."""
    client: str = "unknown"
    """A name for whoever asked."""
    is_stopped: bool = False
    """Whether the request was stopped by hand, through the page or the API behind it."""
    on_stop: Callable[[], None] = lambda: None
    """Called by `stop`: ends what the request waits for at the moment."""

    def stop(self) -> None:
        """End the request with `Stopped`."""
        self.is_stopped = True
        self.on_stop()

    @asynccontextmanager
    async def stoppable(self) -> AsyncIterator[None]:
        """Let `stop` end what is awaited in this context, in which nothing may be yielded. Raises Stopped."""
        if self.is_stopped:
            raise stopped()
        try:
            async with asyncio.timeout(None) as scope:
                self.on_stop = lambda: scope.reschedule(0)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise stopped() from None
        finally:
            self.on_stop = lambda: None


def stopped() -> Stopped:
    """Return the error of a request that was stopped by hand."""
    return Stopped("this request was stopped by whoever looks after the server")
