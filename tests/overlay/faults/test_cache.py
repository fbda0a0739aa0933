"""Whatever is broken in the real cache hides itself alone, and scans do not fail (P7, P8)."""

from __future__ import annotations

import shutil
from pathlib import Path

import hf_overlay
import pytest

from tests.overlay.faults.seen import CACHED, ids, loaded, said, scanned
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo


def test_a_cache_that_does_not_exist_yet_is_no_fault_and_is_picked_up(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "org/mine")
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == scanned(session) == ["org/mine"]
        assert not hub.exists()
        add_repo(hub, "org/cached", CACHED)
        session.refresh()
        assert ids(session) == scanned(session) == ["org/cached", "org/mine"]
        shutil.rmtree(hub)
        session.refresh()
        assert ids(session) == scanned(session) == ["org/mine"]
        assert said(caplog) == []


def test_a_file_in_place_of_the_cache_is_said_once_each_time_and_hides_no_folder(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "org/mine")
    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"")
    with hf_overlay.open_session([models]) as session:
        for _ in range(2):
            assert [str(hub) in warning for warning in said(caplog)] == [True]
            session.refresh()
            assert ids(session) == scanned(session) == ["org/mine"]
            assert said(caplog) == []
            hub.unlink()
            add_repo(hub, "org/cached", CACHED)
            session.refresh()
            assert ids(session) == scanned(session) == ["org/cached", "org/mine"]
            assert said(caplog) == []
            shutil.rmtree(hub)
            hub.write_bytes(b"")
            session.refresh()


def test_a_cached_repo_that_makes_scans_fail_is_left_out_and_that_is_said_once(
    hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P12: a model that a person has is not hidden without a word."""
    add_repo(hub, "org/cached", CACHED)
    broken = add_repo(hub, "org/broken", CACHED).parents[1]
    with hf_overlay.open_session([]) as session:
        for _ in range(2):
            assert said(caplog) == []
            (broken / "refs/odd").write_bytes(b"\xff\xfe")
            session.refresh()
            assert [str(broken) in warning for warning in said(caplog)] == [True]
            session.refresh()
            assert said(caplog) == []
            assert scanned(session) == ["org/cached"]
            (broken / "refs/odd").unlink()
            session.refresh()
            assert scanned(session) == ["org/broken", "org/cached"]


def test_helper_files_of_the_system_lie_everywhere_and_hide_nothing(models: Path, hub: Path, sessions: Path) -> None:
    """AppleDouble files are what macOS writes beside each file on exFAT and network volumes; the Finder .DS_Store."""
    lay_model(models / "org/mine", {"nested/file.txt": b"x"})
    lay_model(models / "flat")
    add_repo(models, "org/second-cache", CACHED)
    add_repo(hub, "org/cached", CACHED)
    add_repo(hub, "org/data", CACHED, repo_type="dataset")
    for top in (models, hub):
        for path in [top, *top.rglob("*")]:
            if path.is_dir() and "snapshots" not in path.parts and "blobs" not in path.parts:
                (path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\xff")
            beside = path.parent / f"._{path.name}"
            in_a_caches_repo = {"refs", "snapshots"} & set(path.relative_to(top).parts[:-1])
            if path != top and not in_a_caches_repo:
                beside.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xa3")
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == ["flat", "org/cached", "org/mine", "org/second-cache"]
        assert scanned(session) == ["flat", "org/cached", "org/data", "org/mine", "org/second-cache"]
        for model_id in ids(session):
            assert loaded(session, model_id)
            names = [file.name for model in session.models if model.id == model_id for file in model.files]
            assert not [name for name in names if "._" in name or "DS_Store" in name]
