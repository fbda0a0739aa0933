"""A drive that goes away hides its own models alone, says so once, and is back when it is plugged in (P7)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

import hf_overlay
import pytest
from huggingface_hub import scan_cache_dir, snapshot_download

from tests.overlay.faults.seen import CACHED, WEIGHTS, assert_as_new, ids, loaded, moment, said, scanned
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """Where a drive is while it is unplugged."""
    return tmp_path / "unplugged"


def test_a_drive_that_is_not_there_yet_is_said_once_and_picked_up_when_it_appears(
    models: Path, away: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "org/mine")
    models.rename(away)
    add_repo(hub, "org/cached", CACHED)
    with hf_overlay.open_session([models]) as session:
        assert [str(models) in warning for warning in said(caplog)] == [True]
        assert ids(session) == scanned(session) == ["org/cached"]
        assert loaded(session, "org/cached") == CACHED[WEIGHTS]
        assert session.refresh() == hf_overlay.Changes((), (), ())
        away.rename(models)
        assert session.refresh() == hf_overlay.Changes(("org/mine",), (), ())
        assert ids(session) == scanned(session) == ["org/cached", "org/mine"]
        assert said(caplog) == []


def test_between_listing_and_load_a_drive_that_is_gone_is_named_and_the_caches_copy_answers(
    models: Path, away: Path, hub: Path, sessions: Path
) -> None:
    lay_model(models / "org/mine")
    lay_model(models / "org/both")
    cached = add_repo(hub, "org/both", CACHED)
    with hf_overlay.open_session([models]) as session:
        models.rename(away)
        with pytest.raises(hf_overlay.SourceAway, match=str(models)):
            session.resolve("org/mine")
        assert session.resolve("org/both") == cached
        session.refresh()
        assert session.models_away == {"org/mine": str(models), "org/both": str(models)}
        away.rename(models)
        session.refresh()
        assert session.models_away == {}
        assert session.resolve("org/mine") == models / "org/mine"
        assert session.resolve("org/both") == models / "org/both"


def test_an_unplugged_drive_is_said_each_time_it_goes_and_back_without_a_word(
    models: Path, away: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = lay_model(models / "org/mine", settled=True)
    both = lay_model(models / "org/both")
    cached = add_repo(hub, "org/both", CACHED)
    weights = (both / WEIGHTS).read_bytes()
    with hf_overlay.open_session([models]) as session:
        for _ in range(3):
            models.rename(away)
            assert session.refresh().removed == ("org/both", "org/mine")
            assert [str(models) in warning for warning in said(caplog)] == [True]
            assert session.refresh() == hf_overlay.Changes((), (), ())
            assert said(caplog) == [], "P7: said once, not at each refresh"
            assert ids(session) == scanned(session) == ["org/both"]
            assert loaded(session, "org/both") == CACHED[WEIGHTS]
            assert session.resolve("org/both") == cached
            with pytest.raises(hf_overlay.SourceAway, match=str(models)):
                session.resolve("org/mine")
            assert_as_new(session)
            caplog.clear()
            away.rename(models)
            assert session.refresh().added == ("org/both", "org/mine")
            assert ids(session) == scanned(session) == ["org/both", "org/mine"]
            assert loaded(session, "org/both") == weights
            assert session.resolve("org/mine") == mine
            assert_as_new(session)
            assert said(caplog) == []


def test_an_unplugged_drive_hides_no_other(models: Path, away: Path, tmp_path: Path, sessions: Path) -> None:
    second = tmp_path / "second drive"
    lay_model(models / "org/first")
    lay_model(models / "org/both")
    lay_model(second / "org/both")
    lay_model(second / "org/second")
    with hf_overlay.open_session([models, second]) as session:
        models.rename(away)
        assert session.resolve("org/both") == second / "org/both", "the next copy answers at once"
        session.refresh()
        assert ids(session) == scanned(session) == ["org/both", "org/second"]
        assert loaded(session, "org/both") == (second / "org/both" / WEIGHTS).read_bytes()
        away.rename(models)
        session.refresh()
        assert session.resolve("org/both") == models / "org/both"
        assert loaded(session, "org/both") == (models / "org/both" / WEIGHTS).read_bytes()


def test_an_empty_mount_point_is_a_drive_that_is_gone(
    tmp_path: Path, models: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unmounted, the path is still there: an empty folder on another device."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second volume here")
    with tempfile.TemporaryDirectory(dir=memory) as drive:
        lay_model(Path(drive, "org/mine"))
        mounted = tmp_path / "mount point"
        mounted.symlink_to(drive)
        with hf_overlay.open_session([mounted]) as session:
            for _ in range(2):
                mounted.unlink()
                mounted.mkdir()
                assert session.refresh().removed == ("org/mine",)
                assert [str(mounted) in warning for warning in said(caplog)] == [True], "P7: says so once"
                assert session.refresh() == hf_overlay.Changes((), (), ())
                assert said(caplog) == []
                with pytest.raises(hf_overlay.SourceAway, match=str(mounted)):
                    session.resolve("org/mine")
                mounted.rmdir()
                mounted.symlink_to(drive)
                assert session.refresh().added == ("org/mine",)
                assert session.resolve("org/mine") == mounted / "org/mine"


def test_a_drive_that_is_mounted_again_under_another_number_is_the_same_drive(
    tmp_path: Path, models: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """P12: its device number changes with each mount, and nothing is gone while its models are there."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second volume here")
    lay_model(models / "org/mine", settled=True)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        again = Path(shutil.copytree(models, Path(folder, "drive")))
        mounted = tmp_path / "mount point"
        mounted.symlink_to(models)
        with hf_overlay.open_session([mounted]) as session:
            for drive in (again, models):
                mounted.unlink()
                mounted.symlink_to(drive)
                assert session.refresh() == hf_overlay.Changes((), (), ())
                assert said(caplog) == []
                assert session.path_away("org/mine") is None


