"""What a pool does when nobody looks: loads that all have left end without a word, idle models are looked for often."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.errors import ServerError, Unavailable
from mlx_overlay_server.models.library import Located
from mlx_overlay_server.models.pool import Pool

from tests.support.processes import SECONDS


class Shelf:
    """A library and an engine in one, of models that all have one size; loads wait for a word, and may fail then."""

    def __init__(self, failure: ServerError | None = None, nbytes: int = 1) -> None:
        self.go_on = asyncio.Event()
        self._failure = failure
        self._nbytes = nbytes

    async def locate(self, model_id: str) -> Located:
        return Located(f"/{model_id}", self._nbytes, model_id)

    def new_key(self, path: str) -> str:
        return path

    async def load(self, command: Load) -> Loaded:
        await self.go_on.wait()
        if self._failure is not None:
            raise self._failure
        model: Any = SimpleNamespace(nbytes=self._nbytes)
        return model  # type: ignore[no-any-return]

    def bytes_read(self, key: str) -> int:
        return 0

    def unload(self, model: AnyLoaded) -> None:
        raise AssertionError("nothing was loaded")


def complaints(scenario: Callable[[], Awaitable[None]]) -> list[str]:
    """What the event loop has to say of errors that nobody took."""
    said: list[str] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(str(context["message"])))
        async with asyncio.timeout(SECONDS):
            await scenario()
        for _ in range(5):
            await asyncio.sleep(0)
        gc.collect()

    asyncio.run(main())
    return said


async def _leave(pool: Pool) -> None:
    """Ask for a model, and leave while it loads."""

    async def use() -> None:
        async with pool.use("a"):
            pass

    asking = asyncio.create_task(use())
    while not pool.loading:
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert pool.loading == ["a"], "the load ended with the one who asked for it"


def test_a_load_that_fails_when_everybody_has_left_is_no_error_of_the_loop() -> None:
    async def scenario() -> None:
        shelf = Shelf(Unavailable("broken"))
        pool: Any = Pool(shelf, shelf, budget=10)
        await _leave(pool)
        shelf.go_on.set()
        while pool.loading:
            await asyncio.sleep(0)

    assert complaints(scenario) == []


def test_a_load_that_is_given_up_is_no_error_of_the_loop() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        pool: Any = Pool(shelf, shelf, budget=10)
        await _leave(pool)
        await pool.close()
        assert pool.loading == []

    assert complaints(scenario) == []


@pytest.mark.parametrize(("nbytes", "fits"), [(99, True), (100, True), (101, False)])
def test_a_model_may_take_the_whole_budget_and_no_more(
    nbytes: int, fits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> list[str]:
        shelf = Shelf(nbytes=nbytes)
        shelf.go_on.set()
        pool = Pool(shelf, shelf, budget=100)
        async with asyncio.timeout(SECONDS):
            try:
                async with pool.use("a"):
                    return pool.resident
            except Unavailable:
                return pool.resident

    caplog.set_level(logging.INFO, "mlx_overlay_server")
    assert asyncio.run(scenario()) == (["a"] if fits else [])
    said = "".join(record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"loaded a from /a in \d\.\d s" if fits else "", said)


@pytest.mark.parametrize(("idle_ttl", "pause"), [(8, 2), (0.4, 0.1), (40, 10), (3600, 10)])
def test_idle_models_are_looked_for_four_times_in_their_time_and_every_ten_seconds_at_least(
    idle_ttl: float, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model stays a quarter of its time too long at most."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    async def scenario() -> None:
        shelf = Shelf()
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "sleep", sleep)
            with pytest.raises(asyncio.CancelledError):
                await Pool(shelf, shelf, budget=10, idle_ttl=idle_ttl).sweep()

    asyncio.run(scenario())
    assert pauses == [pause] * 3
