"""A disk that does not answer is like one that is unplugged: it hides its own models and comes back by itself (P7).

Tests have it twice: with calls that do not return in an ordinary folder, which works everywhere, and with a FUSE file
system, which holds even a process that is killed.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hf_overlay
import pytest

from tests.support import fuse_disk
from tests.support.folders import lay_model, weights
from tests.support.hfcache import add_repo, repo_folder
from tests.support.processes import OVERLAY, environment, eventually, finish, read_line, start

HANGING = Path(fuse_disk.__file__).with_name("hanging")
SECONDS = 5.0
"""What a command may take. Most of it is for a machine that is busy: the disk is given up on after 1.2 s."""


class Disk:
    """A disk that can be made to hang."""

    def __init__(
        self, path: Path, hang: Callable[[], object], answer: Callable[[], object], environ: Mapping[str, str]
    ) -> None:
        self.path = path
        self.hang = hang
        self.answer = answer
        self.environ = environ
        """What programs need in their environment for it."""


@pytest.fixture(params=["injected", "fuse"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """With the model `org/slow`."""
    if request.param == "injected":
        path, flag = tmp_path / "nas", tmp_path / "hangs"
        lay_model(path / "org/slow")
        environ = {"PYTHONPATH": str(HANGING), "HANG_BELOW": str(path), "HANG_WHILE": str(flag)}
        yield Disk(path, flag.touch, flag.unlink, environ)
        return
    if (reason := fuse_disk.why_not()) is not None:
        pytest.skip(reason)
    lay_model(tmp_path / "behind/org/slow")
    with fuse_disk.mounted(tmp_path / "behind", tmp_path / "nas") as mounted:
        yield Disk(tmp_path / "nas", mounted.hang, mounted.answer, {})


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model path that answers, with the model `org/other`."""
    lay_model(tmp_path / "other/org/other")
    return tmp_path / "other"


@pytest.fixture
def environ(disk: Disk, other: Path, home: Path) -> dict[str, str]:
    """Both are model paths; sessions are in a folder of their own."""
    return environment(home, MLX_OMNI_MODEL_PATH=f"{disk.path}:{other}", **disk.environ)


