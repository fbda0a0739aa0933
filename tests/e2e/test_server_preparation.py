"""P13: preparing one request never keeps the others waiting, ends when its client leaves, and has a deadline."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import SECONDS, due, eventually
from tests.support.server import Server, serving
from tests.support.soak.requests import (
    HOSTILE,
    LARGE,
    LOOP,
    MODEL,
    STALLED,
    WAITED,
    Body,
    besieged,
    chat,
    count_tokens,
    first_token,
    make_patient_model,
    schema,
    warm_up,
)
from tests.support.stalls import longest_stall


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patient") / "models"
    make_patient_model(folder)
    return folder


@pytest.fixture(scope="module")
def stall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that holds the longest stall of the server's event loop."""
    return tmp_path_factory.mktemp("stall") / "stall"


@pytest.fixture(scope="module")
def server(models: Path, stall: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("home"),
        models,
        options=["--preparation-seconds", "60"],
        program=("tests.support.stalls", str(stall)),
    ) as server:
        warm_up(server)
        yield server


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_keeps_nobody_waiting(name: str, server: Server, stall: Path) -> None:
    with besieged(server, HOSTILE[name](), clients=3):
        waits = [first_token(server) for _ in range(10)]
    assert max(waits) < due(WAITED), f"P13: {name} kept others waiting for {max(waits):.2f} s"
    assert longest_stall(stall) < STALLED, f"P13: {name} kept the event loop busy for {longest_stall(stall):.2f} s"


@pytest.mark.parametrize("name", LARGE)
def test_large_requests_keep_the_event_loop_for_one_step_at_a_time(name: str, server: Server, stall: Path) -> None:
    """Several at once: each of them in steps, and what is small in between."""
    with besieged(server, LARGE[name](), clients=3):
        for _ in range(3):
            first_token(server)
    assert longest_stall(stall) < STALLED, f"P13: {name} kept the event loop busy for {longest_stall(stall):.2f} s"


def test_what_clients_that_left_had_asked_for_is_stopped(server: Server) -> None:
    with besieged(server, chat(LOOP), clients=4):
        time.sleep(0.5)
    begun = time.monotonic()  # a long text waits until slow work before it has ended
    assert count_tokens(server, "bake " * 60_001) > 1000
    assert time.monotonic() - begun < due(20), "P13: the preparation of clients that left goes on"


def test_many_answers_share_one_large_grammar(server: Server) -> None:
    asked = chat("Go", n=32, response_format=schema(300))
    first, second = (server.http.post("/v1/chat/completions", json=asked) for _ in range(2))
    assert (first.status_code, second.status_code) == (200, 200), first.text
    assert len(second.json()["choices"]) == 32


@pytest.mark.slow
def test_preparation_that_takes_too_long_is_refused(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "home", models, options=["--preparation-seconds", "0.5"]) as server:
        first_token(server)
        turn = [{"role": "user", "content": LOOP}]
        for path, body in (
            ("/v1/chat/completions", {"messages": turn}),
            ("/v1/messages/count_tokens", {"messages": turn}),
        ):
            answer = server.http.post(path, json={"model": MODEL, **body})
            assert answer.status_code == 400, f"{path}: {answer.text}"
            assert "too expensive" in answer.json()["error"]["message"]
        first_token(server)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "clients"), [(chat(LOOP), 3), (LARGE["10,000 tools"](), 24)], ids=["endless", "many large ones"]
)
def test_a_server_that_prepares_much_stops_in_time(models: Path, tmp_path: Path, body: Body, clients: int) -> None:
    with serving(tmp_path / "home", models, options=["--shutdown-seconds", "1"]) as server:
        first_token(server)
        with besieged(server, body, clients):
            time.sleep(0.5)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(SECONDS) == 0, server.log()
            took = time.monotonic() - begun
        assert took < due(1 + 5), f"P13: SIGTERM took {took:.1f} s"
        eventually(lambda: not _lives(server.process.pid), "no process of the server is left")


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_process_behind(models: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the server exited -9"):
        _killed_in_the_middle(models, tmp_path)


def _killed_in_the_middle(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "home", models) as server:
        first_token(server)
        with besieged(server, chat(LOOP), clients=1):
            server.process.kill()
            server.process.wait(SECONDS)
        eventually(lambda: not _lives(server.process.pid), "no process of the server is left")


def _lives(group: int) -> bool:
    """Whether a process of the server's group runs; the server is the leader of its own."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
