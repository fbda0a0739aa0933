"""What agents wait for: the time to the first token of a second turn, and after a restart, beside that of the first.

    python benchmarks/agents.py [--tokens 15000 --agents 4 --parts turns --blas /usr/lib/…/libopenblas.so.0]

An agent's prompt is a long system prompt that stays as it is, and a short conversation that grows. The server is a
real process on an untrained model of 4.5 million parameters (tests/support/models.py), asked in Anthropic's dialect.
First one agent alone; then several, each with a system prompt of its own, that take turns; then a new conversation of
the first one's. Then the server is killed and started again: KV caches are on disk. At last, what writing them costs
an answer that runs meanwhile. A goal that is missed is a word in the output, not a failure.
"""

from __future__ import annotations

import argparse
import ctypes.util
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `server` is the folder beside this one

from tests.support.models import SMALL, make_random_model

ROOT = sys.path[0]
MODEL = "bench/small"
PARTS = ("turns", "restart", "writing")
ANSWER = 300


def main() -> int:
    """Print each ratio beside its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=15_000, help="of the system prompt")
    parser.add_argument("--long", type=int, default=20_000, help="tokens of the prompt that is kept on disk")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="a library to preload")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = vocabulary(make_random_model(place / "models" / MODEL, context=2 * options.long, **SMALL))
        if "turns" in options.parts:
            turns(place, words, options)
        if "restart" in options.parts:
            restart(place, words, options.long, options.blas)
        if "writing" in options.parts:
            writing(place, words, options.long // 2, options.rounds, options.blas)
    return 0


def turns(place: Path, words: list[str], options: argparse.Namespace) -> None:
    """Conversations that grow, while one server runs."""
    with served(place, options.blas, "--kv-disk", "0") as server:
        agents = [Agent(server.port, words, options.tokens, number) for number in range(options.agents + 1)]
        alone = agents.pop()
        first, second = alone.turn(), alone.turn()
        report("turn 2 ÷ turn 1, one agent", second, first, 0.05)
        firsts = [agent.turn() for agent in agents]
        seconds = [agent.turn() for agent in agents]
        report(
            f"turn 2 ÷ turn 1, {options.agents} agents in turn (worst)", max(seconds), sum(firsts) / len(firsts), 0.1
        )
        alone.forget()
        report("first turn of a new conversation ÷ turn 1", alone.turn(), first, 0.05)


def report(what: str, value: float, of: float, goal: float) -> None:
    """One line."""
    ratio = value / of
    verdict = "met" if ratio <= goal else "MISSED"
    print(f"{ratio:8.4f}  goal ≤ {goal:<6} {verdict:7}{what} ({value * 1e3:.0f} ÷ {of * 1e3:.0f} ms)", flush=True)


class Agent:
    """One client with a system prompt of its own."""

    def __init__(self, port: int, words: list[str], tokens: int, number: int) -> None:
        self._port = port
        self._random = random.Random(number)
        self._words = words
        self._system = self._text(tokens)
        self._messages: list[dict[str, Any]] = []

    def turn(self, answer: int = 32) -> float:
        """Ask and take the answer in; returns seconds to its first token."""
        return self._ask(answer)[0]

    def speed(self, answer: int) -> float:
        """The same; returns tokens a second after the first one."""
        first, whole = self._ask(answer)
        return (answer - 1) / (whole - first)

    def _ask(self, tokens: int) -> tuple[float, float]:
        self._messages.append({"role": "user", "content": self._text(50)})
        body = {
            "model": MODEL,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "system": [{"type": "text", "text": self._system, "cache_control": {"type": "ephemeral"}}],
            "messages": self._messages,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        started = time.perf_counter()
        connection.request("POST", "/v1/messages", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        first, answer = 0.0, ""
        for line in response:
            if line.startswith(b"data: ") and (delta := json.loads(line[6:]).get("delta", {}).get("text")):
                first = first or time.perf_counter() - started
                answer += delta
        self._messages.append({"role": "assistant", "content": answer})
        return first, time.perf_counter() - started

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages.clear()

    def _text(self, tokens: int) -> str:
        return "".join(self._random.choices(self._words, k=tokens))


def vocabulary(folder: Path) -> list[str]:
    """Words that are one token each."""
    vocab: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [token.replace("Ġ", " ") for token in vocab if token.endswith("Ġ") and len(token) > 2]


def restart(place: Path, words: list[str], tokens: int, blas: str | None) -> None:
    """A first turn; then the server is killed, started again, and asked the same by a client that knows nothing."""
    with served(place, blas) as server:
        cold = Agent(server.port, words, tokens, 100).turn()
        written = settled(server.port)
        server.process.kill()
    with served(place, blas) as server:
        warm = Agent(server.port, words, tokens, 100).turn()
    report(f"first token after kill -9 and restart ÷ cold, {tokens} tokens ({written / 1e6:.0f} MB)", warm, cold, 0.05)


def writing(place: Path, words: list[str], tokens: int, rounds: int, blas: str | None) -> None:
    """Answers that begin just when a long prompt has been read and is written to disk, and the same without a disk."""
    speeds: dict[str, list[float]] = {"20G": [], "0": []}
    written = 0.0
    with served(place, blas) as keeps, served(place, blas, "--kv-disk", "0") as forgets:
        for number in range(rounds):
            for size, server in (("20G", keeps), ("0", forgets)):
                Agent(server.port, words, tokens, 200 + number).turn(answer=1)
                before = metric(server.port, "kv_disk_written_bytes_total")
                speeds[size].append(Agent(server.port, words, 100, 300 + number).speed(ANSWER))
                written += metric(server.port, "kv_disk_written_bytes_total") - before
    with_disk, without = (statistics.median(speeds[size]) for size in ("20G", "0"))
    share = f"{written / rounds / 1e6:.0f} MB in {ANSWER / with_disk:.1f} s"
    ratio = with_disk / without
    verdict = "met" if ratio >= 0.97 else "MISSED"
    print(
        f"{ratio:8.4f}  goal ≥ {0.97:<6} {verdict:7}tokens/s of an answer while {share} are written ÷ without",
        flush=True,
    )


def metric(port: int, name: str) -> float:
    """One of the server's metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    found = re.search(rf"^mlx_omni_{name} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def loaded(port: int) -> list[str]:
    """The models in the server's memory."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/health")
    found: list[str] = json.loads(connection.getresponse().read())["loaded"]
    return found


def settled(port: int) -> float:
    """Bytes on disk, once they no longer grow."""
    before = -1.0
    while (now := metric(port, "kv_disk_bytes")) != before:
        before = now
        time.sleep(1)
    return now


class Served(NamedTuple):
    """A server."""

    port: int
    process: subprocess.Popen[str]


@contextmanager
def served(place: Path, blas: str | None, *more: str) -> Iterator[Served]:
    """A server on the model."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MLX_OMNI_"))},
        "HOME": str(place / "home"),
        "PYTHONPATH": ROOT,
        **({"LD_PRELOAD": blas} if blas else {}),
    }
    (place / "home").mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "mlx_overlay_server", "--model-path", str(place / "models")]
    command += ["--port", "0", "--offline", "--model", MODEL, *more]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        ports = (int(found[1]) for line in process.stderr if (found := re.search(r"listening on \S+:(\d+) ", line)))
        server = Served(next(ports), process)
        while MODEL not in loaded(server.port):
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.communicate(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
