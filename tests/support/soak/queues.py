"""Many who ask for models that nobody has, or that have no room, at a server that others use meanwhile.

P13: a model in memory answers within `DEADLINE` whatever waits. `lost` counts answers that a good client did not get,
`held` the processes for look-ups that the server has in the end, `waited` is the longest answer of the good client.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx2

from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model, make_random_model
from tests.support.processes import SECONDS, due
from tests.support.server import Server, serving
from tests.support.soak import Row
from tests.support.stalls import longest_stall

MODEL, SAYS = "org/model", "Paris is the capital of France."
LARGE = ("org/large-1", "org/large-2")
"""Two models of which only one has room at once beside the first."""
DEADLINE = 10.0
"""Seconds in which a resident model answers, on a machine whose processors all have other work."""
STALLED = 0.25
"""Seconds that the event loop may be kept busy by one thing, in processor time."""
AT_ONCE = 40
MOST_CHILDREN = 8
"""Processes that the server may start at once: four look-ups and four downloads."""


def run(place: Path, seconds: float, random: Random) -> Row:
    """Ask for unknown and for large models, and leave early, while a good client asks one question after the other."""
    make_model(place / "models" / MODEL, SAYS)
    for name in LARGE:
        make_random_model(place / "models" / name)
    sizes = [sum(each.stat().st_size for each in (place / "models" / name).glob("*.safetensors")) for name in LARGE]
    small = sum(each.stat().st_size for each in (place / "models" / MODEL).glob("*.safetensors"))
    options = ["--model", MODEL, "--memory-budget", str(small + max(sizes) + min(sizes) // 2)]
    home, stall = place / "home", place / "stall"
    waits: list[float] = []
    lost = tried = most = 0
    with (
        LoopbackHub() as hub,
        serving(
            home,
            place / "models",
            options=options,
            environ=hub.environment(home) | {"HF_HUB_OFFLINE": "0"},
            program=("tests.support.stalls", str(stall)),
        ) as at,
        # One for all: making another for each request would keep this process busy, and with it the good client.
        httpx2.Client(base_url=at.url, trust_env=False, limits=httpx2.Limits(max_connections=AT_ONCE)) as others,
        ThreadPoolExecutor(AT_ONCE) as clients,
    ):
        assert at.chat(MODEL, "Hi", max_tokens=32).choices[0].message.content == SAYS
        ends = time.monotonic() + seconds
        over = threading.Event()

        def ask(seed: int) -> int:
            draw, count = Random(seed), 0
            while not over.is_set():
                model = draw.choice((*LARGE, f"org/unknown-{draw.randrange(10**6)}"))
                _ask(others, model, draw.choice((0.2, 2.0, 10.0)))
                count += 1
            return count

        asking = [clients.submit(ask, random.randrange(2**32)) for _ in range(AT_ONCE)]
        while not waits or time.monotonic() < ends:
            began = time.monotonic()
            lost += _ask(at.http, MODEL, SECONDS) != SAYS
            waits.append(time.monotonic() - began)
            most = max(most, _children(at))
        over.set()
        tried = sum(each.result() for each in asking)
        time.sleep(2)  # the last look-ups end
        held = _children(at)
        stalled = longest_stall(stall)
    broken = []
    if max(waits) > due(DEADLINE):
        broken.append(f"P13: a model in memory answered after {max(waits):.1f} s")
    if stalled > STALLED:
        broken.append(f"P13: something kept the event loop busy for {stalled:.2f} s at once")
    if most > MOST_CHILDREN:
        broken.append(f"P13: the server had {most} processes at once")
    return Row(tried, lost, max(waits), held, tuple(broken))


def _ask(client: httpx2.Client, model: str, seconds: float) -> str | None:
    """Ask for a few tokens, and return the answer; None when there was none in time."""
    body = {"model": model, "max_tokens": 32, "messages": [{"role": "user", "content": "Hi"}]}
    try:
        answer = client.post("/v1/chat/completions", json=body, timeout=seconds)
    except httpx2.HTTPError:
        return None
    if answer.status_code != 200:
        return None
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def _children(server: Server) -> int:
    """Return how many processes the server has started that still run; 0 where there is no /proc to tell."""
    tasks = Path("/proc", str(server.process.pid), "task")
    try:
        return sum(len((task / "children").read_text().split()) for task in tasks.iterdir())
    except OSError:
        return 0
