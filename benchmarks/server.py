"""How fast the server is: beside mlx_lm.server, and beside the bare BatchGenerator that both stand on.

    python benchmarks/server.py [--blas /usr/lib/…/libopenblas.so.0] [--models small --streams 1 8 32 --rounds 3]
    python benchmarks/server.py --models --model …/SmolLM2-135M-Instruct --parse       # a folder of your own, alone

Both servers are real processes; the client is a third one that only counts bytes. With `--parse` it parses each event,
as clients do, which takes processor time from both servers on a small machine. That counts most for the smallest model,
so there is a row of each. What is compared takes turns, and the median of the rounds counts: the machine is noisy, so
only ratios mean something. The models are untrained, so that their answers never end by themselves
(tests/support/models.py). MLX's Linux wheel brings a slow BLAS: OpenBLAS, where it is found, is preloaded for both
sides. All of it happens in a temporary folder; a goal that is missed is a word in the output, not a failure.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `server` is the file beside this one

from tests.support.hfcache import add_repo
from tests.support.models import MEDIUM, SMALL, make_random_model

ROOT = sys.path[0]
TOKENS = 128
WORDS = 16
GOALS = {  # at 32 streams: ÷ bound, ÷ mlx_lm.server
    "tiny": (0.8, 2.0),
    "small": (0.92, 1.4),
    "medium": (0.97, 1.05),
}
OWN = (0.95, 1.05)
"""The same for a model of the user's."""
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
    """Seconds to each stream's first token, sorted."""
    gaps: list[float]
    """Seconds between two arrivals of tokens in a stream, of all streams, sorted."""


