"""Who may begin to load, and who leaves for it: nobody waits behind one that does not fit, nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.models import room
from mlx_overlay_server.models.pool import Pool
from mlx_overlay_server.models.room import PATIENCE_SECONDS, Held, Waiting, plan

from tests.server.models.test_pool import BUDGET, Shelf, run, settled, used
from tests.support.processes import SECONDS


def held(name: str, nbytes: int, number: int = 0, **state: bool) -> Held:
    defaults = {"is_busy": False, "is_pinned": False, "is_loading": False}
    return Held(name, nbytes, number, float(number), **{**defaults, **state})


def begins(waiting: list[Waiting], taken: list[Held], now: float = 0) -> tuple[str, list[str]] | None:
    """Which load begins, and who leaves for it."""
    found = plan(waiting, taken, BUDGET, now)
    return None if found is None else (found.load.id, [each.id for each in found.leaving])


def test_the_first_that_fits_begins() -> None:
    large, small = Waiting("large", 60, 1, 0), Waiting("small", 40, 2, 0)
    assert begins([large, small], []) == ("large", [])
    assert begins([large, small], [held("busy", 60, is_busy=True)]) == ("small", [])
    assert begins([large, small], [held("busy", 61, is_busy=True)]) is None


def test_nobody_leaves_where_that_would_not_be_enough() -> None:
    taken = [held("idle", 10), held("busy", 60, is_busy=True)]
    assert begins([Waiting("large", 60, 1, 0)], taken) is None


def test_loads_that_nobody_waits_for_leave_first_and_then_the_least_recently_used() -> None:
    taken = [held("old", 20, 0), held("new", 20, 1), held("nobodys", 20, 2, is_loading=True)]
    taken += [held("pinned", 20, 3, is_pinned=True), held("busy", 20, 4, is_busy=True, is_loading=True)]
    assert begins([Waiting("x", 20, 5, 0)], taken) == ("x", ["nobodys"])
    assert begins([Waiting("x", 40, 5, 0)], taken) == ("x", ["nobodys", "old"])
    assert begins([Waiting("x", 60, 5, 0)], taken) == ("x", ["nobodys", "old", "new"])
    assert begins([Waiting("x", 61, 5, 0)], taken) is None


def test_one_that_has_waited_long_is_passed_only_by_what_fits_beside_it() -> None:
    waiting = [Waiting("large", 60, 1, 0), Waiting("small", 40, 3, 0)]
    busy = held("busy", 60, 0, is_busy=True)
    assert begins(waiting, [busy], PATIENCE_SECONDS - 1) == ("small", [])
    assert begins(waiting, [busy], PATIENCE_SECONDS) == ("small", [])
    passed = held("passed", 10, 2, is_busy=True)  # came later than the large one, and is in use
    assert begins(waiting, [held("busy", 50, 0, is_busy=True), passed], PATIENCE_SECONDS - 1) == ("small", [])
    assert begins(waiting, [held("busy", 50, 0, is_busy=True), passed], PATIENCE_SECONDS) is None


def test_a_small_model_does_not_wait_behind_a_large_one() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "large": 90, "small": 40})
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with pool.use("a"):
            waiting = asyncio.create_task(used(pool, "large"))
            await settled()
            await used(pool, "small")
            assert not waiting.done()
        await waiting
        assert shelf.loaded == ["a", "small", "large"]

    run(scenario())


def test_a_load_that_everybody_left_before_it_began_is_dropped_and_others_go_on() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60, "small": 40})
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with pool.use("a"):
            leaving = asyncio.create_task(used(pool, "b"))
            await settled()
            leaving.cancel()
            await settled()
            assert pool.loading == []
        await used(pool, "small")
        assert (shelf.loaded, shelf.unloads) == (["a", "small"], [])

    run(scenario())


def test_a_load_under_way_that_everybody_left_gives_its_room_to_one_that_waits() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60})
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        leaving = asyncio.create_task(used(pool, "a"))
        await settled()
        staying = asyncio.create_task(used(pool, "b"))
        await settled()
        assert shelf.loaded == ["a"]
        leaving.cancel()
        await settled()
        assert (shelf.loaded, pool.loading) == (["a", "b"], ["b"])
        shelf.held.set()
        await staying
        assert pool.resident == ["b"]

    run(scenario())


def test_who_comes_while_a_load_is_given_up_gets_another_one() -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60})
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with pool.use("a"):
            leaving = asyncio.create_task(used(pool, "b"))
            await settled()
            leaving.cancel()
            await asyncio.sleep(0)
            again = asyncio.create_task(used(pool, "b"))
        await again
        assert pool.resident == ["b"]

    run(scenario())


def test_a_large_model_is_not_kept_away_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten small models take turns, so that there is never room for a large one unless it is left to it."""
    monkeypatch.setattr(room, "PATIENCE_SECONDS", 0.0)

    async def scenario() -> None:
        sizes = {f"small-{number}": 10 for number in range(10)}
        shelf = Shelf({"large": 60, **sizes})
        pool = Pool(shelf, shelf, budget=BUDGET)
        draw = random.Random(1)

        async def client() -> None:
            while True:
                async with pool.use(draw.choice(list(sizes))):
                    await asyncio.sleep(draw.random() * 0.01)

        clients = [asyncio.create_task(client()) for _ in range(10)]
        await asyncio.sleep(0.05)
        try:
            async with asyncio.timeout(SECONDS):
                await used(pool, "large")
        finally:
            for each in clients:
                each.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    run(scenario())


