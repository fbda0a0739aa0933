"""Loads, prompts and answers of all sizes at an engine whose memory is small, counted as MLX counts it.

P14: memory is asked for before it is taken. `tried` counts sequences, `lost` those that ended in another way than an
answer or a refusal; `waited` is the highest share of the budget that was in use, `held` the MiB that nobody has freed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import mlx.core as mx
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.commands import Cancel, Command, Load, Sampled, Submit, Unload
from mlx_overlay_server.engine.disk import tier
from mlx_overlay_server.errors import PromptTooLong, Unavailable
from mlx_overlay_server.memory import Machine
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.soak import Row
from tests.support.stage import Script, Stage

MOST = 1.05
"""The share of the budget that may be in use at any time."""
CONTEXT = 4096


def run(place: Path, seconds: float, random: Random) -> Row:
    """Play rounds, each with a budget, models and sequences of its own."""
    folders = models(place)
    ends = time.monotonic() + seconds
    tried = lost = rounds = 0
    most = 0.0
    held = 0
    broken: list[str] = []
    while time.monotonic() < ends or not rounds:
        rounds += 1
        draw = Random(random.randrange(2**32))
        budget = int(draw.choice((6, 8, 16, 40)) * draw.uniform(1, 2) * weights(folders[0]))
        before = mx.get_active_memory()
        stage, peak = played(folders, budget, draw, sequences=24, disk=place / "kv")
        tried += len(stage.items)
        for items in stage.items.values():
            last = items[-1]
            lost += not isinstance(last, Sampled | PromptTooLong | Unavailable)
        most = max(most, peak / budget)
        if peak > MOST * budget:
            broken.append(f"P14: {peak / 1e6:.1f} MB were in use, of {budget / 1e6:.1f} MB")
        held = max(0, mx.get_active_memory() - before) >> 20
    return Row(tried, lost, most, held, tuple(broken))


def models(place: Path) -> list[Path]:
    """Make two models whose KV caches soon take more than their weights."""
    return [make_random_model(place / str(number), context=CONTEXT, layers=5, seed=number) for number in range(2)]


def weights(folder: Path) -> int:
    """Return the bytes of a model's weights."""
    return (folder / "model.safetensors").stat().st_size


def played(folders: list[Path], budget: int, draw: Random, *, sequences: int, disk: Path) -> tuple[Stage, int]:
    """Play one round, and return what came of it, and the most bytes that were in use beyond those before it.

    `disk`: the folder of kept KV caches, where the round has one.
    """
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with _machine(budget, disk):
        options = EngineOptions(
            cache_bytes=draw.choice((None, 0, budget // 8)),
            batch_size=draw.choice((2, 8, 32)),
            kv_disk=draw.choice((0, 4 * budget)),
        )
        stage = Stage(options).play(lambda stage: _script(stage, folders, draw, sequences))
        del stage.worker
    return stage, mx.get_peak_memory() - before


def _script(stage: Stage, folders: list[Path], draw: Random, left: int) -> Script:
    keys: list[str] = []
    live: list[int] = []
    prompts: list[tuple[int, ...]] = []
    for number in range(draw.choice((1, 1, 2))):
        keys.append(f"{number}")
        yield [Load(keys[-1], str(folders[number]), nbytes=weights(folders[number]))]
    while not stage.loaded(*keys):
        yield []
    usable = [key for key in keys if isinstance(stage.settled[key], Loaded)]
    ids = iter(range(1, 10**6))
    while usable and (left or any(not stage.is_over(id_) for id_ in live)):
        commands: list[Command] = []
        for _ in range(min(left, draw.choice((0, 0, 0, 1, 1, 4, 12)))):
            left -= 1
            live.append(next(ids))
            commands.append(_sequence(stage, live[-1], draw.choice(usable), draw, prompts))
        if live and draw.random() < 0.005:
            commands.append(Cancel(cancelled := draw.choice(live)))
            if not stage.is_over(cancelled):
                stage.items.setdefault(cancelled, []).append(Unavailable("cancelled"))
        yield commands
    yield [Unload(key) for key in keys]


def _sequence(stage: Stage, id_: int, key: str, draw: Random, prompts: list[tuple[int, ...]]) -> Submit:
    model = stage.settled[key]
    assert isinstance(model, Loaded)
    room = (model.context or CONTEXT) - 2
    size = min(room, draw.choice((5, 40, 300, 1000, 2500)))
    known = [prompt for prompt in prompts if len(prompt) <= room]
    if known and draw.random() < 0.2:  # a conversation goes on, or one like it begins
        prompt = (*draw.choice(known), 97)[:room]
    else:
        prompt = tuple(draw.randrange(97, 120) for _ in range(draw.randint(1, size)))
    prompts.append(prompt)
    answer = min(draw.choice((1, 10, 100, 700)), room + 1 - len(prompt))
    seed = draw.choice((None, None, None, None, 7))  # with a seed it runs alone
    params = Params(temperature=0) if seed is None else Params(temperature=1, seed=seed)
    return Submit(id_, key, prompt, params, max(1, answer))


@contextmanager
def _machine(usable: int, disk: Path) -> Iterator[None]:
    """Let MLX say that there are so many bytes, and KV caches be kept in a folder."""
    real, folder = mlx.machine, tier.folder
    mlx.machine, tier.folder = lambda: Machine(usable), lambda: str(disk)
    try:
        yield
    finally:
        mlx.machine, tier.folder = real, folder
