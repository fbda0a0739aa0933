"""Loads, prompts and answers of all sizes at an engine whose memory is small, counted as MLX counts it.

P14: memory is asked for before it is taken. P15: KV caches on disk never take more than they may, while they are
written, read, and found again by a server that starts anew. `tried` counts sequences, `lost` those that ended in
another way than an answer or a refusal; `waited` is the highest share of the budget that was in use, `held` the MiB
that nobody has freed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import mlx.core as mx
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import mlx, worker
from mlx_overlay_server.engine.commands import Cancel, Command, Item, Load, Sampled, Submit, Unload
from mlx_overlay_server.engine.disk import tier
from mlx_overlay_server.engine.disk.store import rounded
from mlx_overlay_server.errors import PromptTooLong, Unavailable
from mlx_overlay_server.memory import Machine
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.soak import Row
from tests.support.stage import Script, Stage

MOST = 1.05
"""The share of the budget that may be in use at any time."""
CONTEXT = 4096


class Round(NamedTuple):
    """What came of one round."""

    items: list[list[Item]]
    """Of each sequence."""
    peak: int
    """The most bytes of memory that were in use beyond those before the round."""
    on_disk: int
    """The most bytes that files took beyond what they may; 0: they never did."""
    restored: int
    """Tokens whose KV caches were read from disk."""


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
        played_ = played(folders, budget, draw, sequences=24, disk=place / "kv")
        tried += len(played_.items)
        lost += sum(not isinstance(items[-1], Sampled | PromptTooLong | Unavailable) for items in played_.items)
        most = max(most, played_.peak / budget)
        if played_.peak > MOST * budget:
            broken.append(f"P14: {played_.peak / 1e6:.1f} MB were in use, of {budget / 1e6:.1f} MB")
        if played_.on_disk:
            broken.append(f"P15: {played_.on_disk} bytes more were on disk than may be")
        held = max(0, mx.get_active_memory() - before) >> 20
    return Row(tried, lost, most, held, tuple(broken))


def models(place: Path) -> list[Path]:
    """Make two models whose KV caches soon take more than their weights."""
    return [make_random_model(place / str(number), context=CONTEXT, layers=5, seed=number) for number in range(2)]


def weights(folder: Path) -> int:
    """Return the bytes of a model's weights."""
    return (folder / "model.safetensors").stat().st_size


def played(folders: list[Path], budget: int, draw: Random, *, sequences: int, disk: Path) -> Round:
    """Play one round. Where it keeps KV caches on disk, in a folder, the server is started anew in the middle."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cap = draw.choice((0, budget // 4, 4 * budget))
    options = EngineOptions(
        cache_bytes=draw.choice((None, 0, budget // 4)),
        batch_size=draw.choice((2, 8, 32)),
        kv_bits=draw.choice((None, None, None, 8)),
        kv_group_size=32,
        quantized_kv_start=300,
        kv_disk=cap,
    )
    starts = 2 if cap else 1
    prompts: list[tuple[int, ...]] = []
    made: list[list[Item]] = []
    watch = _Watch(disk, cap)
    restored = 0
    with _machine(budget, disk):
        for _ in range(starts):
            stage = Stage(options).play(
                lambda stage: _script(stage, folders, draw, sequences // starts, prompts, watch)
            )
            made += stage.items.values()
            restored += stage.stats.disk.restored
            del stage
            gc.collect()
            watch.look()
    return Round(made, mx.get_peak_memory() - before, watch.excess, restored)


class _Watch:
    """Looks at how much is in a folder."""

    def __init__(self, folder: Path, cap: int) -> None:
        self._folder = folder
        self._cap = cap
        self.excess = 0
        """The most bytes that there were beyond the cap."""

    def look(self) -> None:
        """Count what is there now."""
        if not self._cap or not self._folder.exists():
            return
        nbytes = 0
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                nbytes += rounded(path.stat().st_size)
        self.excess = max(self.excess, nbytes - self._cap)


def _script(
    stage: Stage, folders: list[Path], draw: Random, left: int, prompts: list[tuple[int, ...]], watch: _Watch
) -> Script:
    keys: list[str] = []
    live: list[int] = []
    known = 0.2 if not prompts else 0.6
    for number in range(draw.choice((1, 1, 2))):
        keys.append(f"{number}")
        yield [Load(keys[-1], str(folders[number]), nbytes=weights(folders[number]))]
    while not stage.loaded(*keys):
        yield []
    watch.look()
    usable = [key for key in keys if isinstance(stage.settled[key], Loaded)]
    ids = iter(range(1, 10**6))
    while usable and (left or any(not stage.is_over(id_) for id_ in live)):
        commands: list[Command] = []
        for _ in range(min(left, draw.choice((0, 0, 0, 1, 1, 4, 12)))):
            left -= 1
            live.append(next(ids))
            commands.append(_sequence(stage, live[-1], draw.choice(usable), draw, prompts, known))
        if live and draw.random() < 0.005:
            commands.append(Cancel(cancelled := draw.choice(live)))
            if not stage.is_over(cancelled):
                stage.items.setdefault(cancelled, []).append(Unavailable("cancelled"))
        yield commands
        watch.look()
    yield [Unload(key) for key in keys]


def _sequence(stage: Stage, id_: int, key: str, draw: Random, prompts: list[tuple[int, ...]], share: float) -> Submit:
    """Draw a sequence. `share`: of those that begin like one of the prompts before."""
    model = stage.settled[key]
    assert isinstance(model, Loaded)
    room = (model.context or CONTEXT) - 2
    size = min(room, draw.choice((5, 40, 400, 700, 1000, 2500)))
    known = [prompt for prompt in prompts if len(prompt) <= room]
    if known and draw.random() < share:  # a conversation goes on, or one like it begins
        prompt = (*draw.choice(known), 97)[:room]
    else:
        prompt = tuple(draw.randrange(97, 120) for _ in range(draw.randint(size // 2 + 1, size)))
    prompts.append(prompt)
    answer = min(draw.choice((1, 10, 100, 700)), room + 1 - len(prompt))
    seed = draw.choice((None, None, None, None, 7))  # with a seed it runs alone
    params = Params(temperature=0) if seed is None else Params(temperature=1, seed=seed)
    return Submit(id_, key, prompt, params, max(1, answer))


@contextmanager
def _machine(usable: int, disk: Path) -> Iterator[None]:
    """Let MLX say that there are so many bytes, and KV caches be kept in a folder, however slow the disk is."""
    real = mlx.machine, tier.folder, worker.DISK_SECONDS
    mlx.machine, tier.folder, worker.DISK_SECONDS = lambda: Machine(usable), lambda: str(disk), 60.0
    try:
        yield
    finally:
        mlx.machine, tier.folder, worker.DISK_SECONDS = real
