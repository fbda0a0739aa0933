"""The schedule of the preparation processes: work that is quick never waits for work that is slow."""

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
"""Work that takes longer is slow: what is quick gets another process then."""
LONG_SECONDS = 1.0
"""Work that takes longer is remembered as slow. A busy machine makes much of what is quick late, but not so late."""
AT_REST = 2
"""Processes that wait for work: one that does it, and a spare one for when that work turns out to be slow."""
SPARE_SECONDS = 1.0
"""How long after the first process the spare one starts: what it imports would take time from the first answer."""
AT_MOST = 4
"""Processes while there is slow work."""
SLOW = AT_MOST - AT_REST
"""Pieces of slow work that run at once. Others wait for them."""
REMEMBERED = 1024
"""Pieces of work that were slow and are remembered, for when a client tries again."""
SHRINK_SECONDS = 60.0
"""How long more processes than `AT_REST` stay when there is no slow work any more."""


READ_TOKENIZER = "read_tokenizer"
"""The work of reading a model's tokenizer, for which the model need not be known."""


@dataclass(eq=False, slots=True)
class Work:
    """A piece of work, from when it comes until its result is there."""

    name: str
    """The function's, in `work.WORK`, or READ_TOKENIZER."""
    key: str
    """The model's. For a function of `work.WORK`, `Lanes.learn` was called with it."""
    arguments: bytes
    """The function's other arguments: a pickled tuple."""
    refused: Callable[[], ServerError]
    """Makes the error for a client whose work takes longer than it may."""
    is_slow: bool
    """Whether it is expected to be slow, or was found to be."""
    seconds: float | None = None
    """How long it may take; None: as long as a request's."""
    result: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    process: Process | None = None
    """The process that it runs in; None while it waits."""

    identity: int = 0
    """A number that is the same for the same work."""

    def __post_init__(self) -> None:
        """Compute the identity."""
        self.identity = hash((self.name, self.key, self.arguments))


class Lanes:
    """The preparation processes, and the queues before them. All on the event loop."""

    def __init__(self, seconds: float, first: Process | None = None) -> None:
        """`seconds`: how long one piece of work may take; `first`: a process that was started already."""
        self._first = first
        self._seconds = seconds
        self._models: dict[str, tuple[bytes, bytes]] = {}
        self._quick: deque[Work] = deque()
        self._slow: deque[Work] = deque()
        self._running: set[Work] = set()
        self._known_slow: OrderedDict[int, None] = OrderedDict()
        """Identities of work that was slow."""
        self._processes: set[Process] = set()
        """All of them, those that are starting included."""
        self._idle: list[Process] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_rest = 1
        """Processes that wait for work now."""
        self._is_stopped = False

    def start(self) -> None:
        """Start the first process, which imports what it needs for a second or two while the caller goes on."""
        self._grow(self._at_rest)

    def abort(self) -> None:
        """End all work with an error to its client, and take no more."""
        self._is_stopped = True
        for work in (*self._quick, *self._slow, *self._running):
            if not work.result.done():
                work.result.set_exception(Unavailable("the server is shutting down"))
            if work.process is not None:
                work.process.kill()
        self._quick.clear()
        self._slow.clear()

    async def stop(self) -> None:
        """Do the same, and end the processes."""
        self.abort()
        await asyncio.gather(*(process.close() for process in self._processes))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def learn(self, key: str, model: bytes, tokenizer: bytes) -> None:
        """Get to know a model, with `tokenizer` as for `Process.teach`: work may name it from now on."""
        self._models[key] = (model, tokenizer)

    def forget(self, key: str) -> None:
        """Drop a model that no work names any more."""
        self._models.pop(key, None)
        for process in self._processes:
            process.forget(key)

    async def run(self, work: Work) -> Result:
        """Wait for a result. Work that nobody waits for any more is stopped. Raises ServerError."""
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
                work.process.kill()  # work that is still quick may end by itself, which costs no process

    # Who gets an idle process.

    def _dispatch(self) -> None:
        """Give work to idle processes."""
        if self._is_stopped:
            return
        has_slow = bool(self._slow) or any(work.is_slow and work.name != READ_TOKENIZER for work in self._running)
        self._grow(AT_MOST if has_slow else self._at_rest)  # tokenizers are read one by one: the spare one is enough
        late = {work.identity for work in self._running if work.is_slow}
        for work in [each for each in self._quick if each.identity not in late]:  # the same would be as late
            if self._idle and (len(self._idle) > 1 or len(self._running) == self._slow_running):
                self._quick.remove(work)
                self._begin(work)
        while self._slow and len(self._idle) > 1 and self._slow_running < SLOW:
            self._begin(self._slow.popleft())
        if len(self._idle) > 1:  # there is time to teach one, for when it is needed
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

    # What happens in a process.

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
        """Let what is quick have another process."""
        if work.result.done():  # nobody waits for it any more
            process.kill()
        else:
            work.is_slow = True
            self._dispatch()

    def _is_long(self, process: Process, work: Work) -> None:
        """Remember slow work, and let it begin anew in its turn where too much of it runs."""
        self._remember(work.identity)
        if self._slow_running > SLOW and not work.result.done():
            process.kill()
            work.process = None
            self._running.discard(work)
            self._slow.append(work)
        self._dispatch()

    def _remember(self, identity: int) -> None:
        """Keep the same work out of the way of what is quick, also that which waits already."""
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
        """Replace a process that was killed, or that some work has ended."""
        self._processes.discard(process)
        was_killed = process.is_killed
        self._dispatch()
        status = await process.close()
        if not was_killed:
            logger.error("a preparation process ended with status %d", status)
            if work is not None and not work.result.done():
                work.result.set_exception(Failed("the request could not be prepared", code="internal_error"))

    # How many processes there are.

    def _grow(self, count: int) -> None:
        while len(self._processes) < count and not self._is_stopped:
            process, self._first = self._first or Process(), None
            self._processes.add(process)
            self._spawn(self._start(process))
            if len(self._processes) > AT_REST:
                asyncio.get_running_loop().call_later(SHRINK_SECONDS, self._shrink)

    def _rest(self) -> None:
        """Start the spare process, once no tokenizer is read any more: the first answer may wait for that."""
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
                        work.result.set_exception(Failed("the server cannot prepare requests", code="internal_error"))
                self._quick.clear()
                self._slow.clear()
                return
        self._dispatch()

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
