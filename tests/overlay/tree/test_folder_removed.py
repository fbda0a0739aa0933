"""A session's folder that something removes while it is open, as programs that empty caches do: it is made again."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay import config
from hf_overlay.gateway.hub import Hub, Unavailable
from hf_overlay.tree import lease
from hf_overlay.tree.clear import clear_dead
from hf_overlay.tree.lease import Lease
from huggingface_hub import snapshot_download

from tests.overlay.faults.seen import CACHED, WEIGHTS, assert_as_new, loaded, said, scanned
from tests.support import hfcache
from tests.support.folders import lay_model

PARTS = ["..", ".", "home", "home/hub", "hubs", "repos", config.OWNER_FILE]
"""What is removed: all sessions, this one, or a part of it."""


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for folder in [path, *(each for each in path.rglob("*") if each.is_dir() and not each.is_symlink())]:
            folder.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("part", PARTS)
def test_a_refresh_makes_again_what_was_removed(
    part: str, models: Path, hub: Path, home: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = lay_model(models / "org/mine")
    hfcache.add_repo(hub, "org/cached", CACHED)
    (home / ".cache/huggingface/datasets").mkdir()
    with hf_overlay.open_session([models]) as session:
        environment, descriptor = session.environment, session.owner_fd
        session.offer()
        for _ in range(2):
            remove(Path(os.path.normpath(session.path / part)))
            assert session.refresh() == hf_overlay.Changes((), (), ())
            assert scanned(session) == ["org/cached", "org/mine"]
            assert loaded(session, "org/mine") == (mine / WEIGHTS).read_bytes()
            assert session.home.joinpath("datasets").is_dir(), "P9: programs still find the rest of the user's home"
            assert_as_new(session)
            assert (session.environment, session.owner_fd) == (environment, descriptor)
            assert (session.path.stat().st_mode & 0o777, session.path.parent.stat().st_mode & 0o077) == (0o700, 0)
            assert clear_dead(str(session.path.parent)) == [], "its owner is known to be alive"
            owner = lease.read_owner(str(session.path))
            assert owner is not None
            assert owner.service == session.variables, "other programs can still join it"
        lay_model(models / "org/more")
        assert session.refresh().added == ("org/more",)
        path = session.path
    assert not path.exists()
    assert said(caplog) == []


def test_a_program_that_asks_the_gateway_finds_its_tree_again(models: Path, sessions: Path) -> None:
    """P2: else it would find an empty cache, and get all that it had."""
    lay_model(models / "org/mine")
    with hf_overlay.open_session([models]) as session:
        hub = Hub(session)
        for wanted in ("org/mine", "org/other"):
            remove(sessions)
            found = hub.refresh_and_find(wanted)
            assert not isinstance(found, Unavailable)
            assert scanned(session) == ["org/mine"]


@pytest.mark.parametrize("is_refreshed", [True, False])
def test_what_a_program_downloads_after_it_was_removed_comes_home(
    is_refreshed: bool, models: Path, hub: Path, sessions: Path
) -> None:
    """P3: it makes the folder itself, in which no owner's file tells whose it is."""
    lay_model(models / "org/mine")
    with hf_overlay.open_session([models]) as session:
        remove(sessions)
        hfcache.add_repo(session.hub_cache, "org/downloaded", CACHED)
        if is_refreshed:
            session.refresh()
            assert scanned(session) == ["org/downloaded", "org/mine"]
            assert loaded(session, "org/downloaded") == CACHED[WEIGHTS]
    assert {*os.listdir(sessions)} <= {"sessions.lock", "shared"}
    assert [folder.name for folder in hub.glob("models--*")] == ["models--org--downloaded"]
    folder = snapshot_download("org/downloaded", cache_dir=hub, local_files_only=True)
    assert Path(folder, WEIGHTS).read_bytes() == CACHED[WEIGHTS]


def test_a_folder_that_others_may_write_to_is_not_taken_for_it(models: Path, sessions: Path) -> None:
    with hf_overlay.open_session([models]) as session:
        remove(sessions)
        sessions.mkdir()
        sessions.chmod(0o777)
        with pytest.raises(hf_overlay.SessionError, match="can be written to by other users"):
            session.refresh()
        sessions.chmod(0o700)
        session.refresh()


# Where they were before ------------------------------------------------------------------------------------------


@pytest.fixture
def mac(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library of a home on macOS."""
    monkeypatch.setattr(sys, "platform", "darwin")
    return home / "Library"


def left_behind(folder: Path, hub: Path) -> Path:
    """A dead session in a folder of an earlier version, with a download in it."""
    folder.mkdir(parents=True, mode=0o700)
    settings = config.Settings((), str(hub), str(hub.parent))
    dead = Lease.acquire(str(folder), settings)
    hfcache.add_repo(Path(dead.path, "hubs/1"), f"org/{folder.parent.parent.name.lower()}", CACHED)
    os.close(dead.fd)
    return Path(dead.path)


def test_sessions_of_earlier_versions_are_cleared_and_their_downloads_come_home(
    mac: Path, home: Path, hub: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_overlay.tree.usage._processes", lambda *_: iter([(1, b"")]))
    monkeypatch.setattr("hf_overlay.mounts._bsd_mounts", dict)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setenv("HF_HOME", str(hub.parent))
    old = [left_behind(each / "hf-overlay/sessions", hub) for each in (mac / "Caches", home / "xdg")]
    with hf_overlay.open_session([models]) as session:
        assert session.path.parent == mac / "Application Support/hf-overlay/sessions"
        assert [each for each in old if each.exists()] == []
        assert scanned(session) == ["org/caches", "org/xdg"]


def test_an_earlier_folder_that_cannot_be_trusted_is_named_and_keeps_nobody_from_starting(
    mac: Path, hub: Path, models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_overlay.tree.usage._processes", lambda *_: iter([(1, b"")]))
    monkeypatch.setattr("hf_overlay.mounts._bsd_mounts", dict)
    old = left_behind(mac / "Caches/hf-overlay/sessions", hub)
    old.parent.chmod(0o777)
    with hf_overlay.open_session([models]):
        assert [str(old.parent) in warning for warning in said(caplog)] == [True]
    assert old.exists()


def test_a_folder_of_ones_own_choice_is_the_only_one(mac: Path) -> None:
    assert lease.all_sessions_folders({"HOME": "/Users/me", "HF_OVERLAY_DIR": "/mine"}) == ["/mine"]
    assert lease.all_sessions_folders({"HOME": "/Users/me"}) == [
        "/Users/me/Library/Caches/hf-overlay/sessions",
        "/Users/me/Library/Application Support/hf-overlay/sessions",
    ]
