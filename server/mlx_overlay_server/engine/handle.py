"""The event loop's handle on the engine's thread. Commands go in, and their results arrive in mailboxes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

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
from mlx_overlay_server.engine.loads import Held, Loads, new_key
from mlx_overlay_server.engine.mailbox import Mailbox
from mlx_overlay_server.engine.worker import Worker
from mlx_overlay_server.errors import Failed, ServerError, Unavailable
from mlx_overlay_server.memory import Shares
from mlx_overlay_server.settings import EngineOptions
from mlx_overlay_server.speech.values import LoadedSpeech

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger("mlx_overlay_server")

STOP_SECONDS = 3
"""Seconds that the engine's last step may take once the server stops."""

WARM_UP_TOKENS = 32
"""Tokens of the prompt that warms a model up. More than one, because MLX reads a single token with other kernels."""

_WATCH_SECONDS = 1
"""Seconds between two checks whether a disk holds up the thread."""

Reply = TypeVar("Reply", Sampled, Encoded)


class Engine:
    """The handle on the engine's thread. Call its methods on the event loop; none of them blocks."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.read_tokenizer: ReadTokenizer | None = None
        """Set it before the start to have tokenizers read in another process, so that this one need not import
        transformers."""
        self.stats = Stats()
        self._inbox: deque[Command] = deque()
        self._wake = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._mailboxes: dict[int, Mailbox] = {}
        self._loads = Loads()
        self._ids = itertools.count()
        self._is_finished = False
        self._has_said_held = False
        self._is_aborted = False
        self._failure: str | None = None
        self._is_prepared = asyncio.Event()
        """Set when the thread has begun to work, or has failed before."""

    def start(self) -> None:
        """Start the thread, and return while it imports mlx-lm, which takes a second or two."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=Worker(self).run, name="engine", daemon=True)
        self._thread.start()
        self._watch()

    async def stop(self) -> None:
        """Let the thread end after its current step. Whoever still waits gets Unavailable.

        A rank that has lost the others may wait for them for ever. Then `is_stuck` is true.
        """
        self._fail_all(Unavailable("the server is shutting down"))
        self._send(Stop())
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    async def load(self, command: Load) -> AnyLoaded:
        """Load a model into memory. Raises ServerError. When it is cancelled, the load ends after its next slice."""
        self._check()
        with self._loads.begun(command.key) as result:
            self._send(command)
            try:
                return await asyncio.wrap_future(result)
            except asyncio.CancelledError:
                self._send(Unload(command.key))
                raise

    def bytes_read(self, key: str) -> int:
        """Return how many bytes of weights a load that is under way has read."""
        return self._loads.bytes_read(key)

    async def memory(self) -> Shares:
        """Return how the machine's memory is divided, once the thread knows the machine. Raises ServerError."""
        await self._is_prepared.wait()
        self._check()
        assert self.stats.memory is not None  # noqa: S101 - it comes with the thread's first stats
        return self.stats.memory

    async def warm_up(self, model: AnyLoaded) -> None:
        """Let a model read a short text, and generate a token if it generates. Raises ServerError.

        MLX compiles its kernels meanwhile, so that the first request does not wait for that.
        """
        if isinstance(model, LoadedSpeech):
            return
        size = min(WARM_UP_TOKENS, model.vocab_size, model.context or WARM_UP_TOKENS)
        prompt = tuple(range(size))
        if isinstance(model, Loaded):
            await self._first(Submit(self.new_id(), model.key, prompt, Params(), 1, keeps_cache=False), Sampled)
        else:
            await self.encode(model, (Passage(prompt, size),))

    async def encode(self, model: LoadedEncoder, passages: tuple[Passage, ...]) -> npt.NDArray[np.float32]:
        """Return one row for each of some passages, of which there is at least one. Raises ServerError.

        The row is the passage's vector; from a model that ranks it is one number, the logit of the score.
        """
        return (await self._first(Encode(self.new_id(), model.key, passages), Encoded)).rows

    async def _first(self, command: Submit | Encode, kind: type[Reply]) -> Reply:
        """Submit a command, and return its first item of a kind. Raises ServerError."""
        mailbox = self.submit([command])
        try:
            while True:
                for _, item in await mailbox.take():
                    if isinstance(item, ServerError):
                        raise item
                    if isinstance(item, kind):
                        return item
        finally:
            self.cancel([command.id])

    def unload(self, model: AnyLoaded) -> None:
        """Drop a model. Its running sequences get Unavailable."""
        self._send(Unload(model.key))

    def new_id(self) -> int:
        """Return an id for a `Submit` or `Encode` that no other one has. Any thread may call this."""
        return next(self._ids)

    def new_key(self, path: str) -> str:
        """Return a key for a `Load` of a folder that no other load has."""
        return new_key(self.new_id(), path)

    def submit(self, submits: Iterable[Submit | Encode]) -> Mailbox:
        """Hand over sequences to generate, or texts to encode. Their items arrive in the mailbox, under their ids.

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
        """Return `count` matchers of a constraint's grammar, which `chat.grammar.compiled` has compiled.

        Any thread may call this once a model is loaded.
        """
        from mlx_overlay_server.engine.sampling import Matcher

        return [Matcher(constraint, compiled.deep_copy(), model.grammar_tokenizer.vocab_size) for _ in range(count)]

    def abort(self) -> None:
        """End every sequence and load, and accept no more. Whoever waits gets Unavailable."""
        self._is_aborted = True
        ids = list(self._mailboxes)
        self._fail_all(Unavailable("the server is shutting down"))
        for id_ in ids:
            self._send(Cancel(id_))

    def cancel(self, ids: Iterable[int]) -> None:
        """Free what sequences hold. Those that have ended are ignored."""
        for id_ in ids:
            if self._mailboxes.pop(id_, None) is not None:
                self._send(Cancel(id_))

    @property
    def pending(self) -> int:
        """The number of sequences that a request waits for."""
        return len(self._mailboxes)

    @property
    def is_stuck(self) -> bool:
        """Whether the thread has begun to work and still runs. After `stop` this means that it will not end.

        A thread that still imports mlx-lm has not begun to work, and one that only writes KV caches has finished.
        """
        is_alive = self._thread is not None and self._thread.is_alive()
        return self._is_prepared.is_set() and not self._is_finished and is_alive

    @property
    def held(self) -> Held | None:
        """The load that holds up the thread, so that no model can answer; None while none does."""
        return self._loads.held

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
        """End all requests and loads with an error once a disk has held up the thread for `load_seconds`.

        The thread drops its work for them as soon as the disk answers.
        """
        held = self.held
        if held is not None and not self._has_said_held:
            logger.warning("the engine waits for the disk of %s; no model answers until that does", held.path)
        self._has_said_held = held is not None
        if self._is_held_for_long:
            ids, keys = list(self._mailboxes), self._loads.keys
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
        for key in self._loads.keys:
            self._loads.settle(key, error)

    def _send(self, command: Command) -> None:
        self._inbox.append(command)
        self._wake.set()

    # Called by the thread.

    def take(self, seconds: float) -> list[Command]:
        """Return the commands that have arrived, after waiting for the first one for some seconds at most."""
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
        """Hand over all items of a step at once."""
        self._call(self._deliver, items, stats)

    def finish(self) -> None:
        """Note that the thread has finished its work, except for writing KV caches to disk."""
        self._is_finished = True

    def end(self, reason: str) -> None:
        """Note that the thread cannot work any more, and why."""
        self._call(self._end, reason)

    def reading(self, key: str) -> AbstractContextManager[None]:
        """Note that the thread makes a step of a load while this context is open; a disk may hold it up."""
        return self._loads.reading(key)

    def has_read(self, key: str, nbytes: int) -> None:
        """Note that a load has read some bytes of weights."""
        self._loads.has_read(key, nbytes)

    def settle(self, key: str, result: AnyLoaded | ServerError) -> None:
        """Note that a load has ended."""
        self._call(self._loads.settle, key, result)

    def _call(self, function: Any, *arguments: Any) -> None:
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the event loop is closed, so nobody waits
            pass

    def _deliver(self, items: list[tuple[int, Item]], stats: Stats) -> None:
        self.stats = stats
        self._is_prepared.set()
        for id_, item in items:
            mailbox = self._mailboxes.get(id_)
            if mailbox is None:  # the sequence was cancelled meanwhile
                continue
            mailbox.put(id_, item)
            if is_last(item):
                del self._mailboxes[id_]

    def _end(self, reason: str) -> None:
        self._failure = reason
        self._is_prepared.set()
        self._fail_all(Failed(f"the engine has failed: {reason}"))


def _waiting() -> Unavailable:
    return Unavailable("the engine waits for a disk that does not answer; see /health", code="disk_silent")


def follow(options: EngineOptions) -> threading.Thread:
    """Start the engine's thread of a non-zero rank, and return it. It ends when rank 0 stops."""
    thread = threading.Thread(target=Worker(Engine(options)).run, name="engine", daemon=True)
    thread.start()
    return thread
