"""A server that is told to stop before it has started ends at once, with exit code 0, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import hubs
from tests.support.processes import PYTHON, SECONDS, environment, start


@pytest.mark.parametrize("after", [0.4, 0.8, 1.6], ids=["importing", "preparing", "starting the engine"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_exits_0_and_its_session_goes(tmp_path: Path, number: signal.Signals, after: float) -> None:
    sessions = tmp_path / "sessions"
    environ = environment(tmp_path, **hubs.environment(hubs.INSTALLED), HF_OVERLAY_DIR=str(sessions))
    log = tmp_path / "server.log"
    command = [PYTHON, "-m", "mlx_overlay_server", "--port", "0"]
    with log.open("wb") as stderr, start(command, environ, stderr=stderr, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + SECONDS
        while not sessions.exists() and time.monotonic() < until:  # it has begun
            time.sleep(0.01)
        time.sleep(after)
        process.send_signal(number)
        assert process.wait(SECONDS) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list(sessions.glob("session-*")), "the server left its session behind"