def silent(disk: Disk) -> str:
    return f"model path {disk.path} does not answer; going on with the other model paths and the Hugging Face cache"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["ls"], 0),
        (["plan"], 0),
        (["path", "org/other"], 0),
        (["why", "org/other"], 0),
        (["run", "--", "sh", "-c", 'ls "$HF_HUB_CACHE"'], 0),
        (["path", "org/slow"], 1),
        (["doctor"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_ends_and_the_other_models_are_there(
    disk: Disk, environ: Mapping[str, str], arguments: list[str], status: int
) -> None:
    disk.hang()
    began = time.monotonic()
    done = finish([OVERLAY, *arguments], environ)
    assert time.monotonic() - began < SECONDS
    assert done.status == status, done.err
    if arguments == ["doctor"]:
        assert f"{disk.path}: does not answer" in done.out
    else:
        assert done.err.count(silent(disk)) == 1, "P7: says so once"
    assert status != 0 or "other" in done.out


@pytest.mark.parametrize("arguments", [["ls"], ["plan"], ["run", "--", "sh", "-c", 'ls "$HF_HUB_CACHE"']], ids=" ".join)
def test_a_tier_that_hangs_hides_only_what_it_holds(
    disk: Disk, other: Path, home: Path, hub: Path, arguments: list[str]
) -> None:
    """As a model path does. What the own cache has of the same repos is there."""
    add_repo(hub, "org/own", {"config.json": b"{}", "model.safetensors": weights(b"own"), "tokenizer.json": b"{}"})
    environ = environment(home, MLX_OMNI_MODEL_PATH=str(other), HF_OVERLAY_BELOW=str(disk.path), **disk.environ)
    assert "slow" in finish([OVERLAY, *arguments], environ).out
    disk.hang()
    began = time.monotonic()
    done = finish([OVERLAY, *arguments, *(["--kind", "any"] if arguments == ["ls"] else [])], environ)
    assert time.monotonic() - began < SECONDS
    assert done.status == 0, done.err
    assert "other" in done.out
    assert "own" in done.out
    assert "slow" not in done.out
    silent = f"folder below the cache {disk.path} does not answer; going on without it"
    assert done.err.count(silent) == 1, "P7: says so once"


@pytest.mark.slow
def test_it_comes_back_by_itself_while_an_overlay_is_served(disk: Disk, environ: Mapping[str, str]) -> None:
    with start([OVERLAY, "serve", "--interval", "0.2"], environ) as process:

        def hears(*texts: str) -> None:
            for text in texts:
                while text not in (line := read_line(process.stderr)):
                    assert line, f"it ended without saying {text!r}"

        hears("serving")
        for _ in range(2):
            disk.hang()
            hears(silent(disk), "removed: org/slow")
            disk.answer()
            hears("added: org/slow")
        disk.hang()
        hears(silent(disk))
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def test_a_signal_ends_a_command_before_the_disk_is_given_up_on(disk: Disk, environ: Mapping[str, str]) -> None:
    disk.hang()
    with start([OVERLAY, "run", "--", "sleep", "60"], environ) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)


@pytest.mark.slow
def test_a_cache_that_does_not_answer_hides_no_folder(disk: Disk, other: Path, home: Path) -> None:
    environ = environment(home, MLX_OMNI_MODEL_PATH=str(other), HF_HUB_CACHE=str(disk.path), **disk.environ)
    disk.hang()
    for arguments in (["ls"], ["path", "org/other"], ["plan"], ["run", "--", "sh", "-c", 'ls "$HF_HUB_CACHE"']):
        began = time.monotonic()
        done = finish([OVERLAY, *arguments], environ)
        assert time.monotonic() - began < SECONDS
        assert done.status == 0, done.err
        assert "other" in done.out
    assert "does not answer" in done.err


def test_a_cache_and_folders_that_do_not_answer_take_no_longer_than_one(disk: Disk, other: Path, home: Path) -> None:
    paths = f"{disk.path}/a:{disk.path}/b:{disk.path}:{other}"
    environ = environment(home, MLX_OMNI_MODEL_PATH=paths, HF_HUB_CACHE=f"{disk.path}/hub", **disk.environ)
    disk.hang()
    began = time.monotonic()
    done = finish([OVERLAY, "ls"], environ)
    assert time.monotonic() - began < SECONDS
    assert "org/other" in done.out


def test_a_session_names_the_disk_uses_the_caches_copy_and_loads_the_others_at_once(
    other: Path, hub: Path, sessions: Path, tmp_path: Path
) -> None:
    if (reason := fuse_disk.why_not()) is not None:
        pytest.skip(reason)
    for name in ("slow", "both"):
        lay_model(tmp_path / "behind/org" / name)
    cached = add_repo(hub, "org/both", other / "org/other")
    with fuse_disk.mounted(tmp_path / "behind", tmp_path / "nas") as disk:  # noqa: SIM117 - in this order
        with hf_overlay.open_session([tmp_path / "nas", other]) as session:
            assert [model.id for model in session.models] == ["org/both", "org/other", "org/slow"]
            disk.hang()
            began = time.monotonic()
            assert session.refresh().removed == ("org/both", "org/slow")
            assert session.resolve("org/other") == other / "org/other"
            assert session.resolve("org/both") == cached
            with pytest.raises(hf_overlay.SourceAway, match=f"{tmp_path}/nas, which does not answer"):
                session.resolve("org/slow")
            assert time.monotonic() - began < 2
            began = time.monotonic()
            for _ in range(20):
                session.refresh()
            assert time.monotonic() - began < 1, "a disk that hangs is waited for again and again"
            assert (session.hub_cache / repo_folder("org/both")).exists()
            disk.answer()
            eventually(lambda: "org/slow" in session.refresh().added, "it is back")
            assert session.resolve("org/slow") == tmp_path / "nas/org/slow"


def test_a_process_that_is_killed_leaves_nothing_behind_once_the_disk_answers(
    disk: Disk, environ: Mapping[str, str]
) -> None:
    with start([OVERLAY, "serve", "--interval", "0.2"], environ) as process:
        assert "model paths" in read_line(process.stderr)
        assert "serving" in read_line(process.stderr)
        disk.hang()
        while "does not answer" not in read_line(process.stderr):
            pass
        process.kill()
        process.wait(SECONDS)
        disk.answer()
        eventually(lambda: not helpers_of(process.pid), "the helper ends")


def helpers_of(group: int) -> list[str]:
    """The processes of a session that are left."""
    listed = subprocess.run(["ps", "-eo", "sid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group) and "<defunct>" not in line]
