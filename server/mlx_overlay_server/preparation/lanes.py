"""Schedules the work of the preparation processes, so that quick work never waits for slow work."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from mlx_overlay_server.errors import Failed, ServerError, Unavailable
from mlx_overlay_server.frames import Result
from mlx_overlay_server.preparer import Ended, Process

logger = logging.getLogger("mlx_overlay_server")

QUICK_SECONDS = 0.2
"""Seconds after which work counts as slow, and quick work gets another process."""
LONG_SECONDS = 1.0
"""Seconds after which work is remembered as slow. A busy machine may delay quick work, but not by as much as this."""
AT_REST = 2
"""Processes that are kept: one that works, and a spare one for when its work turns out to be slow."""
SPARE_SECONDS = 1.0
"""Seconds until the spare process starts after the first. Its imports would delay the first answer."""
AT_MOST = 4
"""The most processes there are while work is slow."""
SLOW = AT_MOST - AT_REST
"""Pieces of slow work that run at once; others wait."""
REMEMBERED = 1024
"""How many pieces of slow work are remembered, for clients that try again."""
SHRINK_SECONDS = 60.0
"""Seconds until processes beyond `AT_REST` are ended after the last slow work."""


READ_TOKENIZER = "read_tokenizer"
"""The name of the work of reading a model's tokenizer. It needs no model that the process knows."""


@dataclass(eq=False, slots=True)
class Work:
    """A piece of work, from its arrival until its result."""

    name: str
    """The name of the function in `work.WORK`, or READ_TOKENIZER."""
    key: str
    """The key of the model. Before a function of `work.WORK` runs, `Lanes.learn` must have been called with it."""
    arguments: bytes
    """The function's other arguments, as a pickled tuple."""
    refused: Callable[[], ServerError]
    """Returns the error for the client when the work takes too long."""
    is_slow: bool
    """Whether the work is expected to be slow, or has turned out to be."""
    seconds: float | None = None
    """Seconds that it may take; None: those of the limit for requests."""
    result: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    process: Process | None = None
    """The process in which it runs; None while it waits."""

    identity: int = 0
    """A hash of what the work is, by which slow work is recognised when it comes again."""

    def __post_init__(self) -> None:
        """Compute the identity."""
        self.identity = hash((self.name, self.key, self.arguments))


