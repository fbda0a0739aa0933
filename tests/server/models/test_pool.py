"""Which models are resident, with a library and an engine that only pretend."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import pytest
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.errors import ServerError, Unavailable, UnknownModel
from mlx_overlay_server.models import pool as pool_module
from mlx_overlay_server.models.library import Located
from mlx_overlay_server.models.load import Extras
from mlx_overlay_server.models.pool import Pool, preload
from mlx_overlay_server.settings import Tuning

from tests.support.processes import SECONDS

T = TypeVar("T")

SIZES = {"a": 40, "b": 40, "c": 40, "small": 10, "large": 101, "draft": 5}
BUDGET = 100


class Shelf:
    """A library and an engine in one: models that have a size, and loads that go on when a test says so."""

    def __init__(self, sizes: Mapping[str, int] = SIZES) -> None:
        self.sizes = sizes
        self.loads: list[tuple[str, str | None, str | None]] = []
        self.tunings: dict[str, Tuning] = {}
        """As each model was loaded last."""
        self.unloads: list[str] = []
        self.held = asyncio.Event()
        """Loads wait for it."""
        self.held.set()
        self.failures: list[ServerError] = []
        """What the next loads raise."""

    async def locate(self, model_id: str) -> Located:
        if model_id not in self.sizes:
            raise UnknownModel(f"there is no model {model_id}")
        return Located(f"/{model_id}", self.sizes[model_id], model_id)

    def new_key(self, path: str) -> str:
        return path[1:]

    async def load(self, command: Load) -> Loaded:
        self.loads.append((command.path[1:], command.adapter_path, command.draft_path))
        self.tunings[command.path[1:]] = command.tuning
        await self.held.wait()
        if self.failures:
            raise self.failures.pop()
        nbytes = sum(self.sizes[path[1:]] for path in (command.path, command.draft_path) if path)
        return Loaded(command.key, command.path, _NOTHING, _NOTHING, _NOTHING, _NOTHING, nbytes, 0, None, {})

    def unload(self, model: AnyLoaded) -> None:
        self.unloads.append(model.key)

    def bytes_read(self, key: str) -> int:
        return 7 if key in self.loaded else 0

    @property
    def loaded(self) -> list[str]:
        return [name for name, _, _ in self.loads]


_NOTHING: Any = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """A test's coroutine, bounded in time."""

    async def bounded() -> T:
        async with asyncio.timeout(SECONDS):
            return await work

    return asyncio.run(bounded())


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


async def used(pool: Pool, *names: str) -> None:
    """Use some models, one after the other."""
    for name in names:
        async with pool.use(name):
            pass


def test_loads_of_one_model_are_one() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        waiting = [asyncio.create_task(used(pool, "a")) for _ in range(10)]
        await settled()
        assert (pool.loading, pool.resident, shelf.loaded) == (["a"], [], ["a"])
        shelf.held.set()
        await asyncio.gather(*waiting)
        await used(pool, "a")
        assert (pool.loading, pool.resident, shelf.loaded) == ([], ["a"], ["a"])
        assert pool.nbytes == 40

    run(scenario())


def test_models_load_at_the_same_time_where_there_is_room() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        waiting = [asyncio.create_task(used(pool, name)) for name in ("a", "b")]
        await settled()
        assert pool.loading == ["a", "b"]
        shelf.held.set()
        await asyncio.gather(*waiting)
        assert pool.resident == ["a", "b"]

    run(scenario())


def test_loads_under_way_count_against_the_budget() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        waiting = [asyncio.create_task(used(pool, name)) for name in ("a", "b", "c")]
        await settled()
        assert shelf.loaded == ["a", "b"]
        shelf.held.set()
        await asyncio.gather(*waiting)
        assert shelf.loaded == ["a", "b", "c"]
        assert pool.nbytes <= BUDGET

    run(scenario())


def test_the_least_recently_used_model_makes_room() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        await used(pool, "a", "b", "a", "c")
        assert (shelf.unloads, pool.resident) == (["b"], ["a", "c"])

    run(scenario())


def test_no_more_is_unloaded_than_there_must_be() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        await used(pool, "a", "b", "small")
        assert (shelf.unloads, pool.resident) == ([], ["a", "b", "small"])

    run(scenario())


def test_a_busy_model_is_never_unloaded() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with pool.use("a"):
            await used(pool, "b", "c", "b")
        assert shelf.unloads == ["b", "c"]

    run(scenario())


def test_a_model_stays_until_its_last_user_has_left() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60})
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            await first.enter_async_context(pool.use("a"))
            await second.enter_async_context(pool.use("a"))
            waiting = asyncio.create_task(used(pool, "b"))
            await settled()
            await first.aclose()
            await settled()
            assert (shelf.unloads, shelf.loaded) == ([], ["a"])
            await second.aclose()
            await waiting
        assert (shelf.unloads, shelf.loaded) == (["a"], ["a", "b"])

    run(scenario())


