"""Folders of models as nobody should have them, drawn at random: the commands and the server answer all the same.

P7 and P12: each of them answers within two seconds, without a traceback, and has the good model that lies beside.
`lost` counts answers without the good model, `held` nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx2

from tests.support import hubs
from tests.support.folders import lay_model
from tests.support.models import make_model
from tests.support.processes import OVERLAY, due, environment, start
from tests.support.server import Server, serving
from tests.support.soak import Row, took

GOOD = "good/model"
DEADLINE = 2.0
"""Seconds in which everything answers."""
GIVEN_UP = 60.0
"""Seconds after which a command is killed."""
COMMANDS = (("ls",), ("ls", "--json"), ("doctor",), ("plan",), ("path", GOOD), ("why", GOOD))
NAMES = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "notes.txt",
    "tokenizer.json",
    "tokenizer_config.json",
)
JSON = (b"null", b"[]", b'"x"', b"{", b"", b"\xff\xfe", b'{"model_type": []}', b'{"model_type": null}', b"[" * 100_000)
ODD = (b"\xff\xfe", b"a\nb", b"-rf", b"--", b"a" * 250, b"\x1b[31mred", b".hidden", b"e\xcc\x81", b"$(id)", b"a b'\"")


def run(place: Path, seconds: float, random: Random) -> Row:
    """Lay a new drive again and again, and ask every command and a server that watches it."""
    home, drive = place / "home", place / "drive"
    home.mkdir()
    kept = make_model(place / "kept", "Paris.")
    environ = environment(home, HF_OVERLAY_DIR=str(home / "sessions"), **hubs.environment(hubs.INSTALLED))
    watch = _Watch()
    _lay(drive, kept, random)
    with serving(home / "server", drive, options=["--offline"]) as server:
        ends = time.monotonic() + seconds
        while True:
            hostile = _lay(drive, kept, random)
            watch.say(*_ask(server), f"GET /v1/models with {hostile}")
            command = random.choice(COMMANDS)
            watch.say(*_run(command, drive, environ), f"hf-overlay {' '.join(command)} with {hostile}")
            if time.monotonic() > ends:
                break
        _empty(drive)
    return Row(watch.tried, watch.lost, watch.waited, broken=tuple(watch.broken))


class _Watch:
    """Counts answers."""

    def __init__(self) -> None:
        self.tried = self.lost = 0
        self.waited = 0.0
        self.broken: list[str] = []

    def say(self, seconds: float, is_whole: bool, fault: str, what: str) -> None:
        """One answer: how long it took, if it had the good model, and what is wrong with it beside that."""
        self.tried += 1
        self.lost += not is_whole
        self.waited = max(self.waited, seconds)
        if seconds > due(DEADLINE):
            self.broken.append(f"P7: {seconds:.1f} s for {what}")
        if not is_whole:
            self.broken.append(f"P7: the good model is missing in {what}")
        if fault:
            self.broken.append(f"P12: {what}: {fault}")


def _ask(server: Server) -> tuple[float, bool, str]:
    started = time.monotonic()
    try:
        answer = server.http.get("/v1/models", timeout=GIVEN_UP)
    except httpx2.HTTPError as error:
        return took(started), False, type(error).__name__
    is_whole = answer.status_code == 200 and GOOD in [model["id"] for model in answer.json()["data"]]
    return took(started), is_whole, "" if answer.status_code == 200 else f"status {answer.status_code}"


def _run(command: tuple[str, ...], drive: Path, environ: dict[str, str]) -> tuple[float, bool, str]:
    name, *rest = command
    arguments = [OVERLAY, name, "--model-path", str(drive), *rest]
    started = time.monotonic()
    with start(arguments, environ) as process:
        try:
            out, err = process.communicate(timeout=GIVEN_UP)
        except subprocess.TimeoutExpired:
            return took(started), False, "it never ended"
    seconds = took(started)
    # `doctor` names what is wrong, and exits 1 for it; the others have what they were asked for.
    is_whole = name == "doctor" or (process.returncode == 0 and (b"good" in out))
    fault = err.decode("utf-8", "replace").splitlines()[-1] if b"Traceback" in err else ""
    return seconds, is_whole, fault


# Laying ----------------------------------------------------------------------------------------------------------


def _lay(drive: Path, kept: Path, random: Random) -> str:
    """A drive with the good model and some hostile folders; returns what these are, for a message."""
    _empty(drive)
    shutil.copytree(kept, drive / GOOD)
    laid = []
    for number in range(random.randrange(1, 8)):
        hostile = random.choice(HOSTILE)
        folder = drive / f"org-{number}" / "model"
        if random.random() < 0.5:
            shutil.copytree(kept, folder)
        else:
            lay_model(folder)
        laid.append(f"{hostile.__name__.strip('_')} {hostile(folder, random) or ''}".strip())
    return ", ".join(laid)


def _empty(drive: Path) -> None:
    for path, folders, _ in os.walk(drive):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(drive, ignore_errors=True)
    drive.mkdir(parents=True, exist_ok=True)


def _free(folder: Path, random: Random) -> Path:
    """One of a model's usual names, with nothing there."""
    path = folder / random.choice(NAMES)
    path.unlink(missing_ok=True)
    return path


