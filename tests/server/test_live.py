"""The configuration that is edited while the server runs."""

from __future__ import annotations

import asyncio
import logging

import pytest
from hf_overlay import UsageError
from mlx_overlay_server.access import Access, digest
from mlx_overlay_server.live import Live
from mlx_overlay_server.settings import EngineOptions, Key, Settings

from tests.support.processes import SECONDS


class File:
    """What a configuration file says, and how often it was read."""

    def __init__(self) -> None:
        self.settings: Settings | Exception = Settings()
        self.version = 0
        self.reads = 0

    def edit(self, settings: Settings | Exception) -> None:
        self.settings, self.version = settings, self.version + 1

    def read(self) -> Settings:
        self.reads += 1
        if isinstance(self.settings, Exception):
            raise self.settings
        return self.settings


def test_an_edit_counts_from_the_next_request_on_and_a_mistake_leaves_the_last_good_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mlx_overlay_server"), "propagate", True)
    monkeypatch.setattr("mlx_overlay_server.live.LOOK_SECONDS", SECONDS)
    caplog.set_level(logging.INFO)
    file = File()
    live = Live(Settings(), stamp=lambda: file.version, reread=file.read)
    followed: list[Settings] = []
    live.followers.append(followed.append)

    async def run() -> None:
        await live.refresh()
        assert file.reads == 0, "a file that is as it was is not read"
        good = Settings(aliases={"a": "org/a"})
        file.edit(good)
        await asyncio.gather(*(live.refresh() for _ in range(20)))
        assert (live.settings, followed, file.reads) == (good, [good], 1)
        file.edit(UsageError("/config.toml:3: that is wrong"))
        for _ in range(3):
            await live.refresh()
        assert (live.settings, followed, file.reads) == (good, [good], 2)
        restart = Settings(port=1, model_paths=("/a",), engine=EngineOptions(batch_size=2))
        file.edit(restart)
        await live.refresh()
        assert live.settings == restart

    asyncio.run(run())
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the configuration has changed: alias",
        "the configuration stays as it was: /config.toml:3: that is wrong",
        "the configuration has changed: alias",
        "the configuration has changed, and these settings need a restart: max_batch, model_path, port",
    ]


def test_an_edit_does_not_open_a_server_that_needs_keys() -> None:
    file = File()
    ann, bob = (Key(name=name, digest=digest(name.encode())) for name in ("ann", "bob"))
    live = Live(Settings(keys=(ann,)), stamp=lambda: file.version, reread=file.read)
    access = Access(lambda: live.settings)

    async def keys_after(settings: Settings) -> tuple[Key, ...]:
        file.edit(settings)
        await live.refresh()
        assert not access.is_open
        return live.settings.keys

    assert asyncio.run(keys_after(Settings())) == (ann,), "an editor may empty a file before it writes it"
    assert asyncio.run(keys_after(Settings(keys=(bob,)))) == (bob,)


def test_a_file_on_a_disk_that_hangs_holds_up_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_overlay_server.live.LOOK_SECONDS", 0.01)

    async def run() -> None:
        hangs = asyncio.Event()
        live = Live(Settings(), reread=Settings)
        monkeypatch.setattr(live, "_once", hangs.wait)
        await live.refresh()
        await live.refresh()
        hangs.set()
        await live.refresh()

    asyncio.run(run())
