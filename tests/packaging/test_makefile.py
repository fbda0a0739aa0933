"""The Makefile's targets that do more than call one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


@pytest.mark.parametrize("target", ["make", "server"])
def test_sigterm_to_make_serve_or_to_its_child_ends_both(target: str, models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    variables = [f"BIN={Path(sys.executable).parent}", f"MODEL_PATH={models}", "ARGS=--port 0 --offline"]
    command = ["make", "-C", str(ROOT), "--assume-old=.venv/.ready", "serve", *variables]
    with log.open("wb") as output:
        make = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: "listening on" in log.read_text(), "the server does not listen")
        children = subprocess.run(["pgrep", "-P", str(make.pid)], capture_output=True, text=True, check=True)
        server = int(children.stdout)

        os.kill(make.pid if target == "make" else server, signal.SIGTERM)

        make.wait(SECONDS)
        wait_for(lambda: not is_alive(server), "the server outlived make")
        assert "stopping" in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGKILL)
        make.wait()


def wait_for(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
