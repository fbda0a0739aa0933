"""A runner of the engine in the test's own thread: each step is the test's to make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import loading
from mlx_overlay_server.engine.commands import Item, Load, Prefilled, Sampled, Submit
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.runner import Runner
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.settings import EngineOptions

PROMPT = tuple(range(97, 117))
_STEPS = 2000


async def resident(engine: Engine, folder: Path, **how: Any) -> Any:
    """Have an engine load the model of a folder: a Loaded, or a LoadedEncoder. `how`: other fields of `Load`."""
    return await engine.load(Load(engine.new_key(str(folder)), str(folder), **how))


class Running:
    """A model's runner, with the sequences that a test gives it. For it, all that it does takes no time at all."""

    def __init__(
        self,
        folder: Path,
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        *,
        draft: Path | None = None,
    ) -> None:
        self.prefixes = PrefixCache(1 << 30)
        command = Load("0:m", str(folder), draft_path=None if draft is None else str(draft))
        runners = list(loading.load(command, options, None, self.prefixes))
        assert isinstance(runners[-1], Runner)
        self.runner: Runner = runners[-1]
        self.runner._clock = lambda: 0.0
        self._ids = itertools.count()
        self.submits: dict[int, Submit] = {}
        self.items: dict[int, list[Item]] = {}
        """What each sequence was told so far."""

    def add(
        self,
        prompt: Sequence[int] = PROMPT,
        *,
        system: int = 0,
        max_tokens: int = 3,
        more: dict[str, Any] | None = None,
        **params: Any,
    ) -> int:
        """Submit a sequence, greedy unless `params` say otherwise; returns its id. `more`: other fields of Submit."""
        id_ = next(self._ids)
        chosen = Params(**{"temperature": 0, **params})
        key = self.runner.loaded.key
        self.submits[id_] = Submit(id_, key, tuple(prompt), chosen, max_tokens, system=system, **(more or {}))
        self.runner.add(self.submits[id_])
        self.items[id_] = []
        return id_

    def step(self) -> list[tuple[int, Item]]:
        """One step of the runner."""
        made = self.runner.step()
        for id_, item in made:
            self.items[id_].append(item)
        return made

    def finish(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(_STEPS):
            if not self.runner.is_busy:
                return
            self.step()
        raise AssertionError("the sequences do not end")

    def sampled(self, id_: int) -> list[Sampled]:
        """The tokens that were drawn for a sequence so far. Raises what it was told instead."""
        for item in self.items[id_]:
            if isinstance(item, ServerError):
                raise item
        return [item for item in self.items[id_] if isinstance(item, Sampled)]

    def tokens(self, id_: int) -> list[int]:
        """The same as token ids, with the end mark."""
        return [item.token for item in self.sampled(id_)]

    def read(self, prompt: Sequence[int] = PROMPT, **more: Any) -> Prefilled:
        """Generate one sequence to its end: what is told of its prompt once that is read."""
        id_ = self.add(prompt, **more)
        self.finish()
        return self.told(id_)[-1]

    def told(self, id_: int) -> list[Prefilled]:
        """What a sequence was told of its prompt so far."""
        return [item for item in self.items[id_] if isinstance(item, Prefilled)]

    def progress(self) -> dict[int, int]:
        """One step: how many tokens of each prompt are read after it."""
        return {id_: item.done for id_, item in self.step() if isinstance(item, Prefilled)}
