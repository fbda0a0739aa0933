"""P12: the server downloads nothing that the real cache cannot keep, and says why."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import hf_overlay
import pytest
from mlx_overlay_server import logs, options, run
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.live import Live
from mlx_overlay_server.models.download import Downloader


def test_while_the_cache_is_away_a_download_is_refused_at_once_with_the_reason(hub: Path, sessions: Path) -> None:
    hub.parent.mkdir(parents=True)
    hub.symlink_to("/nowhere/hub")
    with hf_overlay.open_session() as session, pytest.raises(Unavailable) as refused:
        asyncio.run(Downloader(session).fetch("org/name", print))
    assert "org/name is not downloaded" in refused.value.message
    assert "/nowhere/hub" in refused.value.message
    assert refused.value.code == "download_refused"


@pytest.mark.parametrize("flags", [[], ["--hold-downloads"]])
def test_the_flag_reaches_the_overlay(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    def refuse(*_: object, hold_downloads: bool, **__: object) -> None:
        raise hf_overlay.OverlayError(f"holds: {hold_downloads}")

    monkeypatch.setattr(hf_overlay, "open_session", refuse)
    monkeypatch.setattr(logs, "set_up", lambda *_: None)
    with pytest.raises(hf_overlay.OverlayError, match=f"holds: {bool(flags)}"):
        run.serve(Live(options.read(options.make_parser().parse_args(flags), os.environ)))
