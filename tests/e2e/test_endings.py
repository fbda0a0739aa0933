"""P3: a tree is over only when no program uses it, so a download survives every way in which its session can end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import endings, hubs
from tests.support.endings import WAYS
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import eventually

SLOWLY = 20_000
"""Bytes a second: the large file takes ten seconds, unless the hub is healed."""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.mark.parametrize("release", ["0.36.2", hubs.INSTALLED])
@pytest.mark.parametrize("way", WAYS)
def test_a_download_outlives_its_session(hub: LoopbackHub, tmp_path: Path, way: str, release: str) -> None:
    download = endings.make(hub, tmp_path / "home", "org/name", release)
    hub.slow(SLOWLY, on=endings.LARGE)
    with WAYS[way](download) as end:
        eventually(download.is_under_way, "the large file is being sent")
        end()
        download.start_anything()
        assert download.said() is None, f"it ended before anything was started: {download.said()}"
        hub.heal()
        download.wait()
    download.start_anything()
    download.check_nothing_is_lost()
