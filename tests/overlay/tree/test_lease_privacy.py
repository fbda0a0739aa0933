"""Sessions are their owner's alone, lie where the user keeps caches, and leave nothing where they cannot begin."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_overlay.config import OWNER_FILE, Settings
from hf_overlay.tree import lease

_SETTINGS = Settings(roots=(), hub_cache="/hub", hf_home="/home")


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A shell that lets everybody read and write what it makes."""
    before = os.umask(0)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_nobody_else_may_read_or_write_a_session(tmp_path: Path, open_umask: None) -> None:
    sessions = tmp_path / "sessions"
    owner = lease.Lease.acquire(str(sessions), _SETTINGS)
    session = Path(owner.path)
    modes = {path.name: _mode(path) for path in (sessions, session, session / OWNER_FILE, sessions / "sessions.lock")}
    owner.release()
    assert modes == {"sessions": 0o700, session.name: 0o700, OWNER_FILE: 0o600, "sessions.lock": 0o600}


@pytest.mark.parametrize(
    ("platform", "environ", "folder"),
    [
        ("linux", {"HOME": "/me"}, "/me/.cache/hf-overlay/sessions"),
        ("darwin", {"HOME": "/me"}, "/me/Library/Application Support/hf-overlay/sessions"),
        ("linux", {"HOME": "/me", "XDG_CACHE_HOME": "/fast"}, "/fast/hf-overlay/sessions"),
        ("darwin", {"HOME": "/me", "XDG_CACHE_HOME": "/fast"}, "/me/Library/Application Support/hf-overlay/sessions"),
        ("linux", {"HOME": "/me", "XDG_CACHE_HOME": "relative"}, "/me/.cache/hf-overlay/sessions"),
        ("linux", {"HOME": "/me", "XDG_CACHE_HOME": ""}, "/me/.cache/hf-overlay/sessions"),
        ("linux", {"HOME": "/me", "HF_OVERLAY_DIR": "/own", "XDG_CACHE_HOME": "/fast"}, "/own"),
        ("linux", {"HOME": "/me", "HF_OVERLAY_DIR": ""}, "/me/.cache/hf-overlay/sessions"),
    ],
)
def test_sessions_lie_where_the_user_keeps_caches(
    platform: str, environ: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert lease.sessions_folder(environ) == folder


def _left(sessions: Path) -> list[str]:
    return [path.name for path in sessions.iterdir() if path.name != "sessions.lock"]


def test_a_session_that_cannot_be_recorded_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)  # a full disk writes less than it is given
    with pytest.raises(OSError) as caught:
        lease.Lease.acquire(str(tmp_path), _SETTINGS)
    assert caught.value.errno == errno.ENOSPC
    assert _left(tmp_path) == []


def test_a_session_whose_owner_s_file_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def full(path: Any, *more: Any, **named: Any) -> int:
        if os.path.basename(path) == OWNER_FILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, *more, **named)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError) as caught:
        lease.Lease.acquire(str(tmp_path), _SETTINGS)
    assert caught.value.errno == errno.ENOSPC
    assert _left(tmp_path) == []


def test_no_descriptor_is_left_of_a_session_that_could_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold the lock of a folder that is gone."""
    probe = os.open(os.devnull, os.O_RDONLY)
    os.close(probe)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError):
        lease.Lease.acquire(str(tmp_path), _SETTINGS)
    again = os.open(os.devnull, os.O_RDONLY)
    os.close(again)
    assert again == probe


def test_before_the_first_session_there_are_none(tmp_path: Path) -> None:
    assert lease.sessions_in(str(tmp_path / "not there yet")) == []


def test_only_sessions_are_taken_for_sessions(tmp_path: Path) -> None:
    for name in ("session-2-b", "session-1-a", "other", "sessions.lock"):
        (tmp_path / name).mkdir()
    assert [os.path.basename(path) for path in lease.sessions_in(str(tmp_path))] == ["session-1-a", "session-2-b"]


def test_a_folder_whose_owner_died_before_its_file_was_there_can_be_removed(tmp_path: Path) -> None:
    session = tmp_path / "session-1-1"
    session.mkdir()
    lease.remove(str(session))
    assert not session.exists()