def test_a_pinned_model_is_never_unloaded() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET, pinned=("a",))
        await used(pool, "a", "b", "c", "b")
        assert shelf.unloads == ["b", "c"]

    run(scenario())


def test_a_model_waits_for_room_until_a_busy_one_is_idle() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with pool.use("a"), AsyncExitStack() as stack:
            await stack.enter_async_context(pool.use("b"))
            waiting = asyncio.create_task(used(pool, "c"))
            await settled()
            assert shelf.loaded == ["a", "b"]
            await stack.aclose()
            await waiting
            assert pool.resident == ["a", "c"]

    run(scenario())


def test_a_load_that_fails_gives_its_room_to_the_one_that_waits() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60})
        shelf.held.clear()
        shelf.failures = [Unavailable("broken")]
        pool = Pool(shelf, shelf, budget=BUDGET)
        first, second = (asyncio.create_task(used(pool, name)) for name in ("a", "b"))
        await settled()
        assert shelf.loaded == ["a"]
        shelf.held.set()
        await second
        with pytest.raises(Unavailable, match="broken"):
            await first
        assert pool.resident == ["b"]

    run(scenario())


@pytest.mark.parametrize("pinned", [(), ("large",)])
def test_what_never_fits_is_refused_with_the_numbers(pinned: tuple[str, ...]) -> None:
    async def scenario() -> None:
        shelf = Shelf({"large": 3 * 10**9, "a": 1})
        pool = Pool(shelf, shelf, budget=10**9, pinned=pinned)
        await used(pool, "a")
        with pytest.raises(Unavailable, match=r"large needs 3\.00 GB and the memory budget is 1\.00 GB") as caught:
            await used(pool, "large")
        assert caught.value.code == "model_too_large"
        assert shelf.unloads == []  # nobody loses a model for it

    run(scenario())


def test_what_does_not_fit_beside_pinned_models_is_refused() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60})
        pool = Pool(shelf, shelf, budget=BUDGET, pinned=("a",))
        await used(pool, "a")
        with pytest.raises(Unavailable, match="of which pinned models hold"):
            await used(pool, "b")

    run(scenario())


def test_pinned_models_that_do_not_fit_together_are_refused_and_not_waited_for() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60})
        pool = Pool(shelf, shelf, budget=BUDGET, pinned=("a", "b"))
        await preload(pool, ("a", "b"))
        assert pool.resident == ["a"]
        with pytest.raises(Unavailable, match="of which pinned models hold"):
            await used(pool, "b")

    run(scenario())


def test_a_model_that_is_too_large_delays_no_other() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        refused = asyncio.create_task(used(pool, "large"))
        await used(pool, "a")
        with pytest.raises(Unavailable):
            await refused

    run(scenario())


def test_a_failed_load_is_told_to_all_who_wait_and_can_be_tried_again() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        shelf.failures = [Unavailable("the drive is away")]
        pool = Pool(shelf, shelf, budget=BUDGET)
        waiting = [asyncio.create_task(used(pool, "a")) for _ in range(5)]
        await settled()
        shelf.held.set()
        told = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(each) for each in told] == ["the drive is away"] * 5
        assert (pool.loading, pool.resident) == ([], [])
        await used(pool, "a")
        assert (pool.resident, shelf.loaded) == (["a"], ["a", "a"])
        await used(pool, "b", "c")  # what failed holds no room, and is not taken for busy
        assert shelf.unloads == ["a"]

    run(scenario())


def test_an_unknown_model_is_told_and_costs_nothing() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        with pytest.raises(UnknownModel):
            await used(pool, "nowhere")
        assert (pool.loading, shelf.loads) == ([], [])
        assert not pool._users, "ids that clients make up pile up"

    run(scenario())


def test_a_load_goes_on_when_who_asked_for_it_leaves() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        leaving, staying = (asyncio.create_task(used(pool, "a")) for _ in range(2))
        await settled()
        leaving.cancel()
        await settled()
        assert leaving.cancelled()
        assert pool.loading == ["a"]
        shelf.held.set()
        await staying
        assert (pool.resident, shelf.loaded) == (["a"], ["a"])

    run(scenario())


def test_a_load_that_everybody_left_ends_idle() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        leaving = asyncio.create_task(used(pool, "a"))
        await settled()
        leaving.cancel()
        shelf.held.set()
        await settled()
        assert pool.resident == ["a"]
        await used(pool, "b", "c")
        assert shelf.unloads == ["a"]

    run(scenario())


def test_close_ends_loads_and_tells_those_who_wait() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        waiting = asyncio.create_task(used(pool, "a"))
        await settled()
        await pool.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await waiting
        assert pool.loading == []

    run(scenario())


