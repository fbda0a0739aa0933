"""What only macOS's disks do, here by fakes: iCloud, privacy settings, F_FULLFSYNC, and volumes without locks."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import hf_overlay
import pytest
from hf_overlay import config, keeping
from hf_overlay.tree import files, lease, moving

from tests.overlay.faults.seen import CACHED, said
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo


class Elsewhere:
    """What macOS says of a file whose bytes are in iCloud."""

    st_flags = 0x40000000

    def __init__(self, status: os.stat_result) -> None:
        self._status = status

    def __getattr__(self, name: str) -> Any:
        return getattr(self._status, name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sub/tokenizer.json"])
def test_a_file_that_icloud_keeps_elsewhere_is_not_there_and_is_not_read(
    name: str, models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: to read it would wait for a download of gigabytes."""
    lay_model(models / "org/mine", {"sub/tokenizer.json": b"{}"})
    lay_model(models / "org/other")
    away = (models / "org/mine" / name).stat().st_ino

    def fake(function: Any) -> Any:
        def told(*given: Any, **named: Any) -> Any:
            status = function(*given, **named)
            return Elsewhere(status) if status.st_ino == away else status

        return told

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", fake(os.stat))
        patched.setattr(os, "fstat", fake(os.fstat))
        with hf_overlay.open_session([models]) as session:
            assert [model.id for model in session.models] == ["org/other"]
            with pytest.raises(hf_overlay.IncompleteModel, match=f"{name} is in iCloud and not on this Mac.*Finder"):
                session.resolve("org/mine")
            patched.undo()
            assert session.refresh().added == ("org/mine",)


def test_privacy_settings_are_named_where_they_keep_a_program_out(
    models: Path, hub: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pane = "System Settings > Privacy & Security > Files and Folders"
    add_repo(hub, "org/cached", CACHED)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path) in (str(models), str(hub)):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with hf_overlay.open_session([models]) as session:
        [warning] = [each for each in said(caplog) if str(models) in each]
        assert "permission denied" in warning, "elsewhere it is what it always was"
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr("hf_overlay.mounts._bsd_mounts", dict)
        session.refresh()
        [warning] = [each for each in said(caplog) if str(models) in each]
        assert pane in warning
        problem = keeping.problem(str(hub))
        assert problem is not None
        assert pane in problem.advice
        monkeypatch.setattr(sys, "platform", "linux")


def test_a_download_is_on_the_disk_itself_before_its_source_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: fsync on macOS leaves the bytes in the drive's own memory."""
    source, target, aside = (str(tmp_path / name) for name in ("source", "blobs/target", "aside"))
    Path(source).write_bytes(b"weights")
    done: list[str] = []
    rename = os.rename

    def two_volumes(old: str, new: str) -> None:
        if old == source:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        done.append("renamed")
        rename(old, new)

    def full(fd: int, command: int, *_: object) -> int:
        assert command == 51
        assert os.path.samestat(os.fstat(fd), os.stat(aside))
        assert Path(source).exists()
        done.append("synced")
        return 0

    monkeypatch.setattr(os, "rename", two_volumes)
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    moving.move(source, target, aside)
    assert done == ["synced", "renamed"]
    assert (Path(source).exists(), Path(target).read_bytes()) == (False, b"weights")


def test_where_a_volume_does_not_know_f_fullfsync_it_is_synced_as_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def unknown(*_: object) -> int:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", unknown)
    monkeypatch.setattr(os, "fsync", synced.append)
    (tmp_path / "file").write_bytes(b"x")
    files.sync(str(tmp_path / "file"))
    monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    files.sync(str(tmp_path / "file"))
    assert len(synced) == 2


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_a_volume_without_locks_is_called_that(
    number: int, models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P12: no space that is freed there would help."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        with (
            pytest.raises(hf_overlay.SessionError, match=r"volume without file locks.*HF_OVERLAY_DIR") as raised,
            hf_overlay.open_session([models]),
        ):
            pass
    assert "space" not in str(raised.value)
    assert [path.name for path in sessions.glob("session-*")] == [], "nothing is left of it"


def test_what_is_held_is_no_volume_without_locks(sessions: Path) -> None:
    settings = config.Settings((), "/hub", "/home")
    owner = lease.Lease.acquire(str(sessions), settings)
    try:
        with lease.dead(str(sessions), owner.path) as is_dead:
            assert not is_dead
    finally:
        owner.release()
        lease.remove(owner.path)


@pytest.mark.parametrize(("number", "frees_space"), [(errno.ENOSPC, True), (errno.EACCES, False), (errno.EROFS, False)])
def test_only_a_full_disk_asks_for_space(
    number: int, frees_space: bool, models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "symlink", refuse)
    with (
        pytest.raises(hf_overlay.SessionError, match=os.strerror(number)) as raised,
        hf_overlay.open_session([models]),
    ):
        pass
    assert ("free some space" in str(raised.value)) == frees_space