def _fifo(folder: Path, random: Random) -> str:
    path = _free(folder, random)
    os.mkfifo(path)
    return path.name


def _link(folder: Path, random: Random) -> str:
    path = _free(folder, random)
    target = random.choice(
        ["/dev/zero", "/dev/null", "/dev/tty", "/etc/shadow", "/proc/self/mem", path.name, ".", ".."]
    )
    path.symlink_to(target)
    return f"{path.name} -> {target}"


def _socket(folder: Path, random: Random) -> str:
    path = _free(folder, random)
    here = os.open(folder, os.O_RDONLY)  # the name of a socket may have about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{here}/{path.name}" if os.path.isdir("/proc/self/fd") else str(path))
    finally:
        os.close(here)
    return path.name


def _cut(folder: Path, random: Random) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, random.randrange(path.stat().st_size))


def _header(folder: Path, random: Random) -> None:
    length = random.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + random.randbytes(20))


def _json(folder: Path, random: Random) -> str:
    path = folder / random.choice([name for name in NAMES if name.endswith(".json")])
    path.write_bytes(random.choice(JSON))
    return path.name


def _huge(folder: Path, random: Random) -> str:
    path = _free(folder, random)
    with path.open("wb") as file:
        file.truncate(random.choice([2**26 + 1, 2**34]))  # sparse
    return path.name


def _odd(folder: Path, random: Random) -> None:
    name = random.choice(ODD)
    for place in (folder, folder.parent):
        path = os.fsencode(place) + b"/" + name
        os.mkdir(path)
        shutil.copy2(os.fsencode(folder / "config.json"), path + b"/config.json")


def _loop(folder: Path, random: Random) -> None:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    (folder / "up").symlink_to(random.choice([folder, folder.parent, folder.parents[1]]), target_is_directory=True)


def _closed(folder: Path, random: Random) -> None:
    random.choice([folder, folder.parent, folder / "config.json", folder / "model.safetensors"]).chmod(0)


def _deep(folder: Path, random: Random) -> None:
    deepest = folder.joinpath(*["d"] * random.choice([20, 200]))
    deepest.mkdir(parents=True)
    for number in range(random.randrange(300)):
        (folder / f"{number}.txt").touch()


HOSTILE: tuple[Callable[[Path, Random], str | None], ...] = (
    _fifo,
    _link,
    _socket,
    _cut,
    _header,
    _json,
    _huge,
    _odd,
    _loop,
    _closed,
    _deep,
)
"""Each makes a model's folder hostile in one way, and returns what a message needs to say of it."""
