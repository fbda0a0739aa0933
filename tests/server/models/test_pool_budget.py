"""The pool's budget on a machine that is known only once the engine runs, and what is done with models at the start."""

from __future__ import annotations

import asyncio
import sys

import pytest
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.errors import Failed, Unavailable
from mlx_overlay_server.models.pool import Pool, preload

from tests.server.models.test_pool import Shelf, run, settled, used


def test_a_load_waits_until_the_budget_is_known() -> None:
    async def scenario() -> None:
        shelf, known = Shelf(), asyncio.Event()

        async def budget() -> int:
            await known.wait()
            return 50

        pool = Pool(shelf, shelf, budget=budget)
        waiting = asyncio.create_task(used(pool, "a"))
        await settled()
        assert (shelf.loaded, pool.loading) == ([], ["a"])
        known.set()
        await waiting
        assert pool.resident == ["a"]
        await used(pool, "b")
        assert pool.resident == ["b"], "50 have room for one of them"
        with pytest.raises(Unavailable, match="memory budget"):
            await used(pool, "large")

    run(scenario())


def test_a_load_ends_when_the_budget_cannot_be_known() -> None:
    async def scenario() -> None:
        shelf = Shelf()

        async def budget() -> int:
            raise Failed("the engine has failed")

        pool = Pool(shelf, shelf, budget=budget)
        with pytest.raises(Failed, match="the engine has failed"):
            await used(pool, "a")
        assert pool.loading == []

    run(scenario())


@pytest.mark.parametrize(("platform", "is_named"), [("darwin", True), ("linux", False)])
def test_a_model_that_does_not_fit_on_a_mac_is_refused_with_the_name_of_the_system_s_limit(
    platform: str, is_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    async def scenario() -> None:
        shelf = Shelf()
        with pytest.raises(Unavailable) as told:
            await used(Pool(shelf, shelf, budget=10), "a")
        assert "--memory-budget" in told.value.message
        assert ("iogpu.wired_limit_mb" in told.value.message) == is_named
        assert "\n" not in told.value.message

    run(scenario())


def test_models_of_the_start_are_warmed_up_while_they_are_in_use(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        shelf = Shelf({"a": 60, "b": 60, "small": 10})
        pool = Pool(shelf, shelf, budget=70)
        warm: list[str] = []

        async def warm_up(model: AnyLoaded) -> None:
            if model.key == "a":
                other = asyncio.create_task(used(pool, "b"))
                await settled()
                assert pool.resident == ["a"], "it was unloaded while it was warmed up"
                other.cancel()
                await settled()
                raise Unavailable("the GPU has no memory left")
            warm.append(model.key)

        await preload(pool, ("a", "small"), warm_up)
        assert (pool.resident, warm) == (["a", "small"], ["small"])

    run(scenario())
    assert "a: the GPU has no memory left" in caplog.text
