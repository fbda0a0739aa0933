"""A model that is named at the start has generated before its first request comes, and leaves nothing of that."""

from __future__ import annotations

import time
from pathlib import Path

import hf_overlay
from mlx_overlay_server.app import build
from mlx_overlay_server.live import Live
from mlx_overlay_server.options import make_parser, read
from starlette.testclient import TestClient

from tests.support.models import make_model

SECONDS = 60


def test_a_model_of_the_start_is_warmed_up(models: Path, sessions: Path) -> None:
    make_model(models / "org" / "first", "Hello there.")
    settings = read(make_parser().parse_args(["--offline", "--model", "org/first"]), {})
    with hf_overlay.open_session([models]) as session:
        app, service = build(Live(settings), session)
        with TestClient(app):
            deadline = time.monotonic() + SECONDS
            while not service.engine.stats.steps or service.engine.pending:
                assert time.monotonic() < deadline, "nothing was generated"
                time.sleep(0.01)
            stats = service.engine.stats
            assert (stats.cache_entries, stats.failures) == (0, 0)
            assert service.pool.resident == ["org/first"]
            assert stats.memory is not None
            assert service.pool._budget == stats.memory.weights
