"""How fast the server is: beside mlx_lm.server, and beside the bare BatchGenerator that both stand on.

    python benchmarks/server.py [--blas /usr/lib/…/libopenblas.so.0] [--models small --streams 1 8 32 --rounds 3]

Both servers are real processes; the client is a third one that only counts bytes. What is compared takes turns, and
the median of the rounds counts: the machine is noisy, so only ratios mean something. The models are untrained, so that
their answers never end by themselves (tests/support/models.py). MLX's Linux wheel brings a slow BLAS: OpenBLAS, where
it is found, is preloaded for both sides. All of it happens in a temporary folder; a goal that is missed is a word in
the output, not a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes.util
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `server` is the file beside this one

from tests.support.hfcache import add_repo
from tests.support.models import MEDIUM, SMALL, make_random_model

ROOT = sys.path[0]
TOKENS = 128
WORDS = 16
GOALS = {  # at 32 streams: ÷ bound, ÷ mlx_lm.server
    "tiny": (0.6, 2.0),
    "small": (0.9, 1.4),
    "medium": (0.97, 1.05),
}
ALMOST = 32

_BOUND = """
import json, sys, time
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
model, tokenizer = load(sys.argv[1])
prompts = [tokenizer.encode(text) for text in json.load(sys.stdin)]
def run(count, tokens):
    generator = BatchGenerator(model, completion_batch_size=32, prefill_batch_size=32)
    started = time.perf_counter()
    left = set(generator.insert([list(prompt) for prompt in prompts[:count]], [tokens] * count))
    while left:
        left -= {row.uid for row in generator.next_generated() if row.finish_reason}
    return count * tokens / (time.perf_counter() - started)
