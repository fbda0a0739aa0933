"""The event loop's handle on the engine's thread: commands go in, and their results arrive in mailboxes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from hf_overlay import Task

from mlx_overlay_server.chat.grammar import Constraint
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.encoding.loaded import AnyLoaded, LoadedEncoder, Passage
from mlx_overlay_server.engine.commands import (
    Cancel,
    Command,
    Encode,
    Encoded,
    Item,
    Load,
    ReadTokenizer,
    Sampled,
    Stats,
    Stop,
    Submit,
    Unload,
    is_last,
)
from mlx_overlay_server.engine.worker import Worker
from mlx_overlay_server.errors import Failed, ServerError, Unavailable
from mlx_overlay_server.memory import Shares
from mlx_overlay_server.settings import UNTUNED, EngineOptions, Tuning
from mlx_overlay_server.speech.values import LoadedSpeech

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("mlx_overlay_server")

STOP_SECONDS = 3
"""Seconds that the engine's last step may take once the server stops."""

WARM_UP_TOKENS = 32
"""Tokens of the prompt that warms a model up: several are read by other kernels than one."""


HELD_SECONDS = 10
"""A part of a load takes less, unless a disk does not answer."""
_WATCH_SECONDS = 1


class Held(NamedTuple):
    """The folder of a model whose weights the engine's thread reads, and since how many seconds without an end."""

    path: str
    seconds: float


