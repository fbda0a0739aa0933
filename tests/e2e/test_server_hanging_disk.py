"""A disk that dies while a model is loaded from it: the server answers, other models do, and it ends (P7, P13).

On a FUSE file system, which holds even a process that is killed: what reads weights first is a process of its own.
"""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import fuse_disk
from tests.support.folders import settle
from tests.support.models import make_model, make_random_model
from tests.support.processes import SECONDS, due
from tests.support.server import Server, serving
from tests.support.soak import took

SAYS = "Paris is the capital of France."
STOP_SECONDS = 1


def ask(server: Server, model: str) -> int:
    request = {"model": model, "prompt": "Hi", "max_tokens": 1}
    return server.http.post("/v1/completions", json=request, timeout=SECONDS).status_code


@pytest.mark.slow
def test_a_disk_that_dies_while_weights_are_read_holds_up_neither_health_nor_other_models_nor_the_end(
    tmp_path: Path,
) -> None:
    if (reason := fuse_disk.why_not()) is not None:
        pytest.skip(reason)
    make_model(tmp_path / "local/org/well", SAYS)
    for name in ("slow", "other"):
        settle(make_random_model(tmp_path / "behind/org" / name, hidden=256, layers=4, vocab=2048))
    options = ["--offline", "--shutdown-seconds", str(STOP_SECONDS)]
    with (
        fuse_disk.mounted(tmp_path / "behind", tmp_path / "nas") as disk,
        ThreadPoolExecutor() as clients,
        serving(tmp_path / "home", tmp_path / "local", tmp_path / "nas", options=options) as server,
    ):
        assert server.chat("org/well", "Hi").choices[0].message.content == SAYS
        for name in ("slow", "other"):
            disk.hang_at_weights()
            answer = clients.submit(ask, server, f"org/{name}")
            disk.has_hung()
            time.sleep(0.2)
            began = time.monotonic()
            health = server.http.get("/health")
            assert took(began) < due(1)
            assert (health.status_code, health.json()["status"]) == (200, "loading")
            assert health.json()["loading"] == [f"org/{name}"]
            began = time.monotonic()
            assert server.chat("org/well", "Hi").choices[0].message.content == SAYS
            assert took(began) < due(2)
            if name == "slow":
                disk.answer()
                assert answer.result(60) == 200, "it loads once the disk answers"
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 0
        assert took(began) < due(STOP_SECONDS + 5)
        assert answer.result(SECONDS) == 503
