"""Hostile requests, each of which would keep a server busy for a long time, beside a client who measures its wait."""

from __future__ import annotations

import base64
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx2

from tests.support.models import make_random_model
from tests.support.processes import due
from tests.support.server import Server, serving
from tests.support.soak import Row
from tests.support.stalls import longest_stall

MODEL = "acme/patient"
"""Its template runs for hours on a conversation that holds `LOOP`; any other it renders at once."""
LOOP = "run for ever"
_ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

WAITED = 1.0
"""Seconds to a first token. The promise says a quarter; machines that run tests are busy."""
STALLED = 0.25
"""Seconds that the event loop may be kept busy by one thing, in processor time: on busy machines, too."""
DEADLINE = 5.0
"""Seconds to a first token in the campaign, on a machine whose processors all have other work."""

Body = dict[str, Any]


def make_patient_model(models: Path) -> Path:
    """Write the model that hostile requests are sent to; return its folder."""
    folder = make_random_model(models / MODEL, context=1 << 20)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    loop = "{% if messages[0]['content'] == '" + LOOP + "' %}" + _ENDLESS + "{% endif %}"
    config["chat_template"] = loop + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat(text: str, **more: Any) -> Body:
    """The body of a chat completion."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 4, **more}


def schema(properties: int) -> Body:
    """A response format whose grammar takes long to compile."""
    names = [f"property_{number}" for number in range(properties)]
    member = {"type": "string", "pattern": "^[a-z]{1,40}(-[a-z0-9]{1,40}){0,9}$"}
    described = {"type": "object", "properties": dict.fromkeys(names, member), "required": names}
    return {"type": "json_schema", "json_schema": {"name": "large", "schema": described}}


def bomb(side: int) -> str:
    """The data URL of a grey PNG of side x side pixels, which is a thousand times smaller than they are."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    row = bytes(side + 1)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = side.to_bytes(4, "big") * 2 + bytes((8, 0, 0, 0, 0))
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _tool(number: int) -> Body:
    return {"type": "function", "function": {"name": f"tool_{number}", "parameters": {}}}


def _image(data: str) -> Body:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


HOSTILE: Mapping[str, Callable[[], Body]] = {
    "template without end": lambda: chat(LOOP),
    "8 MB of blanks": lambda: chat(" " * 8_000_000),
    "schema of 3,000 properties, 128 answers": lambda: chat("Go", n=128, response_format=schema(3000)),
    "schemas that differ": lambda: chat("Go", n=8, response_format=schema(900 + time.monotonic_ns() % 100)),
    "a million small values": lambda: chat("Go", tools=[{"x": [0] * 1_000_000}]),
}
"""Bodies of chat completions, by what is hostile in them."""

LARGE: Mapping[str, Callable[[], Body]] = {
    "10,000 tools": lambda: chat("Hi", tools=[_tool(number) for number in range(10_000)]),
    "an image of 10 MB": lambda: chat("Hi") | {"messages": [{"role": "user", "content": [_image("A" * 10_000_000)]}]},
}
"""Bodies that are large and not hostile: to decode them keeps the event loop busy."""


def first_token(server: Server) -> float:
    """Ask for a short answer, and return the seconds to its first token. Raises what httpx2 and the server raise."""
    begun = time.monotonic()
    with server.http.stream("POST", "/v1/chat/completions", json=chat("Hi", stream=True)) as answer:
        assert answer.status_code == 200, answer.status_code
        for line in answer.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                return time.monotonic() - begun
    raise AssertionError("the answer has no token")


def warm_up(server: Server) -> None:
    """Wait until the server has all the processes that wait for requests: slow work begins only beside another one."""
    first_token(server)
    count_tokens(server, "bake " * 60_000)


def count_tokens(server: Server, text: str) -> int:
    """Let the server count the tokens of a user's message."""
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
    answer = server.http.post("/v1/messages/count_tokens", json=asked)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["input_tokens"])


@contextmanager
def besieged(server: Server, body: Body, clients: int) -> Iterator[None]:
    """Some clients send a request, and leave at the end without having read anything."""
    data = json.dumps(body).encode()
    host = httpx2.URL(server.url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host.host}:{host.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with ExitStack() as connections:
        for _ in range(clients):
            connection = connections.enter_context(socket.create_connection((host.host, host.port), timeout=60))
            connection.sendall(head.encode() + data)
        yield


def run(place: Path, seconds: float, random: Random) -> Row:
    """Send hostile requests of all kinds from some clients, while another one asks and measures how long it waits.

    The event loop's own stalls tell more than that wait, to which a busy machine adds. `held` counts sequences that are
    pending for clients that have left.
    """
    make_patient_model(place / "models")
    waits: list[float] = []
    lost, broken = 0, []
    bodies = {**HOSTILE, **LARGE}
    stall = place / "stall"
    with serving(place / "home", place / "models", program=("tests.support.stalls", str(stall))) as server:
        warm_up(server)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name = random.choice(sorted(bodies))
            with besieged(server, bodies[name](), clients=random.randint(1, 4)):
                for _ in range(10):
                    try:
                        waits.append(first_token(server))
                    except (AssertionError, httpx2.HTTPError):
                        lost += 1
                    else:
                        if waits[-1] > due(DEADLINE):
                            broken.append(f"P13: {name} kept another client waiting for {waits[-1]:.2f} s")
            if not broken and (stalled := longest_stall(stall)) > STALLED:
                broken.append(f"P13: {name} kept the event loop busy for {stalled:.2f} s at once")
        time.sleep(2)
        held = _pending(server)
    return Row(len(waits) + lost, lost, max(waits, default=0.0), held, tuple(broken))


def _pending(server: Server) -> int:
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("mlx_omni_pending_sequences "):
            return int(float(line.split()[1]))
    raise AssertionError("the metrics do not say how many sequences are pending")
