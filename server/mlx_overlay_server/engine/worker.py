"""The one thread that owns MLX: loads models and steps all their sequences in continuous batches.

Under `mlx.launch` every rank runs this loop on the same commands, which rank 0 shares; so everything here is decided by
commands and by what the model says alone.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import (
    Cancel,
    Command,
    Item,
    Load,
    Options,
    Sampled,
    Stats,
    Stop,
    Submit,
    Unload,
)
from mlx_overlay_server.errors import Failed, ServerError, Unavailable

if TYPE_CHECKING:
    from mlx_overlay_server.engine.prefix_cache import PrefixCache
    from mlx_overlay_server.engine.runner import Runner

logger = logging.getLogger("mlx_overlay_server")

IDLE_SECONDS = 0.1
"""How long other ranks wait at most for rank 0 when nothing happens."""
HOLD_SECONDS = 0.0005
"""For each sequence: how long tokens may be held back so that more of them are handed over in one go.

Each hand-over costs the event loop a wake-up, a line of JSON and a system call a stream, on the processor that the next
step wants as well. For one stream that is nothing, for 32 it is 16 ms, which nobody sees.
"""


class Handle(Protocol):
    """Whoever gives the commands, and is told what comes of them. May be called from this thread."""

    options: Options

    def take(self, seconds: float) -> list[Command]: ...
    def post(self, items: list[tuple[int, Item]], stats: Stats) -> None: ...
    def settle(self, key: str, result: Loaded | ServerError) -> None: ...
    def end(self, reason: str) -> None: ...


class Worker:
    """What runs in the thread, of every rank."""

    def __init__(self, engine: Handle) -> None:
        self._engine = engine
        self._options = engine.options
        self._runners: dict[str, Runner] = {}
        self._loading: dict[str, Iterator[Runner | None]] = {}
        self._owner: dict[int, str] = {}
        """Of each sequence: the key of its model."""
        self._steps = self._failures = 0
        self._last_failure: str | None = None
        self._held: list[tuple[int, Item]] = []
        """What was not handed over yet."""
        self._post_at = 0.0
        """Monotonic seconds: when it must be."""
        self._new: set[int] = set()
        """Sequences without a first token, for which somebody waits."""
        self._group: Any = None
        self._prefixes: PrefixCache

    def run(self) -> None:
        """Until Stop."""
        try:
            self._prepare()
            self._run()
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            reason = f"{type(error).__name__}: {_first_line(error)}"
            logger.error("the engine has failed: %s", reason)
            self._engine.end(reason)
        self._runners.clear()
        self._loading.clear()

    def _prepare(self) -> None:
        import mlx.core as mx

        group = mx.distributed.init()
        self._group = group if group.size() > 1 else None
        if self._group is not None:
            state: Any = mx.random.state
            seed: Any = mx.distributed.all_sum(state[0]).view(mx.uint64).item()
            mx.random.seed(seed)  # ranks draw the same tokens
        import mlx_overlay_server.engine.runner  # noqa: F401 - imports mlx-lm, which the first load would wait for
        from mlx_overlay_server.engine.prefix_cache import PrefixCache

        self._prefixes = PrefixCache(self._options.cache_bytes)
        self._publish([])

    def _run(self) -> None:
        """An error that no model is to blame for costs every sequence, and no more than that."""
        goes_on = True
        while goes_on:
            try:
                goes_on = self._turn()
            except Exception as error:
                if self._group is not None:  # ranks that no longer do the same cannot go on
                    raise
                self._reset(error)

    def _turn(self) -> bool:
        is_busy = bool(self._loading) or any(runner.is_busy for runner in self._runners.values())
        commands = self._shared(self._engine.take(0 if is_busy else (IDLE_SECONDS if self._group else 3600)))
        items: list[tuple[int, Item]] = []
        for command in commands:
            if isinstance(command, Stop):
                return False
            self._apply(command, items)
        for key, steps in list(self._loading.items()):
            self._go_on_loading(key, steps)
        for key, runner in list(self._runners.items()):
            if runner.is_busy:
                self._step(key, runner, items)
        self._held += items
        if commands or any(map(self._is_urgent, items)) or (self._held and time.monotonic() >= self._post_at):
            self._publish(self._held)
            self._held = []
            self._post_at = time.monotonic() + HOLD_SECONDS * len(self._owner)
        return True

    def _is_urgent(self, told: tuple[int, Item]) -> bool:
        """Whether something must not wait: all but a token in the middle of an answer."""
        id_, item = told
        if not isinstance(item, Sampled) or item.finish is not None:
            return True
        is_first = id_ in self._new
        self._new.discard(id_)
        return is_first

    def _apply(self, command: Command, items: list[tuple[int, Item]]) -> None:
        if isinstance(command, Load):
            self._loading[command.key] = self._load(command)
        elif isinstance(command, Unload):
            self._loading.pop(command.key, None)
            if (runner := self._runners.pop(command.key, None)) is not None:
                items += [(id_, Unavailable("the model was unloaded")) for id_ in self._forget(command.key)]
                runner.close()
                del runner
                self._clear_memory()
        elif isinstance(command, Submit):
            runner = self._runners.get(command.key)
            if runner is None:
                items.append((command.id, Unavailable("the model was unloaded; try again")))
                return
            try:
                runner.add(command)
                self._owner[command.id] = command.key
                self._new.add(command.id)
            except Exception as error:  # noqa: BLE001 - one request's trouble is not the others'
                items.append((command.id, _failed(error)))
        elif isinstance(command, Cancel) and (key := self._owner.pop(command.id, None)) is not None:
            self._new.discard(command.id)
            self._runners[key].cancel(command.id)

    def _load(self, command: Load) -> Iterator[Runner | None]:
        from mlx_overlay_server.engine.runner import load

        return load(command, self._options, self._group, self._prefixes)

    def _go_on_loading(self, key: str, steps: Iterator[Runner | None]) -> None:
        """One slice of a load, so that sequences of other models go on meanwhile."""
        try:
            runner = next(steps)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - loading runs the model's code; some of mlx-lm's calls sys.exit
            self._loading.pop(key, None)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.warning("cannot load %s: %s", key.partition(":")[2], reason)
            self._engine.settle(key, Unavailable(f"the model cannot be loaded: {reason}", code="model_load_failed"))
            self._clear_memory()
            return
        if runner is not None:
            self._loading.pop(key, None)
            self._runners[key] = runner
            self._engine.settle(key, runner.loaded)

    def _step(self, key: str, runner: Runner, items: list[tuple[int, Item]]) -> None:
        self._steps += 1
        try:
            made = runner.step()
        except Exception as error:  # noqa: BLE001 - a batch that failed is lost; the model and the others are not
            self._failures += 1
            self._last_failure = f"{type(error).__name__} in a batch of {key.partition(':')[2]}"
            logger.error("%s: %s", self._last_failure, _first_line(error))
            made = [(id_, _failed(error)) for id_ in self._forget(key)]
            runner.reset()
            self._clear_memory()
        for id_, item in made:
            if isinstance(item, ServerError) or (isinstance(item, Sampled) and item.finish is not None):
                self._owner.pop(id_, None)
                if isinstance(item, ServerError):  # one that sampled nothing is still among the new
                    self._new.discard(id_)
        items += made

    def _reset(self, error: Exception) -> None:
        self._failures += 1
        self._last_failure = f"{type(error).__name__} in the engine"
        logger.error("%s: %s", self._last_failure, _first_line(error))
        items: list[tuple[int, Item]] = [*self._held, *((id_, _failed(error)) for id_ in self._owner)]
        self._held = []
        self._owner.clear()
        self._new.clear()
        for runner in self._runners.values():
            runner.reset()
        self._publish(items)

    def _forget(self, key: str) -> list[int]:
        ids = [id_ for id_, owner in self._owner.items() if owner == key]
        for id_ in ids:
            del self._owner[id_]
            self._new.discard(id_)
        return ids

    def _shared(self, commands: list[Command]) -> list[Command]:
        """Rank 0's commands, on every rank."""
        if self._group is None:
            return commands
        import mlx.core as mx

        if self._group.rank() == 0:
            if not commands:
                mx.eval(mx.distributed.all_sum(mx.array(0), stream=mx.cpu))
                return []
            plain = [replace(each, matcher=None) if isinstance(each, Submit) else each for each in commands]
            data = mx.array(list(pickle.dumps(plain)), dtype=mx.uint8)
            mx.eval(mx.distributed.all_sum(mx.array(data.size), stream=mx.cpu))
            mx.eval(mx.distributed.all_sum(data, stream=mx.cpu))
            return plain
        size: Any = mx.distributed.all_sum(mx.array(0), stream=mx.cpu).item()
        if size == 0:
            return []
        data = mx.distributed.all_sum(mx.zeros(size, dtype=mx.uint8), stream=mx.cpu)
        content: Any = data.tolist()
        shared = pickle.loads(bytes(content))  # noqa: S301 - from rank 0, which started us
        return list(shared)

    def _publish(self, items: list[tuple[int, Item]]) -> None:
        runners = self._runners.values()
        stats = Stats(
            active=sum(runner.active for runner in runners),
            waiting=sum(runner.waiting for runner in runners),
            cache_bytes=self._prefixes.nbytes,
            cache_entries=len(self._prefixes),
            steps=self._steps,
            failures=self._failures,
            is_alive=True,
            last_failure=self._last_failure,
        )
        self._engine.post(items, stats)

    @staticmethod
    def _clear_memory() -> None:
        import gc

        import mlx.core as mx

        gc.collect()
        mx.clear_cache()


def _failed(error: Exception) -> ServerError:
    return error if isinstance(error, ServerError) else Failed(f"the engine failed: {type(error).__name__}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else ""
