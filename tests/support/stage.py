"""The engine's worker in the test's own thread, on commands that a script hands it: nothing depends on time.

A script is a generator: each value that it yields is what the worker takes in one turn, and when it ends, so does the
worker.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Event
from typing import Any

from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import Command, Item, ReadTokenizer, Sampled, Stats, Stop, Submit
from mlx_overlay_server.engine.worker import DISK_POLL_SECONDS, Worker
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.settings import EngineOptions

TURNS = 20_000

Script = Generator[Sequence[Command]]


class Stage:
    """The other side of a worker: it hands over what a script yields, and keeps what the worker makes."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.read_tokenizer: ReadTokenizer | None = None
        self.items: dict[int, list[Item]] = {}
        """Each sequence's id -> what was made of it."""
        self.settled: dict[str, AnyLoaded | ServerError] = {}
        self.read: dict[str, int] = {}
        """The bytes of weights that were read of each model."""
        """Each load's key -> how it ended."""
        self.stats = Stats()
        self.ended: str | None = None
        """Why the worker cannot go on; None while it can."""
        self.waits: list[float] = []
        """Seconds that the worker was ready to wait, turn by turn."""
        self.now = 0.0
        """What the worker's clock says."""
        self.worker = Worker(self, lambda: self.now)
        self._error: BaseException | None = None
        self._woken = Event()
        self._script: Script

    def play(self, script: Callable[[Stage], Script]) -> Stage:
        """Run the worker on a script, to its end."""
        self._script = script(self)
        self.worker.run()
        if self._error is not None:
            raise self._error
        assert self.ended is None, self.ended
        return self

    def is_over(self, id_: int) -> bool:
        """Whether a sequence has ended."""
        last = self.items.get(id_, [None])[-1]
        return isinstance(last, ServerError) or (isinstance(last, Sampled) and last.finish is not None)

    def has_begun(self, id_: int) -> bool:
        """Whether a sequence has got a token."""
        return any(isinstance(item, Sampled) for item in self.items.get(id_, []))

    def loaded(self, *keys: str) -> bool:
        """Whether some loads have ended."""
        return all(key in self.settled for key in keys)

    def take(self, seconds: float) -> list[Command]:
        self.waits.append(seconds)
        if seconds == DISK_POLL_SECONDS:  # it waits for the thread that reads the disk
            self._woken.wait(seconds)
            self._woken.clear()
        try:
            assert len(self.waits) < TURNS, "the script waits for something that does not come"
            return list(next(self._script, [Stop()]))
        except BaseException as error:  # noqa: BLE001 - it is the test's, and must not count as an error of the engine
            self._error = error
            return [Stop()]

    def reading(self, key: str) -> AbstractContextManager[None]:
        return nullcontext()

    def wake(self) -> None:
        self._woken.set()

    def has_read(self, key: str, nbytes: int) -> None:
        self.read[key] = self.read.get(key, 0) + nbytes

    def post(self, items: list[tuple[int, Item]], stats: Stats) -> None:
        self.stats = stats
        for id_, item in items:
            self.items.setdefault(id_, []).append(item)

    def settle(self, key: str, result: AnyLoaded | ServerError) -> None:
        self.settled[key] = result

    def finish(self) -> None:
        pass

    def end(self, reason: str) -> None:
        self.ended = reason


def until(condition: Callable[[], bool]) -> Script:
    """Take turns without commands until a condition holds."""
    while not condition():
        yield []


def sequence(id_: int, key: str, *, max_tokens: int = 20, **options: Any) -> Submit:
    """Return the command to generate one sequence, greedily unless `params` says otherwise."""
    params = options.pop("params", Params(temperature=0))
    return Submit(id_, key, (72, 105), params, max_tokens, **options)
