"""How many ask the Hub at once, what is remembered of its answers, and what goes on when clients leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_overlay_server import children
from mlx_overlay_server.errors import Unavailable, UnknownModel
from mlx_overlay_server.models import download
from mlx_overlay_server.models.download import DOWNLOADS, LOOK_UPS, Downloader, Progress

from tests.server.models.test_pool import run, settled


class Hub:
    """Processes that only pretend: each says what it has to when a test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, models: Mapping[str, int]) -> None:
        self.models = models
        """id -> size in bytes; further ids are unknown."""
        self.answers = asyncio.Event()
        """Look-ups wait for it."""
        self.sends = asyncio.Event()
        """Downloads wait for it."""
        self.started: list[str] = []
        self.running = 0
        self.most = 0
        self.expected: list[str] = []
        monkeypatch.setattr(children, "running", self._run)

    def downloader(self) -> Downloader:
        session: Any = SimpleNamespace(
            environment={}, expect_model=self.expected.append, owner_fd=0, why_no_downloads=None
        )
        return Downloader(session)

    @asynccontextmanager
    async def _run(self, module: str, model_id: str, **_: Any) -> AsyncIterator[Any]:
        self.started.append(model_id)
        self.running += 1
        self.most = max(self.most, self.running)
        told = asyncio.Event()
        try:
            yield SimpleNamespace(
                lines=lambda: self._lines(model_id, told), write=lambda _: told.set(), wait=lambda: asyncio.sleep(0, 0)
            )
        finally:
            self.running -= 1

    async def _lines(self, model_id: str, told: asyncio.Event) -> AsyncIterator[bytes]:
        await self.answers.wait()
        if model_id not in self.models:
            yield json.dumps({"error": "RepositoryNotFoundError", "message": "no"}).encode()
            return
        yield b'{"found": true}'
        await told.wait()
        await self.sends.wait()
        yield json.dumps({"done": self.models[model_id], "total": self.models[model_id]}).encode()


def _quiet(_: str) -> None:
    pass


def test_few_ask_the_hub_at_once_and_an_unknown_id_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        hub = Hub(monkeypatch, {})
        downloader = hub.downloader()
        asking = [asyncio.create_task(downloader.fetch(f"acme/{number}", _quiet)) for number in range(120)]
        await settled()
        assert hub.running == LOOK_UPS
        hub.answers.set()
        told = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(each) for each in told} == {UnknownModel}
        assert (len(hub.started), hub.most, hub.running) == (120, LOOK_UPS, 0)
        with pytest.raises(UnknownModel, match="acme/7"):
            await downloader.fetch("acme/7", _quiet)
        assert len(hub.started) == 120, "the Hub is asked again at once"
        now = time.monotonic()
        monkeypatch.setattr(download, "time", SimpleNamespace(monotonic=lambda: now + download.UNKNOWN_SECONDS))
        with pytest.raises(UnknownModel):
            await downloader.fetch("acme/7", _quiet)
        assert hub.started[120:] == ["acme/7"]
        assert list(downloader._unknown) == ["acme/7"], "ids that clients make up pile up"
        assert not hub.expected

    run(scenario())


def test_what_is_remembered_of_unknown_ids_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_UNKNOWN", 3)

    async def scenario() -> None:
        hub = Hub(monkeypatch, {})
        hub.answers.set()
        downloader = hub.downloader()
        for number in range(5):
            with pytest.raises(UnknownModel):
                await downloader.fetch(f"acme/{number}", _quiet)
        assert list(downloader._unknown) == ["acme/2", "acme/3", "acme/4"]

    run(scenario())


def test_downloads_are_bounded_and_unknown_ids_are_answered_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        models = {f"acme/{number}": 5 for number in range(DOWNLOADS + 1)}
        hub = Hub(monkeypatch, models)
        hub.answers.set()
        downloader = hub.downloader()
        asking = [asyncio.create_task(downloader.fetch(name, _quiet)) for name in models]
        await settled()
        assert sorted(hub.expected) == sorted(models)[:DOWNLOADS]
        assert downloader.has_work, "a Mac would fall asleep"
        with pytest.raises(UnknownModel):
            await downloader.fetch("acme/nowhere", _quiet)
        hub.sends.set()
        await asyncio.gather(*asking)
        assert sorted(hub.expected) == sorted(models)
        assert hub.running == 0
        assert not downloader.has_work

    run(scenario())


