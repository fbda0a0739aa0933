"""The sockets that the server listens on: one for each address of its host, all on one port."""

from __future__ import annotations

import errno
import socket

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
"""Errors that mean that this machine has no such address, or no addresses of this family."""
_TRIES = 10
"""How often to look for a free port that is free at every address."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets at every address of a host; `localhost` has one for IPv6 and one for IPv4.

    Clients try either first. With port 0 the system chooses a port, which is the same at all addresses. Raises OSError.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            return _listen(host, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError  # the last try returns or raises


def url(host: str, sockets: list[socket.socket]) -> str:
    """Return the URL at which clients reach the server that listens on `sockets`."""
    name, port = sockets[0].getsockname()[:2]
    if len(sockets) > 1:
        name = host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def _listen(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, kind, protocol, address) for family, kind, protocol, _, address in found))
    listening: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, kind, protocol, address in addresses:
            try:
                # with the protocol, or uvicorn leaves Nagle's delay on
                opened = socket.socket(family, kind, protocol)
            except OSError as error:
                absent = _checked(error)
                continue
            listening.append(opened)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if (
                family == socket.AF_INET6 and len(addresses) > 1
            ):  # otherwise it might take the port of the IPv4 address, too
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                opened.bind((address[0], port, *address[2:]))
            except OSError as error:
                absent = _checked(error)
                listening.pop().close()
                continue
            port = opened.getsockname()[1]
            opened.listen(2048)
    except OSError:
        for each in listening:
            each.close()
        raise
    if not listening:
        raise absent or OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
    return listening


def _checked(error: OSError) -> OSError:
    """Return an error if it means that an address is not there. Raises any other."""
    if error.errno not in _ABSENT:
        raise error
    return error