class Mailbox:
    """Where a request's results arrive, as (id of their sequence, item)."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Item]] = []
        self._wake: asyncio.Future[None] | None = None

    def put(self, id_: int, item: Item) -> None:
        """Add an item. Call it on the event loop only."""
        self._items.append((id_, item))
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def take(self) -> list[tuple[int, Item]]:
        """All items that have come, in their order; waits for the first."""
        while not self._items:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        items, self._items = self._items, []
        return items


class Engine:
    """The handle on the engine's thread. The event loop calls its methods, none of which blocks."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.read_tokenizer: ReadTokenizer | None = None
        """Set before the start, has another process read tokenizers: then this one does not import transformers."""
        self.stats = Stats()
        self._inbox: deque[Command] = deque()
        self._wake = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._mailboxes: dict[int, Mailbox] = {}
        self._loads: dict[str, Future[AnyLoaded]] = {}
        self._ids = itertools.count()
        self._keys = itertools.count()
        self._reading: tuple[str, float] | None = None
        """The key of the model of which the thread loads a part, and since when, in monotonic seconds."""
        self._is_finished = False
        self._read: Counter[str] = Counter()
        """The bytes of weights that were read of each model which is being loaded, by its key."""
        self._has_said_held = False
        self._is_aborted = False
        self._failure: str | None = None
        self._is_prepared = asyncio.Event()
        """Set when the thread has begun its work, or never will."""

    def start(self) -> None:
        """Start the thread, and return while it imports mlx-lm, which takes a second or two."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=Worker(self).run, name="engine", daemon=True)
        self._thread.start()
        self._watch()

    async def stop(self) -> None:
        """End the thread once it has finished its step. Whoever still waits gets Unavailable.

        A rank that lost the others may wait for them for ever: then `is_stuck` is true.
        """
        self._fail_all(Unavailable("the server is shutting down"))
        self._send(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    @overload
    async def load(
        self,
        path: str,
        *,
        adapter_path: str | None = None,
        draft_path: str | None = None,
        nbytes: int = 0,
        tuning: Tuning = ...,
    ) -> Loaded: ...
    @overload
    async def load(
        self,
        path: str,
        *,
        adapter_path: str | None = None,
        draft_path: str | None = None,
        task: Task = "text",
        nbytes: int = 0,
        tuning: Tuning = ...,
    ) -> AnyLoaded: ...
    async def load(
        self,
        path: str,
        *,
        adapter_path: str | None = None,
        draft_path: str | None = None,
        task: Task = "text",
        nbytes: int = 0,
        tuning: Tuning = UNTUNED,
    ) -> AnyLoaded:
        """Make the model in a folder resident. Raises ServerError. Cancelled, it is given up after the next slice.

        `nbytes`: bytes of the weights, for which running sequences leave room.
        """
        self._check()
        key = f"{next(self._keys)}:{path}"
        future: Future[AnyLoaded] = Future()
        self._loads[key] = future
        self._send(Load(key, path, adapter_path, draft_path, task, nbytes, tuning))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._send(Unload(key))
            raise
        finally:
            self._loads.pop(key, None)
            self._read.pop(key, None)

    def bytes_read(self, path: str) -> int:
        """Return how many bytes of weights were read of the model in a folder that is being loaded."""
        return sum(nbytes for key, nbytes in list(self._read.items()) if key.partition(":")[2] == path)

    async def memory(self) -> Shares:
        """Return how the machine's memory is divided, once the thread knows the machine. Raises ServerError."""
        await self._is_prepared.wait()
        self._check()
        assert self.stats.memory is not None  # noqa: S101 - it comes with the thread's first stats
        return self.stats.memory

    async def warm_up(self, model: AnyLoaded) -> None:
        """Let a model read a text and generate one token, if it does generate. Raises ServerError.

        That compiles what its first request would wait for.
        """
        if isinstance(model, LoadedSpeech):
            return
        size = min(WARM_UP_TOKENS, model.vocab_size, model.context or WARM_UP_TOKENS)
        if not isinstance(model, Loaded):
            await self.encode(model, (Passage(tuple(range(size)), size),))
            return
        submit = Submit(self.new_id(), model.key, tuple(range(size)), Params(), 1, keeps_cache=False)
        mailbox = self.submit([submit])
        try:
            while True:
                for _, item in await mailbox.take():
                    if isinstance(item, ServerError):
                        raise item
                    if isinstance(item, Sampled):
                        return
        finally:
            self.cancel([submit.id])

    async def encode(self, model: LoadedEncoder, passages: tuple[Passage, ...]) -> npt.NDArray[np.float32]:
        """Return what a model makes of some passages, at least one: a row for each. Raises ServerError.

        A row is a vector, or of a model that ranks the logit of its score.
        """
        encode = Encode(self.new_id(), model.key, passages)
        mailbox = self.submit([encode])
        try:
            while True:
                for _, item in await mailbox.take():
                    if isinstance(item, ServerError):
                        raise item
                    if isinstance(item, Encoded):
                        return item.rows
        finally:
            self.cancel([encode.id])

    def unload(self, model: AnyLoaded) -> None:
        """Drop a model. Its running sequences get Unavailable."""
        self._send(Unload(model.key))

    def new_id(self) -> int:
        """An id for a `Submit`, which no other has. Any thread may call this."""
        return next(self._ids)

    def submit(self, submits: Iterable[Submit | Encode]) -> Mailbox:
        """Generate some sequences, or read texts; the mailbox holds their items under their ids.

        Raises Failed when the engine has failed, and Unavailable when it is being stopped.
        """
        self._check()
        mailbox = Mailbox()
        for each in submits:
            self._mailboxes[each.id] = mailbox
            self._send(each)
        return mailbox

    @staticmethod
    def matchers(constraint: Constraint, model: Loaded, compiled: Any, count: int) -> list[Any]:
        """Return what holds each of some answers to a constraint; `compiled` is from `chat.grammar.compiled`.

        Any thread may call this once a model is loaded.
        """
        from mlx_overlay_server.engine.sampling import Matcher

        return [Matcher(constraint, compiled.deep_copy(), model.grammar_tokenizer.vocab_size) for _ in range(count)]

    def abort(self) -> None:
        """End every sequence and load, and take no more; whoever waits gets Unavailable."""
        self._is_aborted = True
        ids = list(self._mailboxes)
        self._fail_all(Unavailable("the server is shutting down"))
        for id_ in ids:
            self._send(Cancel(id_))

    def cancel(self, ids: Iterable[int]) -> None:
        """Free what sequences hold; nothing for those that have ended."""
        for id_ in ids:
            if self._mailboxes.pop(id_, None) is not None:
                self._send(Cancel(id_))

    @property
    def pending(self) -> int:
        """Sequences that somebody waits for."""
        return len(self._mailboxes)

    @property
    def is_stuck(self) -> bool:
        """Whether the thread has begun its work and still runs; after `stop` this means that it will not end.

        One that still imports mlx-lm has begun nothing, and may be left, as may one that writes KV caches at its end.
        """
        is_alive = self._thread is not None and self._thread.is_alive()
        return self._is_prepared.is_set() and not self._is_finished and is_alive

    @property
    def held(self) -> Held | None:
        """What holds the thread, so that no model can answer: a disk that does not; None when nothing does."""
        if (reading := self._reading) is None or (seconds := time.monotonic() - reading[1]) < HELD_SECONDS:
            return None
        return Held(reading[0].partition(":")[2], seconds)

    @property
    def failure(self) -> str | None:
        """Why the engine cannot work any more; None while it can."""
        return self._failure

    def _check(self) -> None:
        if self._is_aborted:
            raise Unavailable("the server is shutting down")
        if self._failure is not None:
            raise Failed(f"the engine has failed: {self._failure}; start the server again")
        if self._is_held_for_long:
            raise _waiting()

    @property
    def _is_held_for_long(self) -> bool:
        return self.held is not None and self.held.seconds >= self.options.load_seconds

    def _watch(self) -> None:
        """Let nobody wait for a thread that a disk holds for long. What it was to do is dropped when it is let go."""
        held = self.held
        if held is not None and not self._has_said_held:
            logger.warning("the engine waits for the disk of %s; no model answers until that does", held.path)
        self._has_said_held = held is not None
        if self._is_held_for_long:
            ids, keys = list(self._mailboxes), list(self._loads)
            self._fail_all(_waiting())
            for id_ in ids:
                self._send(Cancel(id_))
            for key in keys:
                self._send(Unload(key))
        if self._loop is not None and not self._is_aborted:
            self._loop.call_later(_WATCH_SECONDS, self._watch)

    def _fail_all(self, error: ServerError) -> None:
        for id_, mailbox in self._mailboxes.items():
            mailbox.put(id_, error)
        self._mailboxes.clear()
        for future in self._loads.values():
            if not future.done():
                future.set_exception(error)

    def _send(self, command: Command) -> None:
        self._inbox.append(command)
        self._wake.set()

    # Called by the thread.

    def take(self, seconds: float) -> list[Command]:
        """Return the commands that have arrived, after waiting for one for up to some seconds."""
        if not self._inbox and seconds:
            self._wake.wait(seconds)
        self._wake.clear()
        commands: list[Command] = []
        while self._inbox:
            commands.append(self._inbox.popleft())
        return commands

    def wake(self) -> None:
        """Let the next `take` return. Any thread may call this."""
        self._wake.set()

    def post(self, items: list[tuple[int, Item]], stats: Stats) -> None:
        """Hand over the items of a step, all at once."""
        self._call(self._deliver, items, stats)

    def finish(self) -> None:
        """Note that the thread has no more work, but for KV caches that are not on disk yet."""
        self._is_finished = True

    def end(self, reason: str) -> None:
        """Note that the thread cannot work any more, and why."""
        self._call(self._end, reason)

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Note while this lasts that a part of a model is being loaded, which a disk may hold up."""
        self._reading = (key, time.monotonic())
        try:
            yield
        finally:
            self._reading = None

    def has_read(self, key: str, nbytes: int) -> None:
        """Note that a slice of a model's weights was read."""
        if key in self._loads:
            self._read[key] += nbytes

    def settle(self, key: str, result: AnyLoaded | ServerError) -> None:
        """Note that a load has ended."""
        self._call(self._settle, key, result)

    def _call(self, function: Any, *arguments: Any) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    def _deliver(self, items: list[tuple[int, Item]], stats: Stats) -> None:
        self.stats = stats
        self._is_prepared.set()
        for id_, item in items:
            mailbox = self._mailboxes.get(id_)
            if mailbox is None:  # cancelled meanwhile
                continue
            mailbox.put(id_, item)
            if is_last(item):
                del self._mailboxes[id_]

    def _end(self, reason: str) -> None:
        self._failure = reason
        self._is_prepared.set()
        self._fail_all(Failed(f"the engine has failed: {reason}"))

    def _settle(self, key: str, result: AnyLoaded | ServerError) -> None:
        future = self._loads.get(key)
        if future is None or future.done():
            return
        if isinstance(result, ServerError):
            future.set_exception(result)
        else:
            future.set_result(result)


def _waiting() -> Unavailable:
    return Unavailable("the engine waits for a disk that does not answer; see /health", code="disk_silent")


def follow(options: EngineOptions) -> threading.Thread:
    """Start the engine's thread of a non-zero rank, and return it. It ends when rank 0 stops."""
    thread = threading.Thread(target=Worker(Engine(options)).run, name="engine", daemon=True)
    thread.start()
    return thread