def test_a_look_up_ends_with_its_last_client_and_a_download_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        hub = Hub(monkeypatch, {"acme/one": 5})
        downloader = hub.downloader()

        async def leave() -> None:
            asking = asyncio.create_task(downloader.fetch("acme/one", _quiet))
            await settled()
            asking.cancel()
            await settled()

        await leave()
        assert (hub.running, len(hub.started)) == (0, 1)
        hub.answers.set()
        await leave()
        assert (hub.running, len(hub.started)) == (1, 2)
        notes: list[str] = []
        again = asyncio.create_task(downloader.fetch("acme/one", notes.append))
        await settled()
        hub.sends.set()
        await again
        assert (hub.running, len(hub.started)) == (0, 2), "a second download of the same"
        assert notes[-1] == "downloading acme/one: 0 of 0 MB"

    run(scenario())


def test_closing_ends_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        hub = Hub(monkeypatch, {"acme/one": 5})
        hub.answers.set()
        downloader = hub.downloader()
        asking = asyncio.create_task(downloader.fetch("acme/one", _quiet))
        await settled()
        await downloader.close()
        assert hub.running == 0
        with pytest.raises(asyncio.CancelledError):
            await asking

    run(scenario())


def test_a_process_that_ends_without_a_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        hub = Hub(monkeypatch, {})

        async def nothing(*_: Any) -> AsyncIterator[bytes]:
            for line in list[bytes]():
                yield line

        monkeypatch.setattr(hub, "_lines", nothing)
        with pytest.raises(Unavailable, match="it ended with status 0"):
            await hub.downloader().fetch("acme/one", _quiet)

    run(scenario())


def test_a_download_that_somebody_began_goes_on_with_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        hub = Hub(monkeypatch, {"acme/one": 5})
        downloader = hub.downloader()
        downloader.start("acme/one")
        asking = asyncio.create_task(downloader.fetch("acme/one", _quiet))
        await settled()
        asking.cancel()
        await settled()
        assert downloader.shown == [Progress("acme/one", "waiting")]
        hub.answers.set()
        await settled()
        assert downloader.shown == [Progress("acme/one", "downloading")]
        hub.sends.set()
        await settled()
        assert downloader.shown == [Progress("acme/one", "done", 5, 5)]
        assert (len(hub.started), hub.running) == (1, 0)

    run(scenario())


def test_a_cancelled_download_ends_for_all_who_wait_and_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        hub = Hub(monkeypatch, {"acme/one": 5})
        hub.answers.set()
        downloader = hub.downloader()
        asking = [asyncio.create_task(downloader.fetch("acme/one", _quiet)) for _ in range(2)]
        await settled()
        assert downloader.cancel("acme/one")
        assert not downloader.cancel("acme/one")
        told = await asyncio.gather(*asking, return_exceptions=True)
        assert [each.code for each in told if isinstance(each, Unavailable)] == ["download_cancelled"] * 2
        assert hub.running == 0
        assert downloader.shown == [Progress("acme/one", "cancelled")]
        hub.sends.set()
        downloader.start("acme/one")
        await settled()
        assert downloader.shown == [Progress("acme/one", "done", 5, 5)]

    run(scenario())


def test_what_is_shown_of_ended_downloads_is_bounded_and_free_of_made_up_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_ENDED", 2)

    async def scenario() -> None:
        hub = Hub(monkeypatch, {"acme/1": 5, "acme/2": 5})
        hub.answers.set()
        hub.sends.set()
        downloader = hub.downloader()
        for name in ("acme/0", "acme/1", "acme/2"):
            downloader.start(name)
            await settled()
        with pytest.raises(UnknownModel):
            await downloader.fetch("acme/made-up", _quiet)
        assert [each.id for each in downloader.shown] == ["acme/1", "acme/2"]
        for name in ("acme/7", "acme/7"):
            with suppress(UnknownModel):
                downloader.start(name)
            await settled()
        assert [(each.id, each.state) for each in downloader.shown] == [("acme/2", "done"), ("acme/7", "failed")]
        assert "acme/7" in downloader.shown[1].message

    run(scenario())
