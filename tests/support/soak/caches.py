"""Many conversations, one after the other and several at once, at a server with little room for their KV caches.

P14: memory is counted as it is held. Once the prefix cache has been filled, the server's resident memory stays where it
is, however many conversations follow. `held` is by how many MiB it has grown, `lost` counts requests without an answer.
"""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx2

from tests.support.models import make_random_model
from tests.support.server import Server, serving
from tests.support.soak import Row, took

MODEL = "org/model"
BUDGET = 20
"""MB that KV caches of earlier prompts may take."""
GROWTH = 100
"""MiB that a process may grow by while nothing more is kept: allocators keep some of what they had."""
AT_ONCE = 16
GIVEN_UP = 30.0


def run(place: Path, seconds: float, random: Random) -> Row:
    """Fill the cache in the first third of the time, then look how memory goes on."""
    make_random_model(place / "models" / MODEL)
    rows: list[float | None] = []
    options = ["--offline", "--prompt-cache", f"{BUDGET}M"]
    with (
        serving(place / "home", place / "models", options=options) as server,
        ThreadPoolExecutor(AT_ONCE) as clients,
    ):
        started = time.monotonic()
        filled: int | None = None
        while filled is None or took(started) < seconds:
            prompts = [_prompt(random) for _ in range(AT_ONCE)]
            rows += clients.map(lambda prompt: _ask(server, prompt), prompts)
            if filled is None and took(started) > seconds / 3:
                filled = _resident(server)
        grown = max(0, _resident(server) - filled)
    answered = [row for row in rows if row is not None]
    lost = len(rows) - len(answered)
    broken = [f"P14: {grown} MiB more than when the cache was filled"] if grown > GROWTH else []
    broken += [f"P14: {lost} requests were not answered"] if lost else []
    return Row(len(rows), lost, max(answered, default=GIVEN_UP), grown, tuple(broken))


def _prompt(random: Random) -> str:
    return " ".join(random.choice(["bake", "bami", "kilo"]) for _ in range(random.randrange(10, 80)))


def _ask(server: Server, prompt: str) -> float | None:
    """Seconds until the whole answer was there; None where there was none."""
    started = time.monotonic()
    request = {"model": MODEL, "prompt": prompt, "max_tokens": 8}
    try:
        answer = server.http.post("/v1/completions", json=request, timeout=GIVEN_UP)
    except httpx2.HTTPError:
        return None
    return took(started) if answer.status_code == 200 else None


def _resident(server: Server) -> int:
    """MiB of the server's memory."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(server.process.pid)], capture_output=True, check=True)
    return int(done.stdout) // 1024
