"""P3: a tree is over only when no program uses it, so a download survives every way in which its session can end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from hf_overlay import Session, open_session
from hf_overlay.gateway import server as gateway_server

from tests.support import endings, hubs, server
from tests.support.endings import WAYS
from tests.support.loopback_hub import LoopbackHub
from tests.support.online import cached
from tests.support.processes import PYTHON, SECONDS, eventually, start

SLOWLY = 2_000
"""Bytes a second: the large file takes a hundred seconds, unless the hub is healed."""


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


@pytest.mark.mlx_lm
def test_a_download_outlives_the_server_that_was_killed(hub: LoopbackHub, tmp_path: Path) -> None:
    download = endings.make(hub, tmp_path / "home", "org/name", hubs.INSTALLED)
    hub.slow(SLOWLY, on=endings.LARGE)
    log = tmp_path / "log"
    command = [PYTHON, "-m", "mlx_overlay_server", "--port", "0"]
    with log.open("wb") as stderr, start(command, download.environ, stderr=stderr) as process:
        url = urlsplit(server._listening(process, log))
        with closing(HTTPConnection(url.netloc, timeout=SECONDS)) as client:
            body = json.dumps({"model": "org/name", "messages": [{"role": "user", "content": "Hi"}]})
            client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            eventually(download.is_under_way, "the large file is being sent")
            process.kill()
            process.wait(SECONDS)
        download.start_anything()
        assert (download.repo_id, endings.LARGE) not in hub.finished_files()
        hub.heal()
        eventually(lambda: cached(download.cache, "org/name") == download.files, "P3 is broken: the download was cut")
    download.start_anything()
    download.check_nothing_is_lost()


# The gateway --------------------------------------------------------------------------------------------------------


def test_a_gateway_that_is_stopped_lets_bodies_finish_and_takes_no_new_requests(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.add_repo("org/text", {"text.json": b"x" * 100_000})
    with open_session(environ=hub.environment(tmp_path), gateway=True) as session:
        hub.slow(SLOWLY)
        endpoint = urlsplit(session.environment["HF_ENDPOINT"])
        with closing(HTTPConnection(endpoint.netloc, timeout=SECONDS)) as client:
            client.request("GET", f"{endpoint.path}/api/resolve-cache/models/org/text/{commit_of(session)}/text.json")
            answer = client.getresponse()
            assert answer.read(1) == b"x"
            stopping = threading.Thread(target=session.stop)
            stopping.start()
            eventually(lambda: not accepts(endpoint.netloc), "it listens no more")
            assert stopping.is_alive(), "it waits for the body"
            hub.heal()
            assert len(answer.read()) == 99_999, "P3 is broken: the body was cut"
        stopping.join(SECONDS)
        assert not stopping.is_alive()


@pytest.mark.parametrize("how", ["in time", "cut"])
def test_a_gateway_that_is_stopped_waits_for_a_bounded_time(
    hub: LoopbackHub, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_server, "STOP_SECONDS", 0.5 if how == "in time" else 3600)
    hub.add_repo("org/text", {"text.json": b"x" * 100_000})
    with open_session(environ=hub.environment(tmp_path), gateway=True) as session:
        hub.slow(1000)  # for a hundred seconds
        endpoint = urlsplit(session.environment["HF_ENDPOINT"])
        with closing(HTTPConnection(endpoint.netloc, timeout=SECONDS)) as client:
            client.request("GET", f"{endpoint.path}/api/resolve-cache/models/org/text/{commit_of(session)}/text.json")
            assert client.getresponse().read(1) == b"x"
            began = time.monotonic()
            if how == "cut":
                threading.Timer(0.5, session.cut).start()
            session.stop()
            assert 0.4 < time.monotonic() - began < SECONDS / 2


def test_a_second_signal_ends_a_service_at_once(hub: LoopbackHub, tmp_path: Path) -> None:
    download = endings.make(hub, tmp_path / "home", "org/name", hubs.INSTALLED)
    hub.slow(0.2, on=endings.SMALL)  # which passes through the gateway, for two minutes
    with endings.serving(download) as (service, program):
        eventually(lambda: download.bytes_sent(endings.SMALL) > 0, "the gateway is sending")
        service.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            service.wait(1)
        service.send_signal(signal.SIGTERM)
        assert service.wait(gateway_server.STOP_SECONDS - 2) == 0
        program.kill()


def accepts(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def commit_of(session: Session) -> str:
    """The newest commit of org/text, as the gateway tells it."""
    with urlopen(f"{session.environment['HF_ENDPOINT']}/api/models/org/text/revision/main") as answer:
        return str(json.load(answer)["sha"])
