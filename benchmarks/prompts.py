"""What clients wait for while prompts are read, here and with mlx_lm.server, in one run.

    python benchmarks/prompts.py [--blas /usr/lib/…/libopenblas.so.0] [--models small --rounds 3 --folder …]

Three situations: many requests at once that share a long prompt which nobody has read yet, as parallel agents send
them; as many prompts that share nothing; and a long prompt that arrives while others are being answered. `--folder`
measures a real model as well. A goal that is missed is a word in the output, not a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes.util
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `server` is the file beside this one

from benchmarks.server import Bench, Line, Server, burst
from tests.support.models import MEDIUM, SMALL, Sizes, make_random_model

SHARED = 2000
"""Tokens of the prompt that all requests begin with."""
LONG = 3780
"""Tokens of the prompt that arrives while others are being answered."""
STALL_MS = 250
"""The server's default for `--max-stall-ms`."""
TINY: Sizes = {"hidden": 64, "layers": 2, "heads": 2, "vocab": 512}
MODELS = {"tiny": TINY, "small": SMALL, "medium": MEDIUM}


def main() -> int:
    """Print each ratio beside its goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="a library to preload")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--folder", type=Path, help="a real model's folder, to measure as well")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Prompts(Path(place), options.blas)
        lines: list[Line] = []
        for name in options.models:
            lines += bench.measure(name, options.rounds)
        if options.folder is not None:
            lines += bench.measure(bench.adopt(options.folder).name, options.rounds)
    print(*lines, sep="\n")
    if options.json:
        print(json.dumps([line._asdict() for line in lines]))
    return 0


class Prompts(Bench):
    """Both servers, asked with prompts of known lengths."""

    def measure(self, name: str, rounds: int) -> list[Line]:
        """Ask both servers in turn, and return what they took."""
        folder = self._models / "bench" / name
        if name in MODELS:
            make_random_model(folder, **MODELS[name], context=8192)
        text = Text(folder)
        seconds: dict[str, tuple[list[float], list[float]]] = {}
        with self._ours("--model", f"bench/{name}") as ours, self._theirs(folder) as theirs:
            servers = [(ours, f"bench/{name}"), (theirs, "default_model")]
            for server, model in servers:
                _seconds(server, model, [text.words(100) for _ in range(4)], 4)
            for _, (at, (server, model)) in itertools.product(range(rounds), enumerate(servers)):
                shared = text.words(SHARED)
                took = {
                    "shared": _seconds(server, model, [shared + text.words(20) for _ in range(32)], 8),
                    "distinct": _seconds(server, model, [text.words(500) for _ in range(32)], 8),
                }
                took["silence"], took["first"] = _late(server, model, [text.words(20) for _ in range(8)], text)
                for what, value in took.items():
                    seconds.setdefault(what, ([], []))[at].append(value)
        return _lines(name, {what: (_middle(mine), _middle(its)) for what, (mine, its) in seconds.items()})


class Text:
    """Makes texts of known lengths that no KV cache knows yet."""

    def __init__(self, folder: Path) -> None:
        vocab: dict[str, int] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        words = (token.replace("Ġ", "") for token in vocab if "Ġ" in token and len(token) > 2)
        self._words = [word for word in words if word.isascii() and word.isalpha()]
        self._comes_first = any(token.startswith("Ġ") and len(token) > 2 for token in vocab)
        self._random = random.Random(0)

    def words(self, tokens: int) -> str:
        """Return a text of about so many tokens."""
        chosen = self._random.choices(self._words, k=tokens)
        return "".join(f" {word}" if self._comes_first else f"{word} " for word in chosen)


def _lines(name: str, seconds: dict[str, tuple[float, float]]) -> list[Line]:
    def ratio(what: str, text: str, goal: float) -> Line:
        mine, its = seconds[what]
        text = f"{text} ÷ mlx_lm.server's, {name} ({mine:.2f} ÷ {its:.2f} s)"
        return Line(text, mine / its, f"≤ {goal}", mine / its <= goal)

    silence, its = (each * 1e3 for each in seconds["silence"])
    text = f"longest silence of 8 streams while {LONG} tokens are read, in ms, {name} (mlx_lm.server: {its:.0f})"
    return [
        ratio("shared", f"32 requests answered that share {SHARED} unread tokens", 0.3),
        ratio("distinct", "32 requests answered that share nothing", 0.68),
        Line(text, silence, f"≤ {STALL_MS}", silence <= STALL_MS),
        ratio("first", f"first token of those {LONG} tokens", 1.0),
    ]


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def _seconds(server: Server, model: str, prompts: list[str], tokens: int) -> float:
    """Return the seconds until all prompts, sent at once, are answered."""
    return len(prompts) * tokens / burst(server.port, model, prompts, tokens).tokens_per_second


def _late(server: Server, model: str, prompts: list[str], text: Text) -> tuple[float, float]:
    """Send a long prompt while others are answered: returns their longest silence, and the time to its first token."""
    done = subprocess.run(
        [sys.executable, __file__, "client", str(server.port), model],
        input=json.dumps([prompts, text.words(LONG)]),
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    silence, first = json.loads(done.stdout)
    return silence, first


async def _client(port: int, model: str, prompts: list[str], long: str) -> tuple[float, float]:
    times: list[list[float]] = [[] for _ in prompts]

    async def stream(prompt: str, tokens: int, noted: list[float]) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        content = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        try:
            while data := await reader.read(1 << 16):
                if b'"text"' in data:
                    noted.append(time.perf_counter())
                if b"[DONE]" in data:
                    return
        finally:
            writer.close()

    streams = [asyncio.create_task(stream(prompt, 3000, times[at])) for at, prompt in enumerate(prompts)]
    while not all(len(noted) > 10 for noted in times):
        await asyncio.sleep(0.01)
    first: list[float] = []
    sent = time.perf_counter()
    late = asyncio.create_task(stream(long, 4, first))
    while not first:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    for task in (late, *streams):
        task.cancel()
    gaps = [b - a for noted in times for a, b in itertools.pairwise([*noted, first[0]]) if sent < b <= first[0]]
    return max(gaps), first[0] - sent


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        given_prompts, given_long = json.load(sys.stdin)
        print(json.dumps(asyncio.run(_client(int(sys.argv[2]), sys.argv[3], given_prompts, given_long))))
        sys.exit()
    sys.exit(main())
