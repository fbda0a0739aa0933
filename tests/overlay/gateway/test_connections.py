"""Connections to the gateway: none is cut silently, and none keeps another, or the end, waiting."""

from __future__ import annotations

import http.client
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from hf_overlay.gateway import server as gateway_server
from hf_overlay.gateway.server import Gateway

from tests.support.processes import SECONDS, eventually

_PIECE = b"x" * 100_000


class _NoModels:
    """A session in which every id is the Hub's to answer."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def _read_request(hub: socketserver.StreamRequestHandler) -> bytes:
    """A request's head, and as much of its body as Content-Length says."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = hub.rfile.readline()
        if not line:
            return b""
        head += line
    lengths = [line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    return head + (hub.rfile.read(int(lengths[0])) if lengths else b"")


@contextmanager
def gateway_to(answer: Callable[[socketserver.StreamRequestHandler, bytes], object]) -> Iterator[Gateway]:
    """A gateway to a Hub that answers each request by a function, which writes to the connection what it likes."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while request := _read_request(self):
                answer(self, request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the gateway has hung up

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        session: Any = _NoModels()
        gateway = Gateway(session, f"http://127.0.0.1:{server.server_address[1]}")
        gateway.start()
        try:
            yield gateway
        finally:
            gateway.stop()
            server.shutdown()


def connect(gateway: Gateway) -> tuple[http.client.HTTPConnection, str]:
    """A connection, and what its paths begin with."""
    url = urlsplit(gateway.endpoint)
    return http.client.HTTPConnection(url.netloc, timeout=SECONDS), url.path


def get(gateway: Gateway, path: str = "/api/x") -> bytes:
    connection, prefix = connect(gateway)
    try:
        connection.request("GET", prefix + path)
        return connection.getresponse().read()
    finally:
        connection.close()


def raw(gateway: Gateway, data: bytes) -> socket.socket:
    """A connection on which some bytes have been sent, in which PATH stands for a path below the gateway's own."""
    url = urlsplit(gateway.endpoint)
    connection = socket.create_connection((url.hostname, url.port), SECONDS)
    connection.sendall(data.replace(b"PATH", f"{url.path}/api/x".encode()))
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


# Bodies that break off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "framing",
    [b"Content-Length: 300000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n186A0\r\n"],
    ids=["length", "chunks"],
)
def test_a_body_that_the_hub_breaks_off_is_no_whole_one_for_the_program(framing: bytes) -> None:
    def break_off(hub: socketserver.StreamRequestHandler, _: bytes) -> None:
        hub.wfile.write(b"HTTP/1.1 200 OK\r\n" + framing + _PIECE)
        raise ConnectionAbortedError

    with gateway_to(break_off) as gateway:
        with pytest.raises(http.client.IncompleteRead):
            get(gateway)
        with pytest.raises(ConnectionResetError):  # by HTTP/1.0, where a body may end with its connection
            read_all(raw(gateway, b"GET PATH HTTP/1.0\r\n\r\n"))


def test_a_body_is_passed_on_while_it_comes_in() -> None:
    """A program sees each piece at once, however small."""
    goes_on = threading.Event()

    def slowly(hub: socketserver.StreamRequestHandler, _: bytes) -> None:
        hub.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nfir")
        goes_on.wait(SECONDS)
        hub.wfile.write(b"st!")

    with gateway_to(slowly) as gateway:
        connection, prefix = connect(gateway)
        connection.request("GET", f"{prefix}/api/x")
        answer = connection.getresponse()
        assert answer.read(3) == b"fir"
        goes_on.set()
        assert answer.read() == b"st!"
        connection.close()


def test_a_program_that_leaves_in_the_middle_of_a_body_frees_the_connection_to_the_hub() -> None:
    is_free = threading.Event()

    def for_ever(hub: socketserver.StreamRequestHandler, _: bytes) -> None:
        try:
            hub.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n\r\n")
            for _piece in range(100_000):
                hub.wfile.write(_PIECE)
        except OSError:
            is_free.set()
            raise

    with gateway_to(for_ever) as gateway:
        connection, prefix = connect(gateway)
        connection.request("GET", f"{prefix}/api/x")
        assert connection.getresponse().read(10) == b"x" * 10
        connection.close()
        assert is_free.wait(SECONDS)


# Requests ---------------------------------------------------------------------------------------------------------