class _Shelf(Shelf):
    """Loads that end one by one."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__(sizes)
        self.gates: dict[str, asyncio.Event] = {}

    async def load(self, command: Load) -> Loaded:
        gate = self.gates[command.path] = asyncio.Event()
        try:
            await gate.wait()
        finally:
            if self.gates.get(command.path) is gate:
                del self.gates[command.path]
        return await super().load(command)


_NAMES = ("one", "two", "three", "four")


class Clients(RuleBasedStateMachine):
    """Clients that ask for models and leave, and loads that end, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.shelf = _Shelf({"one": 20, "two": 40, "three": 60, "four": 90})
        self.pool = Pool(self.shelf, self.shelf, budget=BUDGET)
        self.clients: list[asyncio.Task[None]] = []
        self.using: list[str] = []

    def _settle(self) -> None:
        self.loop.run_until_complete(settled())
        self.clients = [each for each in self.clients if not each.done()]

    async def _client(self, name: str) -> None:
        async with self.pool.use(name):
            self.using.append(name)
            try:
                await asyncio.sleep(3600)
            finally:
                self.using.remove(name)

    @rule(name=st.sampled_from(_NAMES))
    def ask(self, name: str) -> None:
        self.clients.append(self.loop.create_task(self._client(name), name=name))
        self._settle()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.clients[data.draw(st.integers(0, len(self.clients) - 1))].cancel()
        self._settle()

    @precondition(lambda self: self.shelf.gates)
    @rule(data=st.data())
    def finish_a_load(self, data: st.DataObject) -> None:
        self.shelf.gates[data.draw(st.sampled_from(sorted(self.shelf.gates)))].set()
        self._settle()

    @invariant()
    def memory_is_kept_to(self) -> None:
        loading = sum(self.shelf.sizes[path[1:]] for path in self.shelf.gates)
        assert self.pool.nbytes + loading <= BUDGET

    @invariant()
    def what_is_in_use_is_in_memory(self) -> None:
        assert set(self.using) <= set(self.pool.resident)

    @invariant()
    def whoever_fits_does_not_wait(self) -> None:
        loading = {path[1:] for path in self.shelf.gates}
        asked = {each.get_name() for each in self.clients}
        waiting = asked - loading - set(self.pool.resident)
        kept = sum(self.shelf.sizes[name] for name in asked & (loading | set(self.pool.resident)))
        assert not waiting or kept + min(self.shelf.sizes[name] for name in waiting) > BUDGET

    @invariant()
    def nothing_waits_for_nobody(self) -> None:
        asked = {each.get_name() for each in self.clients}
        assert set(self.pool.loading) - asked <= {path[1:] for path in self.shelf.gates}
        assert set(self.pool._users) == asked

    def teardown(self) -> None:
        """Everybody who stays is served in the end, once the others have left."""
        for _ in range(20):
            for gate in list(self.shelf.gates.values()):
                gate.set()
            self._settle()
            for each in [each for each in self.clients if each.get_name() in self.using]:
                each.cancel()
            self._settle()
        assert not self.clients
        assert not self.pool.loading
        self.loop.close()


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=25, stateful_step_count=25)
