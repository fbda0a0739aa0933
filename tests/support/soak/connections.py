"""Connections as no client should make them, drawn at random, at a server that answers its other clients meanwhile.

P13: `/health` answers within a second all the time, and no request is answered with a 5xx other than 503. `lost`
counts answers that a good client did not get, `held` the files that the server still has open in the end beyond those
that it had at first (where the system tells).
"""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx2

from tests.support.models import make_model
from tests.support.processes import due
from tests.support.server import Server, serving
from tests.support.soak import Row, took

MODEL, SAYS = "org/model", "Paris is the capital of France."
DEADLINE = 1.0
"""Seconds in which /health answers."""
GIVEN_UP = 60.0
HALF_OPEN_PER_SECOND = 40
"""Connections that say half of a request and stay: more than a process may have open files, in a minute's run."""
HELD = 20
"""Open files that the server may keep for reasons of its own."""
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/models",
    "/health",
    "/nowhere",
)
VALUES: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "x" * 5000,
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    {"type": "text"},
    [{}],
)
FIELDS = (
    *("messages", "prompt", "input", "max_tokens", "stop", "tools", "tool_choice", "response_format", "n", "stream"),
    *("temperature", "top_p", "seed", "logit_bias", "logprobs", "system", "stream_options", "thinking"),
)


class Place(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


def run(place: Path, seconds: float, random: Random) -> Row:
    """Do one thing after the other to a server, which others ask at the same time."""
    make_model(place / "models" / MODEL, SAYS)
    tried = lost = 0
    broken: list[str] = []
    with serving(place / "home", place / "models", options=["--offline"]) as server, ExitStack() as open_ones:
        url = urlsplit(server.url)
        at = Place(str(url.hostname), int(url.port or 0))
        assert server.chat(MODEL, "Hi", max_tokens=32).choices[0].message.content == SAYS
        before = _open_files(server)
        with _asking(server) as waits:
            ends = time.monotonic() + seconds
            _be_half_open(open_ones, at, int(HALF_OPEN_PER_SECOND * seconds), random)
            while time.monotonic() < ends:
                tried += 1
                attack = random.choice(ATTACKS)
                if fault := attack(at, random):
                    broken.append(f"P13: {fault}")
                if tried % 10 == 0 and not _is_served(server):
                    lost += 1
        open_ones.close()
        held = _left(server, before)
    waited = max(waits, default=GIVEN_UP)
    if waited > due(DEADLINE):
        broken.append(f"P13: /health answered after {waited:.1f} s")
    if lost:
        broken.append(f"P13: {lost} good requests were not answered")
    if held > HELD:
        broken.append(f"P13: {held} files are still open when all clients have left")
    return Row(tried, lost, waited, held, tuple(broken))


@contextmanager
def _asking(server: Server) -> Iterator[list[float]]:
    """Ask /health ten times a second, on a new connection each time: how long each answer took."""
    waits: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(0.1):
            started = time.monotonic()
            try:
                is_well = httpx2.get(f"{server.url}/health", timeout=GIVEN_UP, trust_env=False).status_code == 200
            except httpx2.HTTPError:
                is_well = False
            waits.append(took(started) if is_well else GIVEN_UP)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield waits
    finally:
        is_over.set()
        thread.join()


def _is_served(server: Server) -> bool:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 32}
    try:
        answer = server.http.post("/v1/chat/completions", json=request, timeout=GIVEN_UP)
    except httpx2.HTTPError:
        return False
    return answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == SAYS


def _open_files(server: Server) -> int:
    folder = f"/proc/{server.process.pid}/fd"
    return len(os.listdir(folder)) if os.path.isdir(folder) else 0


def _left(server: Server, before: int) -> int:
    """Open files beyond those that there were before, after some time in which they may be closed."""
    ends = time.monotonic() + GIVEN_UP
    while (left := _open_files(server) - before) > HELD and time.monotonic() < ends:
        time.sleep(0.1)
    return max(0, left)


# Attacks ---------------------------------------------------------------------------------------------------------


def _be_half_open(open_ones: ExitStack, at: Place, number: int, random: Random) -> None:
    """Open connections that say a part of a request and nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, number + 200), hard))
        open_ones.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    for _ in range(number):
        try:
            one = open_ones.enter_context(socket.create_connection(at, timeout=GIVEN_UP))
            one.sendall(_head(at, "/v1/models", 0)[: random.randrange(40)])
        except OSError:  # the server refuses more of them, as it may
            return


def _head(at: Place, path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: {at.host}:{at.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def _said(at: Place, *parts: bytes, patience: float = 2.0) -> bytes:
    """Say something on a new connection; what comes back until it is closed, or nothing more comes for a while."""
    received = b""
    try:
        with socket.create_connection(at, timeout=GIVEN_UP) as one:
            one.settimeout(patience)
            for part in parts:
                one.sendall(part)
            one.shutdown(socket.SHUT_WR)
            while part := one.recv(65536):
                received += part
    except OSError:
        pass
    return received


def _fault(answer: bytes, asked: str) -> str:
    """What is wrong with an answer, if anything is."""
    status = answer.split(b" ", 2)[1:2] if answer.startswith(b"HTTP/") else [b""]
    is_wrong = status[0].startswith(b"5") and status[0] != b"503"
    return f"{status[0].decode()} for {asked[:200]!r}" if is_wrong else ""


def _garbage(at: Place, random: Random) -> str:
    data = random.choice(
        [
            random.randbytes(random.randrange(2000)),
            b"GET " + b"/" * random.randrange(100_000) + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * random.randrange(5000) + b"\r\n",
            b"POST /v1/messages HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/messages HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/messages HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
            b"GET /health HTTP/9.9\r\nHost: \xff\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ]
    )
    return _fault(_said(at, data), repr(data[:80]))


def _malformed(at: Place, random: Random) -> str:
    """A request of the right form with fields that may be anything."""
    fields = {name: random.choice(VALUES) for name in random.sample(FIELDS, random.randrange(1, 5))}
    body = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}], **fields}
    data = json.dumps(body).encode()
    if random.random() < 0.3:
        data = data[: random.randrange(len(data))] + random.randbytes(random.randrange(5))
    path = random.choice(PATHS)
    return _fault(_said(at, _head(at, path, len(data)), data), f"{path} {json.dumps(fields)}")


def _gone(at: Place, random: Random) -> str:
    """A client that leaves while it is answered, or before it has said all."""
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": random.random() < 0.7}
    data = json.dumps(request).encode()
    length = len(data) + random.choice([0, 0, 100])
    try:
        with socket.create_connection(at, timeout=GIVEN_UP) as one:
            one.sendall(_head(at, "/v1/chat/completions", length) + data)
            time.sleep(random.uniform(0, 0.05))
            if random.random() < 0.5:  # a reset, not an orderly end
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    except OSError as error:
        return f"no connection: {error}"
    return ""


ATTACKS: tuple[Callable[[Place, Random], str], ...] = (_garbage, _malformed, _malformed, _gone)
"""Each does one thing to a server, and returns what was wrong with its answer."""