def _echo(hub: socketserver.StreamRequestHandler, request: bytes) -> None:
    body = request.partition(b"\r\n\r\n")[2]
    hub.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def test_a_connection_takes_one_request_after_the_other_also_when_they_come_together() -> None:
    with gateway_to(_echo) as gateway:
        both = b"POST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\none"
        last = b"POST PATH HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\n\r\ntwo"
        said = read_all(raw(gateway, both + last))
        assert said.count(b"HTTP/1.1 200") == 2
        assert said.index(b"one") < said.index(b"two")


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_arrive_unchanged_in_both_directions(chunked: bool) -> None:
    """Also at a program that reads slowly at first, while buffers fill up on the way."""

    def answer(hub: socketserver.StreamRequestHandler, request: bytes) -> None:
        body = request.partition(b"\r\n\r\n")[2]
        head = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
        hub.wfile.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        for at in range(0, len(body), 70_000):
            piece = body[at : at + 70_000]
            hub.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        hub.wfile.write(b"0\r\n\r\n" if chunked else b"")

    sent = os.urandom(8_000_000)
    with gateway_to(answer) as gateway:
        connection, prefix = connect(gateway)
        for _ in range(2):
            connection.request("POST", f"{prefix}/api/x", sent)
            reply = connection.getresponse()
            got = [reply.read(1000)]
            time.sleep(0.2)
            assert b"".join([*got, reply.read()]) == sent
        connection.close()


def test_a_program_that_waits_to_be_told_sends_its_body_then() -> None:
    """`Expect: 100-continue`, as curl sends it before uploads."""
    with gateway_to(_echo) as gateway:
        head = b"PUT PATH HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"
        connection = raw(gateway, head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(b"body")
        assert read_all(connection).endswith(b"\r\n\r\nbody")


def test_a_program_whose_body_nobody_wants_gets_the_answer_all_the_same() -> None:
    """It sends the whole before it reads: closing the connection meanwhile would take the answer away."""
    with gateway_to(_echo) as gateway:
        connection, _ = connect(gateway)
        for _ in range(2):
            connection.request("POST", "/not-the-secret", _PIECE * 50)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (404, b'{"error":"no such page"}')
        connection.close()


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000]
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with gateway_to(_echo) as gateway:
        connection = raw(gateway, data + b"\r\n\r\n")
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 431")
        connection.close()
        assert get(gateway) == b""


def test_an_overlay_in_one_that_has_ended_says_so_to_programs() -> None:
    """P12: not that some address, which is the other one's secret, cannot be reached."""
    session: Any = _NoModels()
    gateway = Gateway(session, f"http://127.0.0.1:9/{'a' * 40}")
    gateway.start()
    try:
        connection, prefix = connect(gateway)
        connection.request("GET", f"{prefix}/api/whoami-v2")
        answer = connection.getresponse()
        assert (answer.status, b"the overlay that hf-overlay was started in has ended" in answer.read()) == (504, True)
        connection.close()
    finally:
        gateway.stop()


def test_programs_that_no_thread_can_be_had_for_are_refused_and_later_ones_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with gateway_to(_echo) as gateway:
        assert get(gateway) == b""
        with monkeypatch.context() as patch:
            start = threading.Thread.start

            def refuse(thread: threading.Thread) -> None:
                if thread.name == "hub-gateway-answer":
                    raise RuntimeError("can't start new thread")
                start(thread)

            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
                get(gateway)
        assert get(gateway) == b""


# The end ----------------------------------------------------------------------------------------------------------


def test_neither_idle_programs_nor_those_that_have_left_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_server, "STOP_SECONDS", 2 * SECONDS)
    is_asked, is_over = threading.Event(), threading.Event()

    def hang(hub: socketserver.StreamRequestHandler, _: bytes) -> None:
        is_asked.set()
        is_over.wait(3 * SECONDS)

    with gateway_to(hang) as gateway:
        idle = raw(gateway, b"")
        leaves = raw(gateway, b"GET PATH HTTP/1.1\r\nHost: x\r\n\r\n")
        assert is_asked.wait(SECONDS)
        leaves.close()
        began = time.monotonic()
        gateway.stop()
        assert time.monotonic() - began < SECONDS
        assert idle.recv(1) == b""
        idle.close()
        is_over.set()


def test_while_it_stops_a_program_gets_its_answer_and_learns_that_no_other_follows() -> None:
    is_asked, goes_on = threading.Event(), threading.Event()

    def later(hub: socketserver.StreamRequestHandler, request: bytes) -> None:
        is_asked.set()
        goes_on.wait(SECONDS)
        _echo(hub, request)

    with gateway_to(later) as gateway:
        connection = raw(gateway, b"POST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\none")
        assert is_asked.wait(SECONDS)
        stopping = threading.Thread(target=gateway.stop)
        stopping.start()
        eventually(lambda: gateway._stopping.fileno() == -1, "it stops")
        goes_on.set()
        said = read_all(connection)
        assert b"connection: close" in said.lower()
        assert said.endswith(b"one")
        stopping.join(SECONDS)
        assert not stopping.is_alive()
