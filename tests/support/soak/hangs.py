"""Two disks that stop answering at random moments, and answer again: a model path's, and the real cache's.

P7 and P3: every command ends in time, the models on other disks are there, and no download is lost. `lost` counts
answers without the good model and downloads that are nowhere, `waited` is how long the slowest command took, and `held`
counts downloads that are still in a session although the cache answers.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.support import fuse_disk
from tests.support.folders import lay_model
from tests.support.processes import OVERLAY, due, environment, start, succeed
from tests.support.soak import Row, took

GOOD = "good/model"
DEADLINE = 5.0
"""Seconds in which a command ends: a disk is given up on after 1.2 s, and one that is written to after 3 s."""
GIVEN_UP = 60.0
COMMANDS = (("ls",), ("doctor",), ("plan",), ("path", GOOD), ("why", GOOD), ("clean",), ("run", "--", "true"))
SHOW_GOOD = ("ls", "path", "why")
HANGING = Path(fuse_disk.__file__).with_name("hanging")


class _Disk(NamedTuple):
    path: Path
    flag: Path
    """Where it is injected: it hangs while this file is there."""
    hang: Callable[[], object]
    answer: Callable[[], object]


def run(place: Path, seconds: float, random: Random) -> Row:
    """Let one of the disks, or both, hang, ask something, and let them answer."""
    home, tried, downloads = place / "home", 0, 0
    home.mkdir()
    lay_model(place / "local" / GOOD)
    cache = _injected(place / "cache", place / "cache-hangs")
    waits: list[float] = []
    broken: list[str] = []
    with _drive(place) as drive:
        environ = environment(
            home,
            HF_OVERLAY_DIR=str(home / "sessions"),
            HF_HUB_CACHE=str(cache.path / "hub"),
            MLX_OMNI_MODEL_PATH=f"{drive.path}:{place / 'local'}",
            PYTHONPATH=str(HANGING),
            HANG_BELOW=f"{cache.path}:{drive.path}",
            HANG_WHILE=f"{cache.flag}:{drive.flag}",
        )
        ends = time.monotonic() + seconds
        while tried == 0 or time.monotonic() < ends:
            tried += 1
            hanging = random.choice([[cache], [drive], [cache, drive]])
            if random.random() < 0.4:
                downloads += 1
                command = _downloading(downloads, cache.flag if cache in hanging else None)
            else:
                command = random.choice(COMMANDS)
                if cache in hanging:
                    cache.hang()
            if drive in hanging:
                drive.hang()
            seconds_taken, fault = _ask(command, environ)
            waits.append(seconds_taken)
            if fault:
                names = " and ".join(disk.path.name for disk in hanging)
                broken.append(f"P7: {' '.join(command)[:60]}, while the {names} hangs: {fault}")
            for disk in hanging:
                disk.answer()
        lost = len(broken)
        succeed([OVERLAY, "clean"], environ)
    came, stayed = _downloads(cache.path), _downloads(home / "sessions")
    if gone := downloads - len(came | stayed):
        broken.append(f"P3: {gone} downloads are lost")
    if held := len(stayed - came):
        broken.append(f"P3: {held} downloads did not come to the cache, which answers")
    return Row(tried, lost + gone, max(waits), held, tuple(broken))


def _injected(path: Path, flag: Path) -> _Disk:
    """An ordinary folder; calls of programs that are started for it do not return while it hangs."""
    path.mkdir()
    return _Disk(path, flag, flag.touch, lambda: flag.unlink(missing_ok=True))


@contextmanager
def _drive(place: Path) -> Iterator[_Disk]:
    """A disk with a model: a FUSE file system where there can be one."""
    flag = place / "drive-hangs"
    if fuse_disk.why_not() is not None:
        disk = _injected(place / "drive", flag)
        lay_model(disk.path / "org/slow")
        yield disk
        return
    lay_model(place / "behind/org/slow")
    with fuse_disk.mounted(place / "behind", place / "drive") as mounted:
        yield _Disk(place / "drive", flag, mounted.hang, mounted.answer)


def _downloading(number: int, flag: Path | None) -> tuple[str, ...]:
    """A program that writes a repo into its cache, the disk of which hangs afterwards."""
    repo = f"$HF_HUB_CACHE/models--org--name{number}"
    write = f'mkdir -p "{repo}/blobs" "{repo}/snapshots" && echo {number} > "{repo}/blobs/{number:040}"'
    return ("run", "--", "sh", "-c", write if flag is None else f"{write} && touch {flag}")


def _ask(command: tuple[str, ...], environ: Mapping[str, str]) -> tuple[float, str]:
    """How long a command took, and what is wrong with it, if anything is."""
    began = time.monotonic()
    with start([OVERLAY, *command], environ) as process:
        try:
            out, err = process.communicate(timeout=GIVEN_UP)
        except subprocess.TimeoutExpired:
            return took(began), "it never ended"
    seconds = took(began)
    if b"Traceback" in err:
        return seconds, err.decode("utf-8", "replace").splitlines()[-1]
    if command[0] in SHOW_GOOD and b"good" not in out:
        return seconds, "the good model is missing"
    return seconds, f"it took {seconds:.1f} s" if seconds > due(DEADLINE) else ""


def _downloads(folder: Path) -> set[str]:
    return {path.read_text().strip() for path in folder.rglob("models--org--name*/blobs/*")}
