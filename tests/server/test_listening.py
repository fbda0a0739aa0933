"""Which addresses the server listens on."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from mlx_overlay_server import listening
from mlx_overlay_server.listening import listen, url

BOTH = ("::1", "127.0.0.1")


def _families() -> Iterator[str]:
    for address, family in (("::1", socket.AF_INET6), ("127.0.0.1", socket.AF_INET)):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind((address, 0))
                yield address
        except OSError:
            continue


needs_both = pytest.mark.skipif(tuple(_families()) != BOTH, reason="this machine has no IPv6")


@pytest.fixture
def localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` as it is on macOS: both families, IPv6 first."""

    def both(_host: str, port: int, **_: Any) -> list[Any]:
        six = (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", port, 0, 0))
        four = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))
        return [six, four, six]

    monkeypatch.setattr(socket, "getaddrinfo", both)


def closed(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


@needs_both
def test_localhost_is_answered_in_both_families_on_one_port(localhost: None) -> None:
    sockets = listen("localhost", 0)
    try:
        ports = {each.getsockname()[1] for each in sockets}
        assert [each.getsockname()[0] for each in sockets] == list(BOTH)
        assert len(ports) == 1
        for family, address in zip((socket.AF_INET6, socket.AF_INET), BOTH, strict=True):
            with socket.socket(family, socket.SOCK_STREAM) as client:
                client.connect((address, *ports))
        assert url("localhost", sockets) == f"http://localhost:{ports.pop()}"
    finally:
        closed(sockets)


@needs_both
def test_a_port_that_is_taken_in_one_family_is_taken(localhost: None) -> None:
    """Else half of all clients would talk to another program."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            listen("localhost", taken.getsockname()[1])


def test_a_family_that_the_machine_lacks_is_left_out(localhost: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = socket.socket

    def no_ipv6(family: int, *rest: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return original(family, *rest)

    monkeypatch.setattr(socket, "socket", no_ipv6)
    sockets = listen("localhost", 0)
    try:
        assert [each.getsockname()[0] for each in sockets] == ["127.0.0.1"]
        assert url("localhost", sockets).startswith("http://127.0.0.1:")
    finally:
        closed(sockets)


def test_another_free_port_is_tried_where_the_first_is_free_in_one_family_only(
    localhost: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def taken_twice(host: str, port: int) -> list[socket.socket]:
        tried.append(port)
        if len(tried) < 3:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return []

    monkeypatch.setattr(listening, "_listen", taken_twice)
    assert listen("localhost", 0) == []
    tried.clear()
    with pytest.raises(OSError, match="in use"):
        listen("localhost", 8080)
    assert tried == [8080]


def test_a_plain_address_is_the_only_one() -> None:
    sockets = listen("127.0.0.1", 0)
    try:
        [only] = sockets
        assert url("127.0.0.1", sockets) == f"http://127.0.0.1:{only.getsockname()[1]}"
    finally:
        closed(sockets)


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match=r"assign|available"):
        listen("192.0.2.1", 0)
