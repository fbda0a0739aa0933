"""The gateway listens at once, and what answers is imported when the first program connects."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from hf_overlay.gateway.server import Gateway

from tests.support.processes import SECONDS


def _gateway() -> Gateway:
    no_models: Any = None  # asked for none of them here
    return Gateway(no_models, "http://127.0.0.1:9")


def _connect(gateway: Gateway) -> socket.socket:
    """A connection that has sent a request, which is answered without a model."""
    url = urlsplit(gateway.endpoint)
    connection = socket.create_connection((url.hostname, url.port), SECONDS)
    connection.sendall(b"GET /favicon.ico HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    return connection


def _read(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(4096):
        answer += piece
    return answer


def test_a_gateway_that_nobody_asks_imports_nothing_and_ends_at_once() -> None:
    script = (
        "import sys, threading\n"
        "from hf_overlay.gateway.server import Gateway\n"
        "gateway = Gateway(None, 'http://127.0.0.1:9')\n"
        "gateway.start()\n"
        "gateway.stop()\n"
        "heavy = {'asyncio', 'ssl', 'h11', 'urllib3', 'http.client'}\n"
        "print(heavy & set(sys.modules), threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set() 1\n", "")


def test_it_can_be_stopped_twice() -> None:
    gateway = _gateway()
    gateway.start()
    gateway.stop()
    gateway.stop()


@pytest.mark.parametrize("how", ["stop", "cut"])
def test_a_request_that_came_while_it_was_starting_is_answered_before_it_stops_unless_it_is_cut(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    serve = Gateway._serve

    def slowly(self: Gateway) -> None:
        begun.set()
        go_on.wait(2 * SECONDS)
        serve(self)

    monkeypatch.setattr(Gateway, "_serve", slowly)
    gateway = _gateway()
    gateway.start()
    with _connect(gateway) as connection:
        assert begun.wait(SECONDS)
        stopping = threading.Thread(target=gateway.stop)
        stopping.start()
        if how == "cut":
            gateway.cut()
            stopping.join(SECONDS)
            assert not stopping.is_alive(), "it waits in spite of the cut"
            go_on.set()
            return
        time.sleep(0.1)
        assert stopping.is_alive(), "it does not wait for the request"
        go_on.set()
        assert _read(connection).startswith(b"HTTP/1.1 404 "), "P3 is broken: the request was cut"
        stopping.join(SECONDS)
        assert not stopping.is_alive()


def test_where_it_cannot_start_clients_are_refused_and_the_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setitem(sys.modules, "hf_overlay.gateway.connection", None)
    gateway = _gateway()
    gateway.start()
    with pytest.raises(ConnectionError), _connect(gateway) as connection:
        _read(connection)  # else it would wait for `SECONDS`
    gateway._thread.join(SECONDS)
    assert seen[0].exc_type is ModuleNotFoundError
    gateway.stop()