class Clock:
    """The time that a pool goes by, which stands still until it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.reads = 0
        monkeypatch.setattr(pool_module, "time", self)

    def monotonic(self) -> float:
        self.reads += 1
        return self.now

    async def looked_at(self) -> None:
        """Wait until the pool has swept some more."""
        enough = self.reads + 5
        while self.reads < enough:
            await asyncio.sleep(0.001)


def test_an_idle_model_is_unloaded_after_its_time_and_busy_and_pinned_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        clock = Clock(monkeypatch)
        shelf = Shelf({"idle": 1, "busy": 1, "pinned": 1})
        pool = Pool(shelf, shelf, budget=BUDGET, idle_ttl=0.01, pinned=("pinned",))
        await used(pool, "idle", "pinned")
        sweeping = asyncio.create_task(pool.sweep())
        async with pool.use("busy"):
            await clock.looked_at()
            assert shelf.unloads == []
            clock.now = 0.01
            await clock.looked_at()
            assert shelf.unloads == ["idle"]
        await clock.looked_at()
        assert (shelf.unloads, pool.resident) == (["idle"], ["busy", "pinned"])  # idle since it was left
        clock.now = 0.02
        await clock.looked_at()
        assert (shelf.unloads, pool.resident) == (["idle", "busy"], ["pinned"])
        sweeping.cancel()

    run(scenario())


def test_without_a_time_idle_models_stay() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        await used(pool, "a")
        sweeping = asyncio.create_task(pool.sweep())
        await asyncio.sleep(0.05)
        sweeping.cancel()
        assert pool.resident == ["a"]

    run(scenario())


def test_a_draft_model_and_an_adapter_are_loaded_and_counted_with_their_model() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=44, extras={"a": Extras("/lora", "draft")})
        with pytest.raises(Unavailable, match="memory budget"):
            await used(pool, "a")
        pool = Pool(shelf, shelf, budget=45, extras={"a": Extras("/lora", "draft")})
        await used(pool, "a")
        assert shelf.loads == [("a", "/lora", "/draft")]
        assert pool.nbytes == 45

    run(scenario())


def test_preloading_goes_on_after_a_model_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        await preload(pool, ("nowhere", "a"))
        assert pool.resident == ["a"]

    run(scenario())
    assert "there is no model nowhere" in caplog.text


# One name, several spellings -----------------------------------------------------------------------------------------


class FoldingShelf(Shelf):
    """A library on a volume that ignores case."""

    async def locate(self, model_id: str) -> Located:
        await asyncio.sleep(0)
        return await super().locate(model_id.lower())


def test_a_model_is_in_memory_once_however_its_id_is_spelled() -> None:
    async def work() -> None:
        shelf = FoldingShelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with AsyncExitStack() as users:
            models = await asyncio.gather(*(users.enter_async_context(pool.use(each)) for each in ("A", "a", "A")))
            assert {model.key for model in models} == {"a"}
            assert (shelf.loaded, pool.resident, pool.nbytes) == (["a"], ["a"], SIZES["a"])
            async with pool.use("A"), pool.use("b"):
                assert shelf.unloads == [], "another spelling is a use of it, too"
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(users.enter_async_context(pool.use("c")), 0.05)
        async with pool.use("c"):
            assert shelf.unloads
        assert pool._users == {}

    run(work())


def test_what_is_given_for_one_spelling_of_an_id_counts_for_the_model() -> None:
    async def work() -> None:
        shelf = FoldingShelf()
        pool = Pool(shelf, shelf, budget=BUDGET, pinned=("A",), extras={"A": Extras(draft="draft")})
        await preload(pool, ("A",))
        assert shelf.loads == [("a", None, "/draft")]
        async with pool.use("b"), pool.use("a"):
            pass
        async with pool.use("c"):
            assert shelf.unloads == ["b"], "it is pinned"

    run(work())


def test_the_configuration_arranges_single_models_and_what_it_no_longer_names_is_as_before() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET, pinned=("flag",))
        pool.arrange(extras={}, pinned=["a"], idle_ttls={"b": 0.01})
        assert pool.pinned == {"flag", "a"}
        await used(pool, "a")
        await used(pool, "b")
        sweeping = asyncio.create_task(pool.sweep())
        async with asyncio.timeout(SECONDS):
            while "b" in pool.resident:
                await asyncio.sleep(0.01)
        sweeping.cancel()
        assert pool.resident == ["a"], "b has a time of its own, and a has none"
        pool.arrange(extras={"a": Extras(adapter_path="/lora")}, pinned=[], idle_ttls={})
        assert pool.pinned == {"flag"}
        await used(pool, "a")
        pool.arrange(extras={}, pinned=[], idle_ttls={})
        assert pool.resident == [], "its adapter has changed: the next request loads it without"
        async with pool.use("a"):
            pool.arrange(extras={"a": Extras(tuning=Tuning(kv_bits=4))}, pinned=["a"], idle_ttls={})
            assert pool.resident == ["a"], "it is in use"
        assert pool.resident == [], "which it no longer is"
        await used(pool, "a")
        assert shelf.tunings["a"].kv_bits == 4
        pool.arrange(extras={}, pinned=["a"], idle_ttls={})
        assert pool.resident == [], "a pin keeps no model that was loaded otherwise"

    run(scenario())
