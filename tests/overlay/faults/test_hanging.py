"""A disk that does not answer is like one that is unplugged: it hides its own models and comes back by itself (P7).

Tests have it twice: with calls that do not return in an ordinary folder, which works everywhere, and with a FUSE file
system, which holds even a process that is killed.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hf_overlay
import pytest

from tests.support import fuse_disk
from tests.support.folders import lay_model, unseal, weights
from tests.support.hfcache import add_repo, repo_folder
from tests.support.processes import OVERLAY, Finished, due, environment, eventually, finish, read_line, start

HANGING = Path(fuse_disk.__file__).with_name("hanging")
SECONDS = 5.0
"""What a command may take: a disk is given up on after 1.2 s, and one that is written to after 3 s."""


def bounded(arguments: list[str], environ: Mapping[str, str]) -> Finished:
    """Run a command that must end within `SECONDS`."""
    began = time.monotonic()
    done = finish([OVERLAY, *arguments], environ)
    assert time.monotonic() - began < due(SECONDS), done.err
    return done


class Disk:
    """A disk that can be made to hang."""

    def __init__(
        self,
        path: Path,
        hang: Callable[[], object],
        answer: Callable[[], object],
        environ: Mapping[str, str],
        hang_command: str,
    ) -> None:
        self.path = path
        self.hang = hang
        self.answer = answer
        self.environ = environ
        """What programs need in their environment for it."""
        self.hang_command = hang_command
        """What a shell says to make it hang."""
        self.takes_writes = bool(environ)


@pytest.fixture(params=["injected", "fuse"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """With the model `org/slow`."""
    if request.param == "injected":
        path, flag = tmp_path / "nas", tmp_path / "hangs"
        lay_model(path / "org/slow")
        environ = {"PYTHONPATH": str(HANGING), "HANG_BELOW": str(path), "HANG_WHILE": str(flag)}
        yield Disk(path, flag.touch, flag.unlink, environ, f"touch {flag}")
        return
    if (reason := fuse_disk.why_not()) is not None:
        pytest.skip(reason)
    lay_model(tmp_path / "behind/org/slow")
    with fuse_disk.mounted(tmp_path / "behind", tmp_path / "nas") as mounted:
        yield Disk(tmp_path / "nas", mounted.hang, mounted.answer, {}, f"kill -USR1 {mounted.pid}; sleep 0.2")


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
    done = bounded(arguments, environ)
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
    done = bounded([*arguments, *(["--kind", "any"] if arguments == ["ls"] else [])], environ)
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
        assert process.wait(due(SECONDS)) == 0


def test_a_signal_ends_a_command_before_the_disk_is_given_up_on(disk: Disk, environ: Mapping[str, str]) -> None:
    disk.hang()
    with start([OVERLAY, "run", "--", "sleep", "60"], environ) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(due(SECONDS))


@pytest.mark.slow
def test_a_cache_that_does_not_answer_hides_no_folder(disk: Disk, other: Path, home: Path) -> None:
    environ = environment(home, MLX_OMNI_MODEL_PATH=str(other), HF_HUB_CACHE=str(disk.path), **disk.environ)
    disk.hang()
    for arguments in (["ls"], ["path", "org/other"], ["plan"], ["run", "--", "sh", "-c", 'ls "$HF_HUB_CACHE"']):
        done = bounded(arguments, environ)
        assert done.status == 0, done.err
        assert "other" in done.out
    assert "does not answer" in done.err


def test_a_cache_and_folders_that_do_not_answer_take_no_longer_than_one(disk: Disk, other: Path, home: Path) -> None:
    paths = f"{disk.path}/a:{disk.path}/b:{disk.path}:{other}"
    environ = environment(home, MLX_OMNI_MODEL_PATH=paths, HF_HUB_CACHE=f"{disk.path}/hub", **disk.environ)
    disk.hang()
    done = bounded(["ls"], environ)
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
            assert time.monotonic() - began < due(2)
            began = time.monotonic()
            for _ in range(20):
                session.refresh()
            assert time.monotonic() - began < due(1), "a disk that hangs is waited for again and again"
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
        process.wait()
        disk.answer()
        eventually(lambda: not helpers_of(process.pid), "the helper ends")


# What waits for a cache, an HF_HOME or a folder of overlays that hangs ---------------------------------------------

DOWNLOAD = (
    'mkdir -p "$HF_HUB_CACHE/models--org--new/blobs" && echo downloaded > "$HF_HUB_CACHE/models--org--new/blobs/abc"'
)


def downloads_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("blobs/abc") if path.read_text() == "downloaded\n"]


@pytest.mark.slow
def test_a_download_for_a_cache_that_hangs_is_held_and_comes_home_once_it_answers(
    disk: Disk, home: Path, sessions: Path
) -> None:
    environ = environment(
        home,
        MLX_OMNI_MODEL_PATH=str(home),
        HF_HUB_CACHE=f"{disk.path}/hub",
        HF_OVERLAY_DIR=str(sessions),
        **disk.environ,
    )
    done = bounded(["run", "--", "sh", "-c", f"{DOWNLOAD}; {disk.hang_command}"], environ)
    assert done.status == 0, done.err
    [session] = sessions.glob("session-*")
    stays = f"{session} stays, with what was downloaded into it, until a later start: {disk.path}/hub does not answer"
    assert done.err.count(stays) == 1
    assert "check that drive or server" in done.err
    for arguments in (["clean"], ["run", "--", "true"]):
        done = bounded(arguments, environ)
        assert done.status == 0, done.err
        assert done.err.count(stays) == 1
        assert [*sessions.glob("session-*")] == [session], "a session without downloads needs no cache to be cleared"
        assert len(downloads_in(sessions)) == 1, "P3: nothing is lost"
    disk.answer()
    assert finish([OVERLAY, "clean"], environ).status == 0
    if disk.takes_writes:
        assert len(downloads_in(disk.path / "hub")) == 1, "P3: it comes home"
        assert [*sessions.glob("session-*")] == []
    else:
        assert len(downloads_in(sessions)) == 1, "a disk that is read-only takes nothing"
        shutil.rmtree(session)


def test_an_hf_home_that_hangs_keeps_nobody_waiting(disk: Disk, other: Path, home: Path, hub: Path) -> None:
    environ = environment(
        home, MLX_OMNI_MODEL_PATH=str(other), HF_HOME=str(disk.path), HF_HUB_CACHE=str(hub), **disk.environ
    )
    disk.hang()
    done = bounded(["run", "--", "sh", "-c", 'ls "$HF_HUB_CACHE"'], environ)
    assert done.status == 0
    assert "other" in done.out
    assert done.err.count(f"HF_HOME {disk.path} does not answer") == 1


@pytest.mark.parametrize("arguments", [["clean"], ["run", "--", "true"], ["env"]], ids=" ".join)
def test_a_folder_of_overlays_that_hangs_is_a_message(disk: Disk, home: Path, arguments: list[str]) -> None:
    environ = environment(home, HF_OVERLAY_DIR=f"{disk.path}/overlays", **disk.environ)
    disk.hang()
    done = bounded(arguments, environ)
    assert done.status == 1
    assert f"{disk.path}/overlays, the folder for overlays, does not answer; check its drive or server" in done.err


@pytest.mark.slow
def test_a_folder_of_overlays_that_hangs_hides_no_model_and_doctor_names_it(
    disk: Disk, other: Path, home: Path
) -> None:
    overlays = f"{disk.path}/overlays"
    environ = environment(home, MLX_OMNI_MODEL_PATH=str(other), HF_OVERLAY_DIR=overlays, **disk.environ)
    disk.hang()
    assert "other" in bounded(["plan"], environ).out
    assert f"{overlays}: does not answer" in bounded(["doctor"], environ).out


def test_a_signal_ends_an_overlay_whose_download_has_no_cache_to_go_to(
    disk: Disk, other: Path, home: Path, sessions: Path
) -> None:
    environ = environment(
        home,
        MLX_OMNI_MODEL_PATH=str(other),
        HF_HUB_CACHE=f"{disk.path}/hub",
        HF_OVERLAY_DIR=str(sessions),
        **disk.environ,
    )
    with start(
        [OVERLAY, "run", "--", "sh", "-c", f"{DOWNLOAD}; {disk.hang_command}; echo; sleep 60"], environ
    ) as process:
        read_line(process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(due(SECONDS)) == 128 + signal.SIGTERM
    disk.answer()
    assert len(downloads_in(sessions)) == 1
    unseal(sessions)
    shutil.rmtree(sessions)


def helpers_of(group: int) -> list[str]:
    """The processes of a session that are left."""
    listed = subprocess.run(["ps", "-eo", "sid=,args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.split()[0] == str(group) and "<defunct>" not in line]
