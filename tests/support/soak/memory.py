"""How much memory a server holds over many requests; for `docs/promises.md`, not a campaign of `make soak`.

`python -m tests.support.soak.memory 2000` prints the row.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.support.models import make_random_model
from tests.support.server import Server, serving

MODEL = "org/model"
AT_ONCE = 16
CACHE = 20
"""MB that KV caches of earlier prompts may take."""


class Memory(NamedTuple):
    """What a server held."""

    requests: int
    early_rss: int
    """Bytes of resident memory after a tenth of the requests."""
    final_rss: int
    """Bytes of resident memory at the end."""
    counted: int
    """Bytes of KV caches by the server's own count, at the end."""


def run(place: Path, requests: int) -> Memory:
    """Ask a server for answers to different prompts, some of them at once; needs /proc."""
    make_random_model(place / "models" / MODEL)
    options = ["--offline", "--prompt-cache", f"{CACHE}M"]
    with serving(place / "home", place / "models", options=options) as server, ThreadPoolExecutor(AT_ONCE) as clients:

        def ask(number: int) -> None:
            prompt = " ".join(f"{number}-{word}" for word in range(20 + number % 50))
            server.chat(MODEL, prompt, max_tokens=8, temperature=0)

        early = requests // 10
        list(clients.map(ask, range(early)))
        early_rss = _resident(server)
        list(clients.map(ask, range(early, requests)))
        return Memory(requests, early_rss, _resident(server), _counted(server))


def _resident(server: Server) -> int:
    status = Path("/proc", str(server.process.pid), "status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def _counted(server: Server) -> int:
    lines = server.http.get("/metrics").text.splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith("mlx_omni_kv_cache_bytes "))


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(run(Path(folder), int(sys.argv[1])))