def test_a_model_path_that_turns_into_a_file_hides_its_own_models(
    models: Path, away: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "org/mine")
    add_repo(hub, "org/cached", CACHED)
    with hf_overlay.open_session([models]) as session:
        models.rename(away)
        models.write_bytes(b"")
        session.refresh()
        assert ids(session) == scanned(session) == ["org/cached"]
        assert [str(models) in warning for warning in said(caplog)] == [True]


def test_a_deleted_folder_is_not_called_an_unplugged_drive(models: Path, sessions: Path) -> None:
    """P12: the reason is the true one."""
    lay_model(models / "org/gone")
    lay_model(models / "org/kept")
    with hf_overlay.open_session([models]) as session:
        shutil.rmtree(models / "org/gone")
        for _ in range(2):
            with pytest.raises(hf_overlay.ModelNotFound) as raised:
                session.resolve("org/gone")
            assert not isinstance(raised.value, hf_overlay.SourceAway)
            session.refresh()


READS = ("stat", "scandir", "listdir", "readlink")


@pytest.mark.usefixtures("no_processes")
def test_a_drive_may_go_at_any_moment_of_a_refresh(
    models: Path, away: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "flat", {"nested/file.txt": b"x"})
    lay_model(models / "org/mine")
    lay_model(models / "org/both", settled=True)
    add_repo(models, "org/second-cache", CACHED)
    add_repo(hub, "org/both", CACHED)
    every = ["flat", "org/both", "org/mine", "org/second-cache"]
    number, calls = 1, [""]
    while len(calls) >= number - 1:
        with hf_overlay.open_session([models]) as session:
            # Changes each time, so that nothing is taken from the scan before.
            lay_model(models / "org/mine", {"number.txt": str(number).encode()})
            with moment(READS, models, number, lambda: models.rename(away)) as calls:
                session.refresh()
            for model_id in every:
                with contextlib.suppress(hf_overlay.ModelNotFound):
                    session.resolve(model_id)
            scan_cache_dir(session.hub_cache)
            if models.exists():
                break
            session.refresh()
            assert ids(session) == scanned(session) == ["org/both"], f"unplugged at call {number}"
            assert loaded(session, "org/both") == CACHED[WEIGHTS]
            assert_as_new(session)
            away.rename(models)
            session.refresh()
            assert ids(session) == scanned(session) == every, f"plugged in again after call {number}"
            assert_as_new(session)
        number += 1
        assert number < 1000
    assert number > 20, "many moments were tried"


def test_a_drive_that_went_during_a_refresh_is_named_like_any_other(models: Path, away: Path, sessions: Path) -> None:
    lay_model(models / "zoo")
    lay_model(models / "org/mine")
    with hf_overlay.open_session([models]) as session:
        with moment(("scandir",), models / "org", 1, lambda: models.rename(away)):
            session.refresh()
        for _ in range(2):
            for model_id in ("zoo", "org/mine"):
                with pytest.raises(hf_overlay.SourceAway, match=str(models)):
                    session.resolve(model_id)
            session.refresh()


def test_a_reader_in_an_old_tree_sees_whole_models_while_a_drive_goes_and_comes(
    models: Path, away: Path, tmp_path: Path, sessions: Path
) -> None:
    """P6: at no moment of a refresh is there half of a model, and one on another drive is always there."""
    names = {path.name for path in lay_model(models / "org/mine", {"more.txt": b"x"}).iterdir()}
    lay_model(tmp_path / "second drive/org/other")
    with hf_overlay.open_session([models, tmp_path / "second drive"]) as session:
        mine, other = (
            Path(snapshot_download(model_id, cache_dir=session.hub_cache, local_files_only=True))
            for model_id in ("org/mine", "org/other")
        )
        moments = 0

        def look() -> None:
            nonlocal moments
            moments += 1
            assert (other / WEIGHTS).read_bytes(), "a model on another drive is gone"
            if mine.exists():
                assert {path.name for path in mine.iterdir()} == names
                assert not models.exists() or all(path.read_bytes() for path in mine.iterdir())

        for number in range(1, 50):
            with moment(("symlink", "mkdir", "unlink", "rmdir", "replace"), session.path, number, look):
                models.rename(away)
                session.refresh()
                away.rename(models)
                session.refresh()
            look()
            assert mine.exists(), "the drive is back, and so is the model in a tree of before"
        assert moments > 60