run(2, 8)
print(run(int(sys.argv[2]), int(sys.argv[3])))
"""


class Line(NamedTuple):
    """One line of the result."""

    what: str
    value: float
    goal: str
    is_met: bool

    def __str__(self) -> str:
        return f"{self.value:8.3f}  goal {self.goal:9} {'met' if self.is_met else 'MISSED':7}{self.what}"


class Run(NamedTuple):
    """One burst of streams."""

    tokens_per_second: float
    ttft: list[float]
    """Seconds, sorted."""


def main() -> int:
    """Print each ratio beside its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="a library to preload")
    parser.add_argument("--models", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--listing", type=int, default=1000, help="models in folders, and as many in the cache; 0: none"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), options.blas)
        lines = []
        for name in options.models:
            lines += bench.throughput(name, options.streams, options.rounds)
        lines += bench.start(options.rounds)
        if options.listing:
            lines += bench.listing(options.listing)
    print(*lines, sep="\n")
    if options.json:
        print(json.dumps([line._asdict() for line in lines]))
    return 0


class Bench:
    """Everything in one folder, with one environment for both sides."""

    def __init__(self, place: Path, blas: str | None) -> None:
        self._place = place
        self._models = place / "models"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MLX_OMNI_"))},
            "HOME": str(place / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": ROOT,
            **({"LD_PRELOAD": blas} if blas else {}),
        }
        (place / "home").mkdir()
        make_random_model(self._models / "bench" / "tiny")
        print(f"BLAS: {blas or 'the wheel’s own (slow)'}", file=sys.stderr)

    def throughput(self, name: str, streams: list[int], rounds: int) -> list[Line]:
        """Aggregate tokens a second and times to first token, for one model."""
        folder = self._models / "bench" / name
        if name != "tiny":
            make_random_model(folder, **(SMALL if name == "small" else MEDIUM))
        prompts = _prompts(max(streams))
        lines = []
        with self._ours("--model", f"bench/{name}") as ours, self._theirs(folder) as theirs:
            for port, model in ((ours.port, f"bench/{name}"), (theirs.port, "default_model")):
                burst(port, model, prompts[:8], TOKENS)
            memory = _resident(ours.process.pid) / _resident(theirs.process.pid)  # later, more KV caches are kept
            for count in streams:
                bound, mine, other = [], [], []
                for _ in range(rounds):
                    bound.append(self._bound(folder, prompts, count))
                    mine.append(burst(ours.port, f"bench/{name}", _fresh(prompts[:count]), TOKENS))
                    other.append(burst(theirs.port, "default_model", _fresh(prompts[:count]), TOKENS))
                lines += _compared(name, count, statistics.median(bound), mine, other)
        return [*lines, Line(f"resident memory ÷ mlx_lm.server's, {name}", memory, "≤ 1.1", memory <= 1.1)]

    def start(self, rounds: int) -> list[Line]:
        """From the start of the process to the first answer."""
        folder = self._models / "bench" / "tiny"
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for at in (0, 1):
                started = time.perf_counter()
                with self._ours("--model", "bench/tiny") if at == 0 else self._theirs(folder) as server:
                    burst(server.port, "bench/tiny" if at == 0 else "default_model", _prompts(1), 1)
                    seconds[at].append(time.perf_counter() - started)
        start = statistics.median(seconds[0]) / statistics.median(seconds[1])
        return [Line("start to first answer ÷ mlx_lm.server's", start, "≤ 1.2", start <= 1.2)]

    def listing(self, count: int) -> list[Line]:
        """`GET /v1/models` with as many models in folders as in the cache."""
        hub = self._place / "home" / ".cache" / "huggingface" / "hub"
        source = make_random_model(self._place / "one")
        files = {path.name: path.read_bytes() for path in source.iterdir()}
        for number in range(count):
            folder = self._models / "many" / f"m{number}"
            folder.mkdir(parents=True)
            for name in files:
                os.link(source / name, folder / name)
            add_repo(hub, f"cached/m{number}", {name: files[name] for name in ("config.json", "tokenizer_config.json")})
            snapshot = next((hub / f"models--cached--m{number}" / "snapshots").iterdir())
            for name in files.keys() - {"config.json", "tokenizer_config.json"}:
                os.link(source / name, snapshot / name)
        for path in (*self._models.rglob("*"), *hub.rglob("*")):  # as after a night: what is new is looked at closely
            os.utime(path, (1e9, 1e9), follow_symlinks=False)
        with self._ours() as ours, self._theirs(self._models / "bench" / "tiny") as theirs:
            mine, other = ([_get(server.port, "/v1/models") for _ in range(6)] for server in (ours, theirs))
            ratio = statistics.median(mine[1:]) / statistics.median(other[1:])
            busy = self._listing_under_load(ours.port)
        return [
            Line(f"GET /v1/models, {count} + {count} models ÷ mlx_lm.server's", ratio, "≤ 0.02", ratio <= 0.02),
            Line(
                f"the same in ms: median {statistics.median(mine[1:]) * 1e3:.0f}; p99 while 32 streams run",
                busy,
                "-",
                True,
            ),
        ]

    def _listing_under_load(self, port: int) -> float:
        """Milliseconds, p99."""
        load = threading.Thread(target=burst, args=(port, "bench/tiny", _prompts(32), 2000))
        load.start()
        times = [_get(port, "/v1/models")]
        while load.is_alive() and len(times) < 100:
            times.append(_get(port, "/v1/models"))
        load.join()
        return sorted(times)[int(len(times) * 0.99) - 1] * 1e3

    def _bound(self, folder: Path, prompts: list[str], count: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", _BOUND, str(folder), str(count), str(TOKENS)],
            input=json.dumps(prompts),
            env=self._environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        return float(done.stdout.split()[-1])

    @contextmanager
    def _ours(self, *arguments: str) -> Iterator[Server]:
        command = [
            sys.executable,
            "-P",
            "-m",
            "mlx_overlay_server",
            "--model-path",
            str(self._models),
            "--port",
            "0",
            "--offline",
        ]
        with self._started([*command, *arguments], r"listening on http://127\.0\.0\.1:(\d+)") as server:
            yield server

    @contextmanager
    def _theirs(self, folder: Path) -> Iterator[Server]:
        port = _free_port()
        command = [sys.executable, "-P", "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
        with self._started(command, r"[Ss]tarting httpd at .* on port (\d+)") as server:
            yield server

    @contextmanager
    def _started(self, command: list[str], ready: str) -> Iterator[Server]:
        process = subprocess.Popen(
            command, env=self._environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(ready, line):
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield Server(process, int(found[1]))
                    return
            raise SystemExit(f"{' '.join(command[1:3])} did not start; run it by hand to see why")
        finally:
            process.terminate()
            process.wait(60)


class Server(NamedTuple):
    """A running one."""

    process: subprocess.Popen[str]
    port: int


def _compared(name: str, count: int, bound: float, mine: list[Run], other: list[Run]) -> list[Line]:
    my_rate, their_rate = (statistics.median(run.tokens_per_second for run in runs) for runs in (mine, other))
    print(
        f"{name:7}{count:3} streams: {bound:8.0f} bound {my_rate:8.0f} ours {their_rate:8.0f} theirs", file=sys.stderr
    )
    to_bound, to_other = GOALS[name]
    has_goal = count == ALMOST
    lines = [
        Line(
            f"tokens/s ÷ BatchGenerator, {name}, {count} streams",
            my_rate / bound,
            *_goal(has_goal, to_bound, my_rate / bound),
        ),
        Line(
            f"tokens/s ÷ mlx_lm.server, {name}, {count} streams",
            my_rate / their_rate,
            *_goal(has_goal, to_other, my_rate / their_rate),
        ),
    ]
    for label, share in (("p50", 0.5), ("p95", 0.95)):
        ours, theirs = (
            statistics.median(run.ttft[min(int(len(run.ttft) * share), len(run.ttft) - 1)] for run in runs)
            for runs in (mine, other)
        )
        ratio = ours / theirs
        is_met = ratio <= 0.5 or not has_goal
        lines.append(
            Line(
                f"TTFT {label} ÷ mlx_lm.server, {name}, {count} streams ({ours * 1e3:.0f} ÷ {theirs * 1e3:.0f} ms)",
                ratio,
                "≤ 0.5" if has_goal else "-",
                is_met,
            )
        )
    return lines


def _goal(has_goal: bool, goal: float, value: float) -> tuple[str, bool]:
    return (f"≥ {goal}", value >= goal) if has_goal else ("-", True)


def _prompts(count: int) -> list[str]:
    return [" ".join(f"word{number}x{at}" for at in range(WORDS // 2)) for number in range(count)]


def _fresh(prompts: list[str]) -> list[str]:
    """Prompts no KV cache knows yet."""
    mark = f"{time.monotonic_ns() % 10**9:09d}"
    return [f"{mark} {prompt}" for prompt in prompts]


def burst(port: int, model: str, prompts: list[str], tokens: int) -> Run:
    """All prompts at once, streamed, by a client in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "client", str(port), model, str(tokens)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    rate, ttft = json.loads(done.stdout)
    return Run(rate, ttft)


async def _client(port: int, model: str, tokens: int, prompts: list[str]) -> tuple[float, list[float]]:
    async def one(prompt: str) -> float:
        body = json.dumps(
            {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        first = 0.0
        while data := await reader.read(1 << 16):
            if not first and b'"text"' in data:
                first = time.perf_counter() - started
            if b"[DONE]" in data:
                break
        writer.close()
        return first

    started = time.perf_counter()
    firsts = await asyncio.gather(*map(one, prompts))
    return len(prompts) * tokens / (time.perf_counter() - started), sorted(firsts)


def _get(port: int, path: str) -> float:
    """Seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    started = time.perf_counter()
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    assert response.status == 200, response.status
    return time.perf_counter() - started


def _resident(pid: int) -> float:
    """Bytes (RSS)."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return float(told.stdout) * 1024


def _free_port() -> int:
    """A port that was free a moment ago, for a server that cannot choose one itself."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        print(json.dumps(asyncio.run(_client(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), json.load(sys.stdin)))))
    else:
        sys.exit(main())
