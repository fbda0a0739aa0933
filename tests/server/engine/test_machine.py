"""What the engine sets in MLX when it starts, on a machine that only seems to be a Mac."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import mlx, system
from mlx_overlay_server.engine.commands import Load, Unload
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.engine.ranks import Ranks
from mlx_overlay_server.engine.worker import POOL_SECONDS, Worker
from mlx_overlay_server.errors import Failed, Unavailable
from mlx_overlay_server.memory import Machine, shares
from mlx_overlay_server.settings import EngineOptions, Tuning

from tests.support.models import make_random_model
from tests.support.running import resident
from tests.support.stage import Script, Stage, sequence, until

RECOMMENDED = 17_179_869_184


@dataclass
class Mac:
    """MLX as it is on a Mac, as far as limits go."""

    wired: list[int] = field(default_factory=list)
    """The wired limits that were set."""
    pool: int = 10**12
    """The limit of the pool."""
    clears: int = 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Mac:
    mac = Mac()

    def wire(nbytes: int) -> int:
        mac.wired.append(nbytes)
        return 0 if len(mac.wired) == 1 else mac.wired[-2]

    def limit_pool(nbytes: int) -> int:
        before, mac.pool = mac.pool, nbytes
        return before

    def clear() -> None:
        mac.clears += 1

    facts = {"architecture": "applegpu_g16s", "max_recommended_working_set_size": RECOMMENDED}
    monkeypatch.setattr(mx, "device_info", lambda: facts)
    monkeypatch.setattr(mx, "set_wired_limit", wire)
    monkeypatch.setattr(mx, "set_cache_limit", limit_pool)
    monkeypatch.setattr(mx, "clear_cache", clear)
    return mac


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "random")


def _two_models(model: Path, mac: Mac) -> Any:
    """Return a script in which one model goes while another generates, each in a batch and alone."""

    def script(stage: Stage) -> Script:
        seen = list(mac.wired)
        yield [Load("a", str(model)), Load("b", str(model))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(1, "a", max_tokens=3), sequence(2, "b", max_tokens=10**6)]
        yield [sequence(3, "a", max_tokens=3, params=Params(temperature=1, seed=3))]
        yield from until(lambda: stage.is_over(1) and stage.is_over(3) and stage.has_begun(2))
        yield [Unload("a")]
        yield []
        yield [Unload("b")]
        yield from until(lambda: stage.is_over(2))
        assert mac.wired == seen, "the limit changed after the start"

    return script


@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(kv_bits=8, kv_group_size=32)])
def test_the_wired_limit_is_set_once_at_the_start_whatever_models_come_and_go(
    options: EngineOptions, model: Path, mac: Mac
) -> None:
    Stage(options).play(_two_models(model, mac))
    assert mac.wired == [RECOMMENDED]


def test_the_wired_limit_can_be_left_alone(model: Path, mac: Mac) -> None:
    Stage(EngineOptions(no_wired_memory=True)).play(_two_models(model, mac))
    assert mac.wired == []


def _nothing(_: Stage) -> Script:
    yield []


def test_the_engine_says_how_the_memory_is_divided(mac: Mac) -> None:
    stage = Stage(EngineOptions()).play(_nothing)
    assert stage.stats.memory == shares(Machine(RECOMMENDED, is_metal=True))
    assert mac.pool == stage.stats.memory.pool
    stage = Stage(EngineOptions(cache_bytes=10**9)).play(_nothing)
    assert stage.stats.memory is not None
    assert stage.stats.memory.prefixes == 10**9


def test_on_a_mac_what_other_programs_leave_is_all_there_is(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU shares the memory with them; a card has its own."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(system, "free", lambda: 5 * 10**9)
    assert mlx.reach() == mx.get_active_memory() + mx.get_cache_memory() + 5 * 10**9
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90"})
    assert mlx.reach() is None


def test_a_smaller_limit_of_the_pool_stays(mac: Mac) -> None:
    mac.pool = 2**25
    Stage(EngineOptions()).play(_nothing)
    assert mac.pool == 2**25


def test_without_metal_nothing_is_set(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "x86_64"})
    stage = Stage(EngineOptions()).play(_nothing)
    assert (mac.wired, mac.pool) == ([], 10**12)
    assert stage.stats.memory == shares(Machine(mx.get_memory_limit()))


def test_the_pool_is_cleared_once_when_the_engine_falls_idle(model: Path, mac: Mac) -> None:
    def script(stage: Stage) -> Script:
        yield [Load("a", str(model))]
        yield from until(lambda: stage.loaded("a"))
        for id_ in (1, 2):
            yield [sequence(id_, "a", max_tokens=3)]
            while not stage.is_over(id_):
                yield []
            clears = mac.clears  # mlx-lm does it after a prefill
            stage.now += POOL_SECONDS / 2
            yield []
            assert stage.waits[-1] == pytest.approx(POOL_SECONDS / 2), "nothing would wake it up to clear the pool"
            assert mac.clears == clears, "it was cleared although the next request may come at once"
            stage.now += POOL_SECONDS / 2
            yield []
            assert mac.clears == clears + 1
            stage.now += 10 * POOL_SECONDS
            yield []
            assert mac.clears == clears + 1, "there was nothing left to clear"
            assert stage.waits[-1] > 60

    Stage(EngineOptions()).play(script)


# The event loop's side --------------------------------------------------------------------------------------------


def _used(use: Callable[[Engine], Awaitable[None]], options: EngineOptions = EngineOptions()) -> None:  # noqa: B008
    async def main() -> None:
        engine = Engine(options)
        engine.start()
        try:
            async with asyncio.timeout(60):
                await use(engine)
        finally:
            await engine.stop()

    asyncio.run(main())


def test_the_event_loop_waits_until_the_engine_knows_the_machine(mac: Mac) -> None:
    async def use(engine: Engine) -> None:
        assert await engine.memory() == shares(Machine(RECOMMENDED, is_metal=True))

    _used(use)


def test_who_waits_for_an_engine_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Worker) -> None:
        raise ImportError("libmlx is missing")

    monkeypatch.setattr(Worker, "_prepare", broken)

    async def use(engine: Engine) -> None:
        with pytest.raises(Failed, match="libmlx is missing"):
            await engine.memory()

    _used(use)


# Each way that sequences run in: the batch, and beside it.
@pytest.mark.parametrize(
    "options", [EngineOptions(), EngineOptions(kv_bits=8, kv_group_size=32)], ids=["in the batch", "alone"]
)
def test_warming_up_takes_one_token_and_keeps_nothing(options: EngineOptions, model: Path) -> None:
    async def use(engine: Engine) -> None:
        loaded = await resident(engine, model)
        await engine.warm_up(loaded)
        assert engine.stats.steps > 0
        assert (engine.pending, engine.stats.cache_entries) == (0, 0)
        engine.unload(loaded)
        with pytest.raises(Unavailable):
            await engine.warm_up(loaded)

    _used(use, options)


def test_kv_caches_that_cannot_be_quantised_are_a_reason_not_to_load_a_model(model: Path) -> None:
    async def use(engine: Engine) -> None:
        with pytest.raises(Unavailable, match="divisible by the quantization group size 128"):
            await resident(engine, model, tuning=Tuning(kv_group_size=128))
        await resident(engine, model, tuning=Tuning(kv_bits=0, kv_group_size=128))

    _used(use, EngineOptions(kv_bits=8))


# Ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "count"), [({}, 0), ({"PATH": "/bin"}, 0), ({"MLX_RANK": "0"}, 1), ({"OMPI_COMM_WORLD_RANK": "1"}, 1)]
)
def test_a_group_is_looked_for_only_under_a_launcher(
    environ: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Single:
        def size(self) -> int:
            return 1

    joined: list[Single] = []

    def init() -> Single:
        joined.append(Single())
        return joined[-1]

    monkeypatch.setattr(mx.distributed, "init", init)
    ranks = Ranks(environ)
    assert len(joined) == count
    assert ranks.group is None
    assert ranks.least(5) == 5