class Lanes:
    """The preparation processes, and the queues of work for them. Everything here runs on the event loop."""

    def __init__(self, seconds: float, first: Process | None = None) -> None:
        """`seconds`: the time limit of one piece of work; `first`: a process that has been started already."""
        self._first = first
        self._seconds = seconds
        self._models: dict[str, tuple[bytes, bytes]] = {}
        self._quick: deque[Work] = deque()
        self._slow: deque[Work] = deque()
        self._running: set[Work] = set()
        self._known_slow: OrderedDict[int, None] = OrderedDict()
        """The identities of work that was slow."""
        self._processes: set[Process] = set()
        """All processes, including those that are starting."""
        self._idle: list[Process] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_rest = 1
        """Processes that wait for work."""
        self._is_stopped = False

    def start(self) -> None:
        """Start the first process, and return while it imports what it needs, which takes a second or two."""
        self._grow(self._at_rest)

    def abort(self) -> None:
        """Stop all work, whose clients get an error, and accept no more."""
        self._is_stopped = True
        for work in (*self._quick, *self._slow, *self._running):
            if not work.result.done():
                work.result.set_exception(Unavailable("the server is shutting down"))
            if work.process is not None:
                work.process.kill()
        self._quick.clear()
        self._slow.clear()

    async def stop(self) -> None:
        """Stop all work, and end the processes."""
        self.abort()
        await asyncio.gather(*(process.close() for process in self._processes))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def learn(self, key: str, model: bytes, tokenizer: bytes) -> None:
        """Make a model known, so that work may name it; `tokenizer` is that of `Process.teach`."""
        self._models[key] = (model, tokenizer)

    def forget(self, key: str) -> None:
        """Forget a model that no work names any more."""
        self._models.pop(key, None)
        for process in self._processes:
            process.forget(key)

    async def run(self, work: Work) -> Result:
        """Run a piece of work and return its result.

        Work that nobody waits for any more is stopped. Raises ServerError.
        """
        if self._is_stopped:
            raise Unavailable("the server is shutting down")
        work.is_slow = work.is_slow or work.identity in self._known_slow
        (self._slow if work.is_slow else self._quick).append(work)
        self._dispatch()
        try:
            return await work.result
        finally:
            if work.process is None:
                for queue in (self._quick, self._slow):
                    if work in queue:
                        queue.remove(work)
            elif work.result.cancelled() and work.is_slow and work in self._running:
                work.process.kill()  # quick work may end by itself, which spares a new process

    # Which work gets an idle process.

    def _dispatch(self) -> None:
        """Give waiting work to idle processes."""
        if self._is_stopped:
            return
        has_slow = bool(self._slow) or any(work.is_slow and work.name != READ_TOKENIZER for work in self._running)
        self._grow(
            AT_MOST if has_slow else self._at_rest
        )  # tokenizers are read one after the other: the spare process is enough
        late = {work.identity for work in self._running if work.is_slow}
        for work in [
            each for each in self._quick if each.identity not in late
        ]:  # a further process would be no earlier
            if self._idle and (len(self._idle) > 1 or len(self._running) == self._slow_running):
                self._quick.remove(work)
                self._begin(work)
        while self._slow and len(self._idle) > 1 and self._slow_running < SLOW:
            self._begin(self._slow.popleft())
        if len(self._idle) > 1:  # an idle process can be taught the model now, before it is needed
            for process in self._idle:
                for key in self._models.keys() - process.models:
                    self._idle.remove(process)
                    self._spawn(self._teach(process, key))
                    return

    @property
    def _slow_running(self) -> int:
        return sum(work.is_slow for work in self._running)

    def _begin(self, work: Work) -> None:
        process = max(self._idle, key=lambda each: (work.key in each.models, work.key == each.has_read))
        self._idle.remove(process)
        work.process = process
        self._running.add(work)
        self._spawn(self._run(process, work))

    # How work runs in a process.

    async def _run(self, process: Process, work: Work) -> None:
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []
        try:
            is_known = work.key in process.models or work.name == READ_TOKENIZER
            if is_known or (result := await self._taught(process, work.key)).unexpected is None:
                timers = [
                    loop.call_later(QUICK_SECONDS, self._is_late, process, work),
                    loop.call_later(LONG_SECONDS, self._is_long, process, work),
                    loop.call_later(work.seconds or self._seconds, self._is_over, process, work),
                ]
                if work.name == READ_TOKENIZER:
                    result = await process.read_tokenizer(work.key, work.arguments)
                else:
                    result = await process.work(work.name, work.key, work.arguments)
            if not work.result.done():
                work.result.set_result(result)
            self._idle.append(process)
        except Ended:
            await self._ended(process, work)
        finally:
            for timer in timers:
                timer.cancel()
            if work.process is process:
                self._running.discard(work)
            self._dispatch()

    async def _taught(self, process: Process, key: str) -> Result:
        return await process.teach(key, *self._models[key])

    async def _teach(self, process: Process, key: str) -> None:
        try:
            await self._taught(process, key)
            self._idle.append(process)
        except Ended:
            await self._ended(process, None)
        self._dispatch()

    def _is_late(self, process: Process, work: Work) -> None:
        """Count work as slow, so that quick work gets another process."""
        if work.result.done():  # nobody waits for it any more
            process.kill()
        else:
            work.is_slow = True
            self._dispatch()

    def _is_long(self, process: Process, work: Work) -> None:
        """Remember work as slow; where too much slow work runs, make it wait for its turn and begin again."""
        self._remember(work.identity)
        if self._slow_running > SLOW and not work.result.done():
            process.kill()
            work.process = None
            self._running.discard(work)
            self._slow.append(work)
        self._dispatch()

    def _remember(self, identity: int) -> None:
        """Mark the same work as slow from now on, also where it waits already."""
        self._known_slow[identity] = None
        while len(self._known_slow) > REMEMBERED:
            self._known_slow.popitem(last=False)
        for same in [each for each in self._quick if each.identity == identity]:
            self._quick.remove(same)
            same.is_slow = True
            self._slow.append(same)

    def _is_over(self, process: Process, work: Work) -> None:
        process.kill()
        if not work.result.done():
            work.result.set_exception(work.refused())

    async def _ended(self, process: Process, work: Work | None) -> None:
        """Replace a process that was killed, or that its work has ended."""
        self._processes.discard(process)
        was_killed = process.is_killed
        self._dispatch()
        status = await process.close()
        if not was_killed:
            logger.error("a preparation process ended with status %d", status)
            if work is not None and not work.result.done():
                work.result.set_exception(
                    Failed("the request could not be prepared; the server's log says why", code="internal_error")
                )

    # How many processes there are.

    def _grow(self, count: int) -> None:
        while len(self._processes) < count and not self._is_stopped:
            process, self._first = self._first or Process(), None
            self._processes.add(process)
            self._spawn(self._start(process))
            if len(self._processes) > AT_REST:
                asyncio.get_running_loop().call_later(SHRINK_SECONDS, self._shrink)

    def _rest(self) -> None:
        """Start the spare process, unless a tokenizer is being read, for which the first answer may wait."""
        if any(work.name == READ_TOKENIZER for work in self._running) and not (self._quick or self._is_stopped):
            asyncio.get_running_loop().call_later(SPARE_SECONDS, self._rest)
            return
        self._at_rest = AT_REST
        self._dispatch()

    def _shrink(self) -> None:
        if self._slow or self._slow_running:
            asyncio.get_running_loop().call_later(SHRINK_SECONDS, self._shrink)
        elif len(self._processes) > AT_REST and self._idle and not self._is_stopped:
            process = self._idle.pop()
            self._processes.discard(process)
            self._spawn(self._close(process))

    async def _close(self, process: Process) -> None:
        await process.close()

    async def _start(self, process: Process) -> None:
        try:
            await process.ready()
            self._idle.append(process)
            asyncio.get_running_loop().call_later(SPARE_SECONDS, self._rest)
        except Ended:
            self._processes.discard(process)
            status = await process.close()
            if self._is_stopped:
                return
            logger.error("a preparation process did not start: status %d; --log-level debug tells more", status)
            if not self._processes:
                for work in (*self._quick, *self._slow):
                    if not work.result.done():
                        work.result.set_exception(
                            Failed("the server cannot prepare requests; its log says why", code="internal_error")
                        )
                self._quick.clear()
                self._slow.clear()
                return
        self._dispatch()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
