"""What another user may have written is neither evaluated, nor moved, nor removed (ssh treats its keys so)."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay import doctor
from hf_overlay.command import serve
from hf_overlay.config import OWNER_FILE
from hf_overlay.errors import OverlayError
from hf_overlay.messages import Messages
from hf_overlay.tree import lease

from tests.support.folders import temporary_folder
from tests.support.processes import OVERLAY, environment, finish
from tests.support.sessions import new_name

NOBODY = 65534
OTHERS_BITS = [0o020, 0o002, 0o1002]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


def plant(sessions: Path, service: dict[str, object]) -> Path:
    """A session as `hf-overlay serve` leaves it while it lives."""
    session = sessions / new_name()
    (session / "hubs").mkdir(parents=True)
    record = {"pid": 1, "started": 1.0, "sources": [], "hub_cache": "/hub", "service": service}
    (session / OWNER_FILE).write_text(json.dumps(record))
    session.chmod(0o700)
    return session


@contextmanager
def living(session: Path) -> Iterator[None]:
    with (session / OWNER_FILE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def folder(home: Path) -> Path:
    sessions = home / "sessions"
    sessions.mkdir(mode=0o700)
    return sessions


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users can get to, unlike pytest's."""
    with temporary_folder(Path("/tmp")) as path:
        yield path


@pytest.mark.parametrize("bits", OTHERS_BITS)
def test_a_sessions_folder_that_others_may_write_to_is_refused_by_every_command(
    home: Path, folder: Path, bits: int
) -> None:
    session = plant(folder, {"HF_HUB_CACHE": "/theirs"})
    folder.chmod(0o700 | bits)
    environ = environment(home, HF_OVERLAY_DIR=str(folder))
    for command in (["env"], ["clean"], ["run", "--", "true"], ["serve"]):
        done = finish([OVERLAY, *command], environ)
        assert (done.status, done.out) == (1, ""), command
        assert f"chmod go-w {folder}" in done.err
        assert done.err.count("\n") - done.err.count("using HuggingFace cache only") == 1, done.err
    assert session.exists(), "nothing in there is touched"
    assert "HF_OVERLAY_DIR" in finish([OVERLAY, "doctor"], environ).out
    folder.chmod(0o700)
    assert finish([OVERLAY, "clean"], environ).status == 0
    assert not session.exists()


@as_root
def test_a_sessions_folder_of_another_user_is_refused(home: Path, folder: Path) -> None:
    session = plant(folder, {"HF_HUB_CACHE": "/theirs"})
    os.chown(folder, NOBODY, NOBODY)
    for command in (["env"], ["clean"], ["run", "--", "true"]):
        done = finish([OVERLAY, *command], environment(home, HF_OVERLAY_DIR=str(folder)))
        assert (done.status, done.out) == (1, ""), command
        assert f"belongs to another user (uid {NOBODY})" in done.err
    assert session.exists()


@as_root
def test_a_session_that_another_user_planted_is_ignored_with_a_warning(home: Path, reachable: Path) -> None:
    """By a real process of that user, while anybody could write there."""
    folder = reachable
    folder.chmod(0o1777)
    evil = json.dumps({"pid": 1, "started": 9e9, "sources": [], "hub_cache": "/", "service": {"A;id;B": "x"}})
    script = (
        'mkdir "$1/session-2-2" && printf %s "$2" > "$1/session-2-2/$3" && '
        'mkdir "$1/session-2-2/hubs" && ln -s / "$1/session-3-3"'
    )
    command = ["/bin/sh", "-c", script, "sh", str(folder), evil, OWNER_FILE]
    subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], check=True, cwd="/")
    folder.chmod(0o700)
    environ = environment(home, HF_OVERLAY_DIR=str(folder))
    with living(folder / "session-2-2"):
        done = finish([OVERLAY, "env"], environ)
    assert (done.status, done.out) == (1, "")
    for name in ("session-2-2", "session-3-3"):
        assert f"{folder}/{name}" in done.err
    assert "id;" not in done.err
    assert finish([OVERLAY, "clean"], environ).out == ""
    assert finish([OVERLAY, "run", "--", "true"], environ).status == 0
    assert sorted(path.name for path in folder.glob("session-*")) == ["session-2-2", "session-3-3"]


@pytest.mark.parametrize("bits", OTHERS_BITS)
def test_a_session_that_others_may_write_to_is_ignored(
    folder: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    session = plant(folder, {})
    session.chmod(0o700 | bits)
    assert lease.sessions_in(str(folder), Messages()) == []
    assert [str(session) in record.getMessage() for record in caplog.records] == [True]
    session.chmod(0o700)
    assert lease.sessions_in(str(folder)) == [str(session)]


@pytest.mark.parametrize(
    "service",
    [
        {"HF_HUB_CACHE": "/hub", "X=1; touch pwned; Y": "z"},
        {"HF_HUB_CACHE": "/hub", "PATH": "/theirs"},
        {"HF_HUB_CACHE": "/hub", "LD_PRELOAD": "/theirs.so"},
        {"HF_HUB_CACHE": ["/hub"]},
        {"": "x"},
    ],
)
def test_no_shell_gets_a_name_that_no_overlay_sets(folder: Path, service: dict[str, object]) -> None:
    with living(plant(folder, service)), pytest.raises(OverlayError, match="no overlay sets"):
        serve.offered({"HF_OVERLAY_DIR": str(folder)})


def test_every_variable_that_a_session_changes_is_one_that_shells_may_get(models: Path, sessions: Path) -> None:
    with hf_overlay.open_session([models], gateway=True) as session:
        session.offer()
        offered = serve.offered({**os.environ, "http_proxy": "http://proxy"}).variables
    assert {"HF_HUB_CACHE", "HF_ENDPOINT", "no_proxy", "TRANSFORMERS_CACHE"} <= offered.keys()


def test_a_value_is_quoted_whatever_is_in_it() -> None:
    value = "/a b'; touch pwned; '$(id)`id`\n\"x"
    done = subprocess.run(
        ["/bin/sh", "-c", f'{serve.as_shell({"HF_HOME": value}, "sh")} printf %s "$HF_HOME"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == value


def test_doctor_is_well_with_a_folder_of_our_own(folder: Path) -> None:
    assert list(doctor._stale(str(folder))) == []
