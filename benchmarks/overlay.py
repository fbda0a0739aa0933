"""What the overlay costs: ratios measured in one run, each beside its goal.

    python benchmarks/overlay.py [--models 1000 --cached 1000 --files 12 --rounds 5 --many 10000] [--on DIR …]

Ratios, because they hold on other machines where milliseconds do not. What is compared takes turns, and the shortest
time of each counts, because whatever else the machine does only ever adds to it. Of whole processes it is the processor
time, of which a busy machine takes less than of the time that passes. A goal that is missed is a word in the output,
not a failure.

All of it happens in a temporary folder, with a home of its own, on each disk in turn: in memory (/dev/shm), where files
are made in no time and the overlay's own work shows most, and where TMPDIR says. ext4 makes them many times more slowly
for minutes after many were deleted. Goals differ. Starts with very many models are measured on the first disk alone.
What the gateway costs is printed last, by gateway.py. All of it takes some minutes.

The commands are offline here; with a network, `run` imports sockets as well. At its end it looks at all processes of
this user's, so how many the machine has is printed, too.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `import hf_overlay` finds this file

from hf_overlay import open_session
from mlx_overlay_server.models.library import Library

from benchmarks import gateway
from tests.support.folders import temporary_folder, weights
from tests.support.hfcache import add_repo
from tests.support.models import make_model

LONG_AGO = 1_700_000_000
"""When the models were copied to the disk; what is being copied right now is looked at more closely."""
FEW_MODELS = 100
PROCESS_ROUNDS = 15
LOAD_ROUNDS = 50
SAYS = " ".join(f"word{number}" for number in range(3000))
"""Makes a model of 88 MB, which is as small as models are that people load."""

LAYERS = 32
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SMALL_FILES = (
    "tokenizer.json",
    "README.md",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
)


class Ratio(NamedTuple):
    """One line of the result."""

    what: str
    seconds: float
    base: str
    base_seconds: float
    goal: float

    def line(self) -> str:
        ratio = self.seconds / self.base_seconds
        verdict = "met" if ratio <= self.goal else "MISSED"
        left, right = (f"{seconds * 1000:.1f} ms" for seconds in (self.seconds, self.base_seconds))
        return f"{ratio:8.3f}  goal {self.goal:<5} {verdict:7}{self.what} ({left}) ÷ {self.base} ({right})"


def milliseconds(what: str, seconds: float, goal: float) -> Ratio:
    """A line of which the goal is a time."""
    return Ratio(what, seconds, "a millisecond", 0.001, goal)


class Goals(NamedTuple):
    """The goals that depend on how fast a disk makes links."""

    build: float
    run_few: float
    run: float


IN_MEMORY, ON_DISK = Goals(build=2, run_few=5, run=9), Goals(build=1.2, run_few=6, run=15)


class Operation(NamedTuple):
    """One call that makes one entry of a tree."""

    call: Callable[..., None]
    arguments: tuple[str | bytes, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=int, default=1000, help="user models (default: %(default)s)")
    parser.add_argument("--cached", type=int, default=1000, help="cached repos (default: %(default)s)")
    parser.add_argument("--files", type=int, default=12, help="files a user model, at least 5 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often trees are built (default: %(default)s)")
    parser.add_argument(
        "--on", action="append", metavar="DIR", help="a disk (default: /dev/shm, and where TMPDIR says)"
    )
    parser.add_argument("--many", type=int, default=10_000, help="models of the largest starts (default: %(default)s)")
    options = parser.parse_args()
    if os.path.isdir("/proc"):
        print(f"{sum(name.isdigit() for name in os.listdir('/proc'))} processes on this machine", flush=True)
    memory = ["/dev/shm"] if os.path.isdir("/dev/shm") else []
    for number, place in enumerate(options.on or [*memory, tempfile.gettempdir()]):
        goals = IN_MEMORY if place in memory else ON_DISK
        measure(place, goals, options, many=options.many if number == 0 else 0)
    gateway.measure(requests=400, size=2_000_000_000)
    return 0


def measure(place: str, goals: Goals, options: argparse.Namespace, *, many: int) -> None:
    """Print all ratios on one disk. `many` models are those of the largest starts; 0: there are none."""
    with temporary_folder(Path(place), "overlay-benchmark-") as disk, home_of_its_own(disk):
        hub = disk / "home/.cache/huggingface/hub"
        make_models(disk / "models", options.models, options.files)
        make_models(disk / "few", FEW_MODELS, options.files)
        for number in range(options.cached):
            add_repo(hub, f"cached/model-{number}", {"config.json": b"{}", "model.safetensors": b"weights"}, tree=True)
        made = f"{options.models} models of {options.files} files, {options.cached} cached repos"
        print(f"{made}, {'in memory' if goals is IN_MEMORY else 'on disk'}: {place}", flush=True)
        show(tree_ratios(disk / "models", disk / "replay", options.rounds, goals))
        show(list_times(disk / "models"))
        (disk / "none").mkdir()
        show(start_ratios(disk))
        show(model_ratios(disk, options.models, goals))
        if many:
            make_models(disk / "many", many, options.files)
            show(many_models_ratios(disk, many))
        make_model(disk / "loaded/org/name", SAYS)
        show(load_ratios(disk / "loaded"))


def show(ratios: Sequence[Ratio]) -> None:
    for ratio in ratios:
        print(ratio.line(), flush=True)


@contextmanager
def home_of_its_own(disk: Path) -> Iterator[None]:
    """For this process and those it starts: no variable of the user's leads to their home or cache."""
    environment = {
        "HOME": str(disk / "home"),
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    with patch.dict(os.environ, environment, clear=True):
        yield


@contextmanager
def clock(times: dict[str, list[float]], name: str) -> Iterator[None]:
    gc.collect()  # or one measurement pays for what another left behind
    started = time.perf_counter()
    yield
    times[name].append(time.perf_counter() - started)


# Trees -----------------------------------------------------------------------------------------------------------


def tree_ratios(models: Path, replayed: Path, rounds: int, goals: Goals) -> list[Ratio]:
    """Build, refresh and scan one tree in each round; a first round, not counted, fills the caches of the disk.

    Each round is a first start: it has a folder of its own for overlays, in which nothing was kept.
    """
    from huggingface_hub import scan_cache_dir

    changing = models / "org-0/model-0/config.json"
    times: dict[str, list[float]] = defaultdict(list)
    replayed.mkdir()
    with ExitStack() as sessions:  # closed at the end, so that no tree is made where one was just deleted
        for number in range(1 + rounds):
            overlays = replayed / f"overlays-{number}"
            environ = {**os.environ, "HF_OVERLAY_DIR": str(overlays)}
            with clock(times, "build"):
                session = sessions.enter_context(open_session([models], environ=environ))
            operations = recorded(overlays, replayed / str(number))
            with clock(times, "again"), open_session([models], environ=environ):
                pass
            with clock(times, "bare"):
                for call, arguments in operations:
                    call(*arguments)
            with clock(times, "unchanged"):
                unchanged = session.refresh()
            changing.write_text(config(f"round {number}"))
            settle(changing, LONG_AGO + number)
            with clock(times, "changed"):
                changed = session.refresh()
            with clock(times, "scan"):
                scan_cache_dir(session.hub_cache)
            if any(unchanged) or changed.changed != ("org-0/model-0",):  # a disk has seemed not to answer
                print("a round is left out, in which the machine was too busy", flush=True)
                for measured in times.values():
                    measured.pop()
    if len(times["build"]) < 2:
        raise SystemExit("not worth measuring: the machine is too busy")
    build, bare, again, unchanged_refresh, changed_refresh, scan = (
        min(times[name][1:]) for name in ("build", "bare", "again", "unchanged", "changed", "scan")
    )
    return [
        Ratio("build", build, "the bare system calls of the same tree", bare, goals.build),
        Ratio("a second session, opened and ended", again, "build", build, 0.2),
        Ratio("build", build, "one scan_cache_dir of it", scan, 1.0),
        milliseconds("refresh, nothing changed", unchanged_refresh, 10),
        Ratio("refresh, nothing changed", unchanged_refresh, "build", build, 0.03),
        Ratio("refresh, one model changed", changed_refresh, "build", build, 0.05),
    ]


def list_times(models: Path) -> list[Ratio]:
    """The list of models as the server's `GET /v1/models` has it: one request, and the slowest of eight at once."""

    async def at_once(library: Library, count: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(library.listed() for _ in range(count)))
        return time.perf_counter() - started

    with open_session([models]) as session:
        library = Library(session, None)
        shortest = {count: min(asyncio.run(at_once(library, count)) for _ in range(PROCESS_ROUNDS)) for count in (1, 8)}
    return [
        milliseconds("the server's list of models, one request", shortest[1], 15),
        milliseconds("the same, slowest of eight at once", shortest[8], 25),
    ]


def recorded(tree: Path, target: Path) -> list[Operation]:
    """The calls that make in `target` what is in `tree`."""
    operations = [Operation(os.mkdir, (str(target),))]
    for folder, folders, files in os.walk(tree):
        for name in sorted(folders + files):
            path = os.path.join(folder, name)
            copy = str(target / os.path.relpath(path, tree))
            if os.path.islink(path):
                operations.append(Operation(os.symlink, (os.readlink(path), copy)))
            elif os.path.isdir(path):
                operations.append(Operation(os.mkdir, (copy,)))
            else:
                operations.append(Operation(write, (copy, Path(path).read_bytes())))
    return operations


def write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(fd, content)
    os.close(fd)


# Processes -------------------------------------------------------------------------------------------------------


COMMANDS = Path(sys.executable).parent
OVERLAY = str(COMMANDS / "hf-overlay")


class Start(NamedTuple):
    """A command, and the goal for its processor time ÷ that of a Python that does nothing."""

    command: Sequence[str]
    goal: float


def model_ratios(disk: Path, models: int, goals: Goals) -> list[Ratio]:
    """Both commands that look at models, with none, some and many."""
    none, few, all_ = (["--model-path", str(disk / name)] for name in ("none", "few", "models"))
    measured = {
        "hf-overlay run -- true, no models": Start([OVERLAY, "run", *none, "--", "true"], 4),
        f"hf-overlay ls, {FEW_MODELS} models": Start([OVERLAY, "ls", *few], 3),
        f"hf-overlay run -- true, {FEW_MODELS} models": Start([OVERLAY, "run", *few, "--", "true"], goals.run_few),
        f"hf-overlay ls, {models} models": Start([OVERLAY, "ls", *all_], 6),
        f"hf-overlay run -- true, {models} models": Start([OVERLAY, "run", *all_, "--", "true"], goals.run),
    }
    return process_ratios(disk, measured)


def many_models_ratios(disk: Path, models: int) -> list[Ratio]:
    many = ["--model-path", str(disk / "many")]
    measured = {
        f"hf-overlay ls, {models} models": Start([OVERLAY, "ls", *many], 35),
        f"hf-overlay run -- true, {models} models": Start([OVERLAY, "run", *many, "--", "true"], 40),
    }
    return process_ratios(disk, measured, rounds=3)


def start_ratios(disk: Path) -> list[Ratio]:
    """How long both commands take to start and import what they need, without any model to look at."""
    server = str(COMMANDS / "mlx-omni-server")
    measured = {
        "hf-overlay --help": Start([OVERLAY, "--help"], 5),
        "hf-overlay ls, no models": Start([OVERLAY, "ls", "--model-path", str(disk / "none")], 2.5),
        "mlx-omni-server --help": Start([server, "--help"], 5),
    }
    return process_ratios(disk, measured)


def process_ratios(disk: Path, starts: Mapping[str, Start], rounds: int = PROCESS_ROUNDS) -> list[Ratio]:
    """Commands beside a Python that does nothing. They take turns, and a first round is not counted."""
    python = Start([sys.executable, "-c", "pass"], 1)
    environment = {**os.environ, "HF_HOME": str(disk / "no-cache")}
    shortest: dict[str, float] = {}
    for number in range(1 + rounds):
        for name, start in {**starts, "python": python}.items():
            seconds = processor_seconds(start.command, disk, environment)
            if number:
                shortest[name] = min(seconds, shortest.get(name, seconds))
    return [
        Ratio(name, shortest[name], "python -c pass", shortest["python"], start.goal) for name, start in starts.items()
    ]


def processor_seconds(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> float:
    """What a command takes, the programs that it starts and waits for included."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=null, stdout=null, stderr=null)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"not worth measuring: {' '.join(command)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def load_ratios(models: Path) -> list[Ratio]:
    """In processor time: a load runs on several threads, and 2 % of its wall time cannot be told from noise."""
    script = """
import gc, json, sys, time
import mlx_lm

shortest = {}
for round in range(1 + int(sys.argv[1])):
    for model in sorted(sys.argv[2:], reverse=round % 2 == 0):
        gc.collect()
        started = time.process_time()
        loaded = mlx_lm.load(model)
        seconds = time.process_time() - started
        del loaded
        if round:
            shortest[model] = min(seconds, shortest.get(model, seconds))
print(json.dumps(shortest))
"""
    model_id, path = "org/name", str(models / "org/name")
    with open_session([models]) as session:
        arguments = [sys.executable, "-c", script, str(LOAD_ROUNDS), model_id, path]
        result = subprocess.run(arguments, cwd=models.parent, env=session.environment, check=True, capture_output=True)
    shortest: Mapping[str, float] = json.loads(result.stdout)
    return [
        Ratio("mlx_lm.load through the overlay, processor time", shortest[model_id], "by path", shortest[path], 1.02)
    ]


# Models ----------------------------------------------------------------------------------------------------------


def make_models(root: Path, count: int, files: int) -> None:
    """As a drive holds them: ten in an organisation's folder, all copied long ago."""
    for number in range(count):
        folder = root / f"org-{number // 10}" / f"model-{number}"
        folder.mkdir(parents=True)
        for name, content in model_files(files).items():
            (folder / name).write_bytes(content)
            settle(folder / name)
        settle(folder)
        settle(folder.parent)


def model_files(count: int) -> dict[str, bytes]:
    """The files of a quantized Llama, with next to nothing in its weights and vocabulary, which nothing here loads."""
    small = SMALL_FILES[: max(1, count - 4)]
    shards = max(1, count - 2 - len(small))
    names = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    tensors = [
        f"model.layers.{layer}.{module}.{part}"
        for layer in range(LAYERS)
        for module in MODULES
        for part in ("weight", "scales", "biases")
    ]
    weight_map = {tensor: names[number * shards // len(tensors)] for number, tensor in enumerate(tensors)}
    index = json.dumps({"metadata": {"total_size": 4_500_000_000}, "weight_map": weight_map}, indent=4)
    return {
        "config.json": config("as downloaded").encode(),
        "model.safetensors.index.json": index.encode(),
        **dict.fromkeys(names, weights(b"content")),
        **dict.fromkeys(small, b"content"),
    }


def config(note: str) -> str:
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS, "note": note}
    return json.dumps(values, indent=4)


def settle(path: Path, seconds: int = LONG_AGO) -> None:
    os.utime(path, (seconds, seconds))


if __name__ == "__main__":
    sys.exit(main())