def main() -> int:
    """Print each ratio beside its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="a library to preload")
    parser.add_argument("--models", nargs="*", choices=list(GOALS), default=list(GOALS))
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="the folder of a model, too; repeatable"
    )
    parser.add_argument("--parse", action="store_true", help="let the client parse each event")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--listing", type=int, default=1000, help="models in folders, and as many in the cache; 0: none"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), options.blas, parses=options.parse)
        lines = []
        folders = [bench.made(name) for name in options.models] + [bench.adopt(each) for each in options.model]
        for folder in folders:
            lines += bench.throughput(folder, options.streams, options.rounds)
        for folder in [bench.made("tiny"), *folders[len(options.models) :]]:
            lines += bench.start(folder, options.rounds)
        if options.listing:
            lines += bench.listing(options.listing)
    print(*lines, sep="\n")
    if options.json:
        print(json.dumps([line._asdict() for line in lines]))
    return 0


class Bench:
    """Everything in one folder, with one environment for both sides."""

    def __init__(self, place: Path, blas: str | None, *, parses: bool = False) -> None:
        """`parses`: whether the client parses each event."""
        self._place = place
        self._parses = parses
        self._models = place / "models"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MLX_OMNI_"))},
            "HOME": str(place / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": ROOT,
            **({"LD_PRELOAD": blas} if blas else {}),
        }
        (place / "home").mkdir()
        (self._models / "bench").mkdir(parents=True)
        print(f"BLAS: {blas or 'the wheel’s own (slow)'}", file=sys.stderr)

    def made(self, name: str) -> Path:
        """The folder of an untrained model: `tiny`, `small` or `medium`."""
        folder = self._models / "bench" / name
        if not folder.exists():
            sizes: Any = {"tiny": {}, "small": SMALL, "medium": MEDIUM}[name]
            make_random_model(folder, **sizes)
        return folder

    def adopt(self, folder: Path) -> Path:
        """Take a real model in, and return where it is now."""
        place = self._models / "bench" / folder.resolve().name
        place.symlink_to(folder.resolve())
        return place

    def throughput(self, folder: Path, streams: list[int], rounds: int) -> list[Line]:
        """Aggregate tokens a second and times to first token, for one model."""
        name = folder.name
        prompts = _prompts(max(streams))
        lines = []
        with self._ours("--model", f"bench/{name}") as ours, self._theirs(folder) as theirs:
            for port, model in ((ours.port, f"bench/{name}"), (theirs.port, "default_model")):
                burst(port, model, prompts[:8], TOKENS)
            its = _resident(theirs.process.pid)[0]
            alone, together = (each / its for each in _resident(ours.process.pid))  # later, more KV caches are kept
            for count in streams:
                bound, mine, other = [], [], []
                parsed: tuple[list[Run], list[Run]] = ([], [])
                for _ in range(rounds):
                    bound.append(self._bound(folder, prompts, count))
                    fresh = partial(_fresh, prompts[:count])
                    mine.append(burst(ours.port, f"bench/{name}", fresh(), TOKENS, parses=self._parses))
                    other.append(burst(theirs.port, "default_model", fresh(), TOKENS, parses=self._parses))
                    if name == "tiny" and count == ALMOST:
                        parsed[0].append(burst(ours.port, f"bench/{name}", fresh(), TOKENS, parses=True))
                        parsed[1].append(burst(theirs.port, "default_model", fresh(), TOKENS, parses=True))
                lines += _compared(name, count, statistics.median(bound), mine, other)
                if parsed[0]:
                    ratio = _rate(parsed[0]) / _rate(parsed[1])
                    what = f"tokens/s ÷ mlx_lm.server, {name}, {count} streams, with a client that parses each event"
                    lines.append(Line(what, ratio, "-", is_met=True))
        return [
            *lines,
            Line(f"resident memory ÷ mlx_lm.server's, {name}", alone, "≤ 1.1", alone <= 1.1),
            Line("the same with its preparation processes, pages that they share counted twice", together, "-", True),
        ]

    def start(self, folder: Path, rounds: int) -> list[Line]:
        """From the start of the process to the first answer."""
        model = f"bench/{folder.name}"
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for at in (0, 1):
                started = time.perf_counter()
                with self._ours("--model", model) if at == 0 else self._theirs(folder) as server:
                    burst(server.port, model if at == 0 else "default_model", _prompts(1), 1)
                    seconds[at].append(time.perf_counter() - started)
        start = statistics.median(seconds[0]) / statistics.median(seconds[1])
        return [Line(f"start to first answer ÷ mlx_lm.server's, {folder.name}", start, "≤ 1.0", start <= 1.0)]

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
        with self._ours() as ours, self._theirs(self.made("tiny")) as theirs:
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
    my_rate, their_rate = _rate(mine), _rate(other)
    print(
        f"{name:7}{count:3} streams: {bound:8.0f} bound {my_rate:8.0f} ours {their_rate:8.0f} theirs", file=sys.stderr
    )
    to_bound, to_other = GOALS.get(name, OWN)
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
    for label, field, share, goal in (
        ("TTFT p50", "ttft", 0.5, 0.5),
        ("TTFT p95", "ttft", 0.95, 0.5),
        ("inter-token p99", "gaps", 0.99, 1.2),
    ):
        ours, theirs = (statistics.median(_share(getattr(run, field), share) for run in runs) for runs in (mine, other))
        ratio = ours / theirs
        lines.append(
            Line(
                f"{label} ÷ mlx_lm.server, {name}, {count} streams ({ours * 1e3:.0f} ÷ {theirs * 1e3:.0f} ms)",
                ratio,
                f"≤ {goal}" if has_goal else "-",
                ratio <= goal or not has_goal,
            )
        )
    return lines


def _rate(runs: list[Run]) -> float:
    """Tokens a second of all streams together, at the median of the runs."""
    return statistics.median(run.tokens_per_second for run in runs)


def _share(values: list[float], share: float) -> float:
    """The value below which a share of sorted values is."""
    return values[min(int(len(values) * share), len(values) - 1)]


def _goal(has_goal: bool, goal: float, value: float) -> tuple[str, bool]:
    return (f"≥ {goal}", value >= goal) if has_goal else ("-", True)


def _prompts(count: int) -> list[str]:
    return [" ".join(f"word{number}x{at}" for at in range(WORDS // 2)) for number in range(count)]


def _fresh(prompts: list[str]) -> list[str]:
    """Prompts no KV cache knows yet."""
    mark = f"{time.monotonic_ns() % 10**9:09d}"
    return [f"{mark} {prompt}" for prompt in prompts]


def burst(port: int, model: str, prompts: list[str], tokens: int, *, parses: bool = False) -> Run:
    """All prompts at once, streamed, by a client in a process of its own; `parses`: it parses each event."""
    done = subprocess.run(
        [sys.executable, __file__, "client", str(port), model, str(tokens), str(int(parses))],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return Run(*json.loads(done.stdout))


async def _client(
    port: int, model: str, tokens: int, prompts: list[str], *, parses: bool
) -> tuple[float, list[float], list[float]]:
    gaps: list[float] = []

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
        first = last = 0.0
        while data := await reader.read(1 << 16):
            if b'"text"' in data:
                now = time.perf_counter() - started
                if first:
                    gaps.append(now - last)
                first, last = first or now, now
            if parses:
                for line in data.split(b"\n"):
                    if line.startswith(b"data: {") and line.endswith(b"}"):  # the ends of a read may be anywhere
                        json.loads(line[6:])
            if b"[DONE]" in data:
                break
        writer.close()
        return first

    started = time.perf_counter()
    firsts = await asyncio.gather(*map(one, prompts))
    return len(prompts) * tokens / (time.perf_counter() - started), sorted(firsts), sorted(gaps)


def _get(port: int, path: str) -> float:
    """Seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    started = time.perf_counter()
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    assert response.status == 200, response.status
    return time.perf_counter() - started


def _resident(pid: int) -> tuple[int, int]:
    """Kilobytes (RSS) of a process, and of it with its children."""
    told = subprocess.run(["ps", "-ax", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True)
    rows = [tuple(map(int, line.split())) for line in told.stdout.splitlines()]
    alone = sum(rss for each, _, rss in rows if each == pid)
    return alone, alone + sum(rss for _, parent, rss in rows if parent == pid)


def _free_port() -> int:
    """A port that was free a moment ago, for a server that cannot choose one itself."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        port, name, tokens, parses = sys.argv[2:]
        print(
            json.dumps(asyncio.run(_client(int(port), name, int(tokens), json.load(sys.stdin), parses=parses == "1")))
        )
    else:
        sys.exit(main())
