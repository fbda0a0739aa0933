"""Connections that send no request are closed, so that they never keep others out."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.processes import SECONDS

_SECONDS = 1.0
"""In which a head has to be complete here."""

_SERVER = f"""
import resource, socket, sys
import uvicorn
from mlx_overlay_server.api.connection import Connection

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
Connection.head_seconds = {_SECONDS}

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    body = str(cpu.ru_utime + cpu.ru_stime).encode()
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}})
    await send({{"type": "http.response.body", "body": body}})

listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
print(listening.getsockname()[1], flush=True)
config = uvicorn.Config(app, http=Connection, lifespan="off", log_level="critical", timeout_keep_alive=75)
uvicorn.Server(config).run(sockets=[listening])
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that has 64 file descriptors, and answers with the seconds of CPU time it has used."""
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


def _closes(sock: socket.socket) -> bool:
    """Wait for the other end to close it; TimeoutError if it does not."""
    with contextlib.suppress(ConnectionResetError):
        return sock.recv(1) == b""
    return True


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_is_not_complete_in_time_closes_its_connection(sent: bytes, port: int) -> None:
    began = time.monotonic()
    with _connected(port) as sock:
        sock.sendall(sent)
        assert _closes(sock)
        assert time.monotonic() - began > 0.5 * _SECONDS


def test_bytes_that_trickle_do_not_put_the_end_off(port: int) -> None:
    with _connected(port) as sock:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            sock.sendall(b"GET / HTTP/1.1\r\nX")
            while time.monotonic() - started < SECONDS:
                time.sleep(0.1)
                sock.sendall(b"x")
            pytest.fail("a head that trickles is waited for")


def test_a_connection_that_is_kept_may_be_idle_but_no_later_head_may_be_slow(port: int) -> None:
    with _connected(port) as sock:
        for pause in (0, 1.5 * _SECONDS):
            time.sleep(pause)
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert (answer.status, answer.read() != b"") == (200, True)
        began = time.monotonic()
        sock.sendall(b"GET / ")
        assert _closes(sock)
        assert time.monotonic() - began > 0.5 * _SECONDS


def test_a_slow_body_is_waited_for(port: int) -> None:
    with _connected(port) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n")
        time.sleep(1.5 * _SECONDS)
        sock.sendall(b"x")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")


def test_more_silent_connections_than_file_descriptors_keep_nobody_out_for_long(port: int) -> None:
    def cpu_seconds() -> float:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        with contextlib.closing(client):
            client.request("GET", "/")
            return float(client.getresponse().read())

    before = cpu_seconds()
    with contextlib.ExitStack() as silent:
        for _ in range(200):
            silent.enter_context(_connected(port))
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                used = cpu_seconds() - before
                break
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < deadline, "silent connections keep others out"
                time.sleep(0.2)
    assert used < 3, f"waiting for file descriptors took {used} s of CPU time"
