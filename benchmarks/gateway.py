"""What the gateway costs between a program and the Hub: each beside its goal.

    python benchmarks/gateway.py [--requests 400 --bytes 2000000000]

The Hub is a process of its own on this machine (tests/support/loopback_hub/), so what a network would add to both
sides is not there to hide anything. What is compared takes turns. Metadata: the median of what the gateway adds to one
request on a connection that is kept open. Bodies: a file that the Hub makes up as it sends it, read and thrown away;
the median of several rounds.
All of it happens in a temporary folder; a goal that is missed is a word in the output, not a failure.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `overlay` is the file beside this one

from tests.support.folders import lay_model
from tests.support.processes import OVERLAY, environment, read_line, start

ROOT = sys.path[0]
CHUNK = 1 << 20
ROUNDS = 5
"""In which a body is read directly, and then through the gateway."""
WARM_UP = 20
"""Requests that are not counted: imports, connections, byte code."""
MINE, THEIRS, BIG = "org/mine", "org/theirs", "org/big"
INFO = "/api/models/{}/revision/main"
RESOLVE = "/{}/resolve/main/config.json"
GOAL_MS = 3.0
GOAL_RATIO = 0.6
GOAL_MB = 32.0
# Says where the gateway is, and then waits: what is measured is hf-overlay itself.
WAIT = "import os, sys; print(os.environ['HF_ENDPOINT'], flush=True); sys.stdin.read()"


class Line(NamedTuple):
    """One line of the result."""

    what: str
    value: float
    unit: str
    goal: str
    is_met: bool

    def __str__(self) -> str:
        return f"{self.value:8.2f} {self.unit:4} goal {self.goal:9} {'met' if self.is_met else 'MISSED':7}{self.what}"


class Client:
    """One connection that stays open, without any work of huggingface_hub's."""

    def __init__(self, endpoint: str) -> None:
        url = urlsplit(endpoint)
        assert url.hostname is not None
        self._prefix = url.path
        self._connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)

    def seconds(self, method: str, path: str) -> float:
        """How long a request takes, its answer read to the end."""
        started = time.perf_counter()
        self._connection.request(method, self._prefix + path)
        with self._connection.getresponse() as answer:
            answer.read()
        if answer.status >= 400:
            raise SystemExit(f"{method} {path} was answered {answer.status}: nothing here is worth measuring")
        return time.perf_counter() - started

    def bytes_per_second(self, path: str) -> float:
        """Read a body to its end and throw it away."""
        buffer = bytearray(CHUNK)
        total = 0
        self._connection.request("GET", self._prefix + path)
        with self._connection.getresponse() as answer:
            started = time.perf_counter()
            while size := answer.readinto(buffer):
                total += size
        return total / (time.perf_counter() - started)

    def close(self) -> None:
        self._connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=400, help="of each kind (default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=2_000_000_000, help="size of the file (default: %(default)s)")
    options = parser.parse_args()
    measure(options.requests, options.bytes)
    return 0


def measure(requests: int, size: int) -> None:
    """Print all of it, for so many requests of each kind and a file of so many bytes."""
    with tempfile.TemporaryDirectory(prefix="gateway-benchmark-") as folder:
        disk = Path(folder)
        (disk / "home").mkdir()
        lay_model(disk / "drive" / MINE, settled=True)
        with hub(disk, size) as upstream, gateway(disk, upstream) as (endpoint, pid):
            show(metadata(upstream, endpoint, requests))
            show(bodies(upstream, endpoint, pid, size))


def show(lines: Iterator[Line]) -> None:
    for line in lines:
        print(line, flush=True)


@contextmanager
def hub(disk: Path, size: int) -> Iterator[str]:
    """The Hub, in a process of its own: its endpoint."""
    files = {"config.json": json.dumps({"model_type": "llama"}), "model.safetensors": "weights"}
    repos = [{"repo_id": repo_id, "files": files} for repo_id in (MINE, THEIRS)]
    spec = {
        "hub": {"resolve_cache": False},
        "repos": [*repos, {"repo_id": BIG, "files": files, "virtual": {"b": size}}],
    }
    (disk / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "tests.support.loopback_hub", str(disk / "spec.json")]
    with start(command, environment(disk / "home"), cwd=Path(ROOT)) as process:
        yield str(json.loads(read_line(process.stdout)))


@contextmanager
def gateway(disk: Path, upstream: str) -> Iterator[tuple[str, int]]:
    """`hf-overlay run` in front of the Hub: its gateway's endpoint, and its pid."""
    environ = environment(disk / "home", HF_HUB_OFFLINE="0", HF_ENDPOINT=upstream, PYTHONPATH=ROOT)
    command = [OVERLAY, "run", "--quiet", "--model-path", str(disk / "drive"), "--", sys.executable, "-c", WAIT]
    with start(command, environ, stderr=subprocess.DEVNULL) as process:
        yield read_line(process.stdout), process.pid
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def metadata(upstream: str, endpoint: str, count: int) -> Iterator[Line]:
    """What the gateway adds to one request, for a model it answers for and for one it asks the Hub about."""
    direct, through = Client(upstream), Client(endpoint)
    for name, repo_id in (("a user's model", MINE), ("another model", THEIRS)):
        for what, method, path in (("model info", "GET", INFO), ("file metadata", "HEAD", RESOLVE)):
            times: dict[str, list[float]] = defaultdict(list)
            for number in range(WARM_UP + count):
                for side, client in (("direct", direct), ("through", through)):
                    seconds = client.seconds(method, path.format(repo_id))
                    if number >= WARM_UP:
                        times[side].append(seconds)
            base, whole = (1000 * statistics.median(times[side]) for side in ("direct", "through"))
            told = f"{what} of {name}, added to {base:.2f} ms"
            yield Line(told, whole - base, "ms", f"< {GOAL_MS:g}", whole - base < GOAL_MS)
    for client in (direct, through):
        client.close()


def bodies(upstream: str, endpoint: str, pid: int, size: int) -> Iterator[Line]:
    """Throughput, and what the gateway's memory grows by while bodies pass."""
    path = f"/api/resolve-cache/models/{BIG}/{commit(upstream)}/b"
    speeds: dict[str, list[float]] = defaultdict(list)
    before = peak_mb(pid)
    for _ in range(ROUNDS):
        for side, url in (("direct", upstream), ("through", endpoint)):
            client = Client(url)
            speeds[side].append(client.bytes_per_second(path))
            client.close()
    grown = peak_mb(pid) - before
    ratio = statistics.median(through / direct for direct, through in zip(*speeds.values(), strict=True))
    left, right = (f"{statistics.median(speeds[side]) / 1e6:.0f} MB/s" for side in ("through", "direct"))
    yield Line(f"throughput, {left} ÷ {right}", ratio, "", f"> {GOAL_RATIO:g}", ratio > GOAL_RATIO)
    yield Line(f"peak memory, added by {size / 1e9:g} GB", grown, "MB", f"< {GOAL_MB:g}", grown < GOAL_MB)


def commit(upstream: str) -> str:
    url = urlsplit(upstream)
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    connection.request("GET", INFO.format(BIG))
    sha: str = json.loads(connection.getresponse().read())["sha"]
    connection.close()
    return sha


def peak_mb(pid: int) -> float:
    """The most memory that a process has held (Linux); elsewhere, what it holds now."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], check=True, capture_output=True, text=True)
        return int(said.stdout) / 1000
    (peak,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1000


if __name__ == "__main__":
    sys.exit(main())
