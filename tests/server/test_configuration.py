"""The server honours the configuration file of hf-overlay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hf_overlay
import pytest
from mlx_overlay_server import logs, run
from mlx_overlay_server.live import Live
from mlx_overlay_server.settings import Settings

from tests.support.processes import PYTHON, environment, finish


@pytest.fixture
def file(home: Path) -> Iterator[Path]:
    """Where it is. The server replaces the environment of its process, which is this one."""
    path = home / ".config/hf-overlay/config.toml"
    path.parent.mkdir(parents=True)
    before = dict(os.environ)
    yield path
    os.environ.clear()
    os.environ.update(before)


def test_the_server_looks_where_the_file_says(
    file: Path, models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(f'model_path = ["{models}"]\nexclude = ["org/mine"]\n')
    seen = []

    def serve(_: Live, session: hf_overlay.Session) -> int:
        seen.append((session.settings.roots, session.settings.exclude))
        return 0

    monkeypatch.setattr(run, "_serve_http", serve)
    monkeypatch.setattr(logs, "set_up", lambda *_: None)
    assert run.serve(Live(Settings())) == 0
    assert seen == [((str(models),), ("org/mine",))]


def test_a_mistake_in_the_file_is_a_usage_error_of_the_server(file: Path, home: Path) -> None:
    file.write_text("port = 3\n")
    done = finish([PYTHON, "-P", "-m", "mlx_overlay_server", "--port", "0"], environment(home))
    assert done.status == 2
    assert f"error: {file}:1: there is no setting 'port'" in done.err
    assert "Traceback" not in done.err
