"""What a person tells the pool: to load, pin and unload models."""

from __future__ import annotations

import asyncio

import pytest
from mlx_overlay_server.errors import Conflict, Unavailable
from mlx_overlay_server.models.load import Occupant
from mlx_overlay_server.models.pool import Pool

from tests.server.models.test_pool import BUDGET, Shelf, run, settled, used


def test_a_pinned_model_stays_until_it_is_pinned_no_longer() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        await pool.load("a", pin=True)
        await used(pool, "b", "c")
        assert pool.resident == ["a", "c"]
        pool.unpin("a")
        await used(pool, "b")
        assert pool.resident == ["b", "c"]

    run(scenario())


def test_a_load_that_waits_for_a_pinned_model_s_room_begins_when_that_is_pinned_no_longer() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        await pool.load("a", pin=True)
        async with pool.use("b"):
            waiting = asyncio.create_task(pool.load("c"))
            await settled()
            assert [each for each in pool.occupants if each.is_waiting] == [Occupant("c", False, 40, 1, None, True)]
            pool.unpin("a")
            await waiting
        assert pool.resident == ["b", "c"]

    run(scenario())


def test_an_idle_model_is_unloaded_and_a_busy_one_by_force_alone() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        pool.unload("a")
        await pool.load("a", pin=True)
        pool.unload("a")
        assert (pool.resident, pool.pinned, shelf.unloads) == ([], frozenset(), ["a"])
        async with pool.use("b"):
            with pytest.raises(Conflict, match="b is in use by 1 request;"):
                pool.unload("b")
            assert pool.resident == ["b"]
            pool.unload("b", force=True)
            assert shelf.unloads == ["a", "b"]
        assert pool.occupants == []
        await used(pool, "b")
        assert pool.resident == ["b"]

    run(scenario())


def test_a_load_is_given_up_and_who_waits_is_told() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.held.clear()
        pool = Pool(shelf, shelf, budget=BUDGET)
        loading = asyncio.create_task(pool.load("a"))
        await settled()
        assert pool.occupants == [Occupant("a", False, 40, 1, None, read=7)]
        pool.unload("a", force=True)
        with pytest.raises(Unavailable, match="cancelled by hand"):
            await loading
        shelf.held.set()
        await used(pool, "a")
        assert pool.resident == ["a"]

    run(scenario())


def test_an_idle_model_says_for_how_long() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool = Pool(shelf, shelf, budget=BUDGET)
        async with pool.use("a"):
            assert pool.occupants == [Occupant("a", True, 40, 1, None)]
        (idle,) = pool.occupants
        assert idle.idle_seconds is not None
        assert idle.idle_seconds >= 0

    run(scenario())
