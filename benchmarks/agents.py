"""What agents wait for: the time to the first token of a second turn, beside that of the first.

    python benchmarks/agents.py [--tokens 15000 --agents 4 --blas /usr/lib/…/libopenblas.so.0]

An agent's prompt is a long system prompt that stays as it is, and a short conversation that grows. The server is a
real process on an untrained model of 4.5 million parameters (tests/support/models.py), asked in Anthropic's dialect.
First one agent alone; then several, each with a system prompt of its own, that take turns; then a new conversation of
the first one's. A goal that is missed is a word in the output, not a failure.
"""

from __future__ import annotations

import argparse
import ctypes.util
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `server` is the folder beside this one

from tests.support.models import SMALL, make_random_model

ROOT = sys.path[0]
MODEL = "bench/small"


def main() -> int:
    """Print each ratio beside its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=15_000, help="of the system prompt")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="a library to preload")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, served(Path(place), options.tokens, options.blas) as port:
        words = vocabulary(Path(place) / "models" / MODEL)
        agents = [Agent(port, words, options.tokens, number) for number in range(options.agents + 1)]
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
    return 0


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

    def turn(self) -> float:
        """Ask and take the answer in; returns seconds to its first token."""
        self._messages.append({"role": "user", "content": self._text(50)})
        body = {
            "model": MODEL,
            "max_tokens": 32,
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
        return first

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages.clear()

    def _text(self, tokens: int) -> str:
        return "".join(self._random.choices(self._words, k=tokens))


def vocabulary(folder: Path) -> list[str]:
    """Words that are one token each."""
    vocab: dict[str, int] = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return [token.replace("Ġ", " ") for token in vocab if token.endswith("Ġ") and len(token) > 2]


@contextmanager
def served(place: Path, tokens: int, blas: str | None) -> Iterator[int]:
    """A server on the model; yields its port."""
    make_random_model(place / "models" / MODEL, context=2 * tokens, **SMALL)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MLX_OMNI_"))},
        "HOME": str(place / "home"),
        "PYTHONPATH": ROOT,
        **({"LD_PRELOAD": blas} if blas else {}),
    }
    (place / "home").mkdir()
    command = [
        sys.executable,
        "-P",
        "-m",
        "mlx_overlay_server",
        "--model-path",
        str(place / "models"),
        "--port",
        "0",
        "--offline",
    ]
    process = subprocess.Popen([*command, "--model", MODEL], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        ports = (int(found[1]) for line in process.stderr if (found := re.search(r"listening on \S+:(\d+) ", line)))
        yield next(ports)
    finally:
        process.terminate()
        process.communicate(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
