"""The engine's thread, the only one that uses MLX: it loads models and steps their sequences in continuous batches.

Under `mlx.launch` every rank runs this loop on the same commands, which rank 0 shares; so everything here is decided by
commands and by what the model says alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import (
    Cancel,
    Command,
    Item,
    Load,
    Sampled,
    Stats,
    Stop,
    Submit,
    Unload,
)
from mlx_overlay_server.engine.outbox import Outbox
from mlx_overlay_server.errors import Failed, ServerError, Unavailable
from mlx_overlay_server.settings import EngineOptions

if TYPE_CHECKING:
    from mlx_overlay_server.engine.prefix_cache import PrefixCache
    from mlx_overlay_server.engine.ranks import Ranks
    from mlx_overlay_server.engine.runner import Runner

logger = logging.getLogger("mlx_overlay_server")

_PATH = re.compile(r"(?<![\w/.])~?/[\w.-]+/")
_REASON_CHARACTERS = 400

IDLE_SECONDS = 0.1
"""Seconds that other ranks wait at most for rank 0 when nothing happens."""


class Handle(Protocol):
    """Where commands come from and results go. Its methods may be called from the engine's thread."""

    options: EngineOptions

    def take(self, seconds: float) -> list[Command]: ...
    def post(self, items: list[tuple[int, Item]], stats: Stats) -> None: ...
    def reading(self, key: str) -> AbstractContextManager[None]: ...
    def settle(self, key: str, result: Loaded | ServerError) -> None: ...
    def end(self, reason: str) -> None: ...


class Worker:
    """The loop of the engine's thread, on every rank."""

    def __init__(self, engine: Handle) -> None:
        self._engine = engine
        self._options = engine.options
        self._runners: dict[str, Runner] = {}
        self._loading: dict[str, Iterator[Runner | None]] = {}
        self._owner: dict[int, str] = {}
        """Each sequence's id -> the key of its model."""
        self._steps = self._failures = 0
        self._last_failure: str | None = None
        self._outbox = Outbox()
        self._ranks: Ranks
        self._prefixes: PrefixCache

    def run(self) -> None:
        """Run until Stop, or until nothing can go on, and say so to the handle."""
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
        """Import MLX and mlx-lm, which the first load would have to wait for."""
        import mlx_overlay_server.engine.mlx  # before anything else imports mlx-lm

        # isort: split
        import mlx_overlay_server.engine.loading  # noqa: F401
        from mlx_overlay_server.engine.prefix_cache import PrefixCache
        from mlx_overlay_server.engine.ranks import Ranks

        self._ranks = Ranks()
        self._prefixes = PrefixCache(self._options.cache_bytes)
        self._publish([])

    def _run(self) -> None:
        """Take turns. An error that no model is to blame for ends every sequence, and nothing else."""
        goes_on = True
        while goes_on:
            try:
                goes_on = self._turn()
            except Exception as error:
                if self._ranks.group is not None:  # ranks that no longer do the same cannot go on
                    raise
                self._reset(error)

    def _turn(self) -> bool:
        is_busy = bool(self._loading) or any(runner.is_busy for runner in self._runners.values())
        seconds = 0 if is_busy else IDLE_SECONDS if self._ranks.group is not None else 3600
        commands = self._ranks.share(self._engine.take(seconds))
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
        self._outbox.add(items)
        if commands or self._outbox.is_due:
            self._publish(self._outbox.items)
            self._outbox.sent(len(self._owner))
        return True

    def _apply(self, command: Command, items: list[tuple[int, Item]]) -> None:
        if isinstance(command, Load):
            self._loading[command.key] = self._load(command)
        elif isinstance(command, Unload):
            if self._loading.pop(command.key, None) is not None:  # nobody waits for it any more
                self._clear_memory()
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
                self._outbox.expect(command.id)
            except Exception as error:  # noqa: BLE001 - one request's trouble is not the others'
                items.append((command.id, _failed(error)))
        elif isinstance(command, Cancel) and (key := self._owner.pop(command.id, None)) is not None:
            self._outbox.forget([command.id])
            self._runners[key].cancel(command.id)

    def _load(self, command: Load) -> Iterator[Runner | None]:
        from mlx_overlay_server.engine.loading import load

        return load(command, self._options, self._ranks.group, self._prefixes)

    def _go_on_loading(self, key: str, steps: Iterator[Runner | None]) -> None:
        """Load one slice of a model; sequences of other models go on between slices."""
        try:
            with self._engine.reading(key):
                runner = next(steps)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - loading runs the model's code; some of mlx-lm's calls sys.exit
            self._loading.pop(key, None)
            path = key.partition(":")[2]
            logger.warning("cannot load %s: %s", path, str(error).strip() or type(error).__name__)
            reason = load_failure(error, path)
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
        items += made

    def _reset(self, error: Exception) -> None:
        self._failures += 1
        self._last_failure = f"{type(error).__name__} in the engine"
        logger.error("%s: %s", self._last_failure, _first_line(error))
        items: list[tuple[int, Item]] = [*self._outbox.items, *((id_, _failed(error)) for id_ in self._owner)]
        self._outbox.reset()
        self._owner.clear()
        for runner in self._runners.values():
            runner.reset()
        self._publish(items)

    def _forget(self, key: str) -> list[int]:
        """Forget the sequences of a model, and return their ids."""
        ids = [id_ for id_, owner in self._owner.items() if owner == key]
        for id_ in ids:
            del self._owner[id_]
        self._outbox.forget(ids)
        return ids

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


def load_failure(error: BaseException, folder: str) -> str:
    """Return in one line why a model cannot be loaded, for clients: without the paths of this machine."""
    text = " ".join(str(error).replace(f"{folder}/", "").replace(folder, "its folder").split())
    if not text or _PATH.search(text):  # of another place than its folder: the log has it
        return f"{type(error).__name__}; the server's log says why"
    return text if len(text) <= _REASON_CHARACTERS else f"{type(error).__name__}; the server's log says why"
