"""Whatever breaks hides itself alone, says so once, and is back when it is whole again (P7); scans never fail (P8)."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import hf_overlay
import pytest
from hf_overlay.config import Kind
from hf_overlay.tree import lease
from huggingface_hub import scan_cache_dir, snapshot_download
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import hubs, processes
from tests.support.folders import lay_model, settle
from tests.support.hfcache import add_repo, listing
from tests.support.permissions import respected

CONFIG = b'{"model_type": "llama"}'
CACHED = {"config.json": CONFIG, "model.safetensors": b"from the cache"}
WEIGHTS = "model.safetensors"


# What is seen --------------------------------------------------------------------------------------------------


def ids(session: hf_overlay.Session) -> list[str]:
    return [model.id for model in session.models]


def scanned(session: hf_overlay.Session) -> list[str]:
    """The repos a scan reports; it must not raise, nor warn of anything (in these tests the real cache is whole)."""
    info = scan_cache_dir(session.hub_cache)
    assert not info.warnings, f"P8: {info.warnings}"
    return sorted(repo.repo_id for repo in info.repos)


def loaded(session: hf_overlay.Session, model_id: str) -> bytes:
    """The weights that an unmodified program reads for an id."""
    folder = snapshot_download(model_id, cache_dir=session.hub_cache, local_files_only=True)
    return Path(folder, WEIGHTS).read_bytes()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def shown(session: hf_overlay.Session) -> dict[str, Any]:
    """All that a hub folder shows, so that two sessions, or two moments of one, can be compared."""
    return {
        entry.name: _repo(entry) if entry.resolve().is_relative_to(session.path) else os.readlink(entry)
        for entry in sorted(session.hub_cache.resolve().iterdir())
    }


def _repo(repo: Path) -> dict[str, str]:
    paths = [path for path in sorted(repo.rglob("*")) if not path.is_dir() or path.is_symlink()]
    return {
        path.relative_to(repo).as_posix(): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in paths
    }


def assert_as_new(session: hf_overlay.Session) -> None:
    """P5: what a session shows after refreshes is what a new one shows."""
    with hf_overlay.open_session(session.settings.roots, kind=session.settings.kind) as fresh:
        assert shown(session) == shown(fresh), "P5: a refreshed tree differs from a rebuilt one"
        assert session.models == fresh.models


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """Where a drive is while it is unplugged."""
    return tmp_path / "unplugged"


def opened(models: Path) -> dict[str, Any]:
    """What a session shows that is opened and ended."""
    with hf_overlay.open_session([models]) as session:
        return shown(session)


def refused(act: Callable[[], object]) -> str:
    """What a SessionError says of an act; nothing when it is done."""
    try:
        act()
    except hf_overlay.SessionError as error:
        return str(error)
    return ""


# Drives --------------------------------------------------------------------------------------------------------


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
        away.rename(models)
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


@contextlib.contextmanager
def moment(names: tuple[str, ...], below: Path, number: int, act: Callable[[], object]) -> Iterator[list[str]]:
    """Run `act` right before the call `number` of the `os` functions `names` with a path below `below`.

    Yields the calls so far.
    """
    calls: list[str] = []

    def hooked(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            # What is made is the last path of the calls that take two.
            made = arguments[0] if name in ("symlink", "replace") else path
            if not isinstance(made, int) and os.fspath(made).startswith(str(below)):
                calls.append(name)
                if len(calls) == number:
                    act()
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, hooked(name))
        yield calls


READS = ("stat", "scandir", "listdir", "readlink")


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


# Permissions ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with respected():
            yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("inner", ["closed", "org/closed", "group"])
def test_an_unreadable_folder_is_said_once_each_time_and_hides_itself_alone(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture, inner: str, mode: int
) -> None:
    lay_model(models / inner / "in it" if inner == "group" else models / inner)
    lay_model(models / "org/open")
    add_repo(hub, "org/cached", CACHED)
    others = ["org/cached", "org/open"]
    with hf_overlay.open_session([models]) as session:
        everything = ids(session)
        for _ in range(2):
            with closed(models / inner, mode):
                session.refresh()
                warnings = said(caplog)
                assert [str(models / inner) in warning for warning in warnings] == [True], f"P7: said once: {warnings}"
                session.refresh()
                assert said(caplog) == []
                assert ids(session) == scanned(session) == others
                assert loaded(session, "org/open")
            session.refresh()
            assert ids(session) == everything
            assert said(caplog) == []


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_an_unreadable_model_path_is_said_once_each_time_and_hides_itself_alone(
    models: Path, tmp_path: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    lay_model(models / "org/mine")
    lay_model(tmp_path / "open/org/open")
    add_repo(hub, "org/cached", CACHED)
    with closed(models, mode), hf_overlay.open_session([models, tmp_path / "open"]) as session:
        for _ in range(2):
            warnings = said(caplog)
            assert warnings, "P7: says so"
            assert all(str(models) in warning for warning in warnings)
            session.refresh()
            assert said(caplog) == [], "P7: once"
            assert ids(session) == scanned(session) == ["org/cached", "org/open"]
            models.chmod(0o700)
            session.refresh()
            assert ids(session) == ["org/cached", "org/mine", "org/open"]
            assert said(caplog) == []
            models.chmod(mode)
            session.refresh()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_an_unreadable_file_that_must_be_read_hides_its_model_alone(models: Path, sessions: Path, name: str) -> None:
    index = json.dumps({"weight_map": {"a": WEIGHTS}}).encode()
    lay_model(models / "org/closed", {"model.safetensors.index.json": index})
    lay_model(models / "org/open")
    with closed(models / "org/closed" / name), hf_overlay.open_session([models]) as session:
        assert ids(session) == scanned(session) == ["org/open"]
        with pytest.raises(hf_overlay.ModelNotFound, match="cannot be read: permission denied"):
            session.resolve("org/closed")


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("inner", ["", "snapshots", "blobs", "refs", "refs/main", "snapshots/{commit}"])
@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_an_unreadable_part_of_a_cached_repo_makes_no_scan_fail(
    models: Path, hub: Path, sessions: Path, repo_type: str, inner: str, mode: int
) -> None:
    lay_model(models / "org/mine")
    add_repo(hub, "org/cached", CACHED)
    snapshot = add_repo(hub, "org/closed", CACHED, repo_type=repo_type)
    part = snapshot.parents[1] / inner.format(commit=snapshot.name)
    with closed(part, mode), hf_overlay.open_session([models]) as session:
        found = scan_cache_dir(session.hub_cache)  # P8: never raises
        assert {"org/cached", "org/mine"} <= {repo.repo_id for repo in found.repos}
        assert loaded(session, "org/cached") == CACHED[WEIGHTS]
        assert loaded(session, "org/mine")


def test_a_read_only_cache_is_listed_and_loads(models: Path, hub: Path, home: Path, sessions: Path) -> None:
    lay_model(models / "org/mine")
    add_repo(hub, "org/cached", CACHED)
    sessions.mkdir(parents=True)
    before = listing(hub)
    with contextlib.ExitStack() as stack:
        for folder in [path for path in (hub, *hub.rglob("*"), hub.parent) if path.is_dir()]:
            stack.enter_context(closed(folder, 0o555))
        with hf_overlay.open_session([models]) as session:
            assert ids(session) == scanned(session) == ["org/cached", "org/mine"]
            assert loaded(session, "org/cached") == CACHED[WEIGHTS]
            session.refresh()
    assert {name: entry[2:] for name, entry in listing(hub).items()} == {
        name: entry[2:] for name, entry in before.items()
    }


@pytest.mark.parametrize("level", ["hub", "home"])
def test_an_unreadable_cache_is_said_once_and_hides_no_folder(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture, level: str
) -> None:
    lay_model(models / "org/mine")
    add_repo(hub, "org/cached", CACHED)
    sessions.mkdir(parents=True)
    part = hub if level == "hub" else hub.parent
    with closed(part), hf_overlay.open_session([models]) as session:
        assert [str(hub) in warning for warning in said(caplog)] == [True]
        session.refresh()
        assert said(caplog) == []
        assert ids(session) == scanned(session) == ["org/mine"]
        assert loaded(session, "org/mine")
        with respected():
            part.chmod(0o700)
        session.refresh()
        assert ids(session) == scanned(session) == ["org/cached", "org/mine"]


def test_no_permission_for_the_tree_is_one_line_that_names_the_folder(models: Path, sessions: Path) -> None:
    sessions.mkdir(parents=True)
    with closed(sessions, 0o555):
        refusal = refused(lambda: opened(models))
    assert str(sessions) in refusal
    assert "\n" not in refusal


# The real cache ------------------------------------------------------------------------------------------------


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


# Links ---------------------------------------------------------------------------------------------------------


def test_dangling_links_hide_themselves_alone(models: Path, sessions: Path) -> None:
    lay_model(models / "org/mine")
    (models / "org/mine/notes.txt").symlink_to("/nonexistent/notes.txt")
    (models / "org/mine/folder").symlink_to("/nonexistent/folder")
    (models / "org/gone").symlink_to("/nonexistent/gone")
    (models / "gone").symlink_to("/nonexistent/gone")
    for name, reason in {"config.json": "no config.json", WEIGHTS: "broken link"}.items():
        folder = lay_model(models / "org" / f"without-{name}")
        (folder / name).unlink()
        (folder / name).symlink_to(f"/nonexistent/{name}")
        with hf_overlay.open_session([models]) as session:
            assert ids(session) == scanned(session) == ["org/mine"]
            with pytest.raises(hf_overlay.ModelNotFound, match=reason):
                session.resolve(f"org/without-{name}")


def test_a_model_path_that_is_a_dangling_link_is_a_drive_that_is_not_there(
    models: Path, tmp_path: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = tmp_path / "link"
    link.symlink_to(models / "later")
    with hf_overlay.open_session([link]) as session:
        assert [str(link) in warning for warning in said(caplog)] == [True]
        lay_model(models / "later/org/mine")
        session.refresh()
        assert session.resolve("org/mine") == link / "org/mine"


def self_loop(models: Path) -> None:
    (models / "loop").symlink_to("loop")
    (models / "org/mine/loop").symlink_to("loop")
    (models / "org/mine/loop.json").symlink_to("loop.json")


def mutual_loop(models: Path) -> None:
    (models / "one").symlink_to("two")
    (models / "two").symlink_to("one")


def link_to_parents(models: Path) -> None:
    (models / "group/deep").mkdir(parents=True)
    (models / "group/deep/up").symlink_to("..")
    (models / "group/top").symlink_to(models)
    (models / "org/mine/up").symlink_to("..")
    (models / "org/mine/top").symlink_to(models)
    (models / "here").symlink_to(".")


def dense_graph(models: Path) -> None:
    names = [f"folder-{number}" for number in range(20)]
    for name in names:
        (models / "graph" / name).mkdir(parents=True)
        (models / "org/mine/graph" / name).mkdir(parents=True)
    for name in names:
        for other in names:
            (models / "graph" / name / f"to-{other}").symlink_to(f"../{other}")
            (models / "org/mine/graph" / name / f"to-{other}").symlink_to(f"../{other}")


def links_between_chains(models: Path) -> None:
    """Each folder holds two links to the next: 2**20 ways to the last one."""
    for number in range(20):
        folder = models / "chain" / str(number)
        folder.mkdir(parents=True)
        for side in ("left", "right"):
            (folder / side).symlink_to(f"../{number + 1}")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "lay", [self_loop, mutual_loop, link_to_parents, dense_graph, links_between_chains], ids=lambda lay: lay.__name__
)
def test_link_loops_end_and_hide_no_model(models: Path, sessions: Path, lay: Callable[[Path], None]) -> None:
    lay_model(models / "org/mine")
    lay_model(models / "zoo/last")
    lay(models)
    for kind in get_args(Kind):
        with hf_overlay.open_session([models], kind=kind) as session:
            session.refresh()
            assert ids(session) == scanned(session) == ["org/mine", "zoo/last"]
            assert loaded(session, "org/mine") == (models / "org/mine" / WEIGHTS).read_bytes()


def test_a_link_in_a_model_to_what_holds_it_is_not_followed(models: Path, sessions: Path) -> None:
    """Else the whole disk would be files of that model."""

    def fail() -> None:
        raise AssertionError("the top of the disk is listed as a part of a model")

    lay_model(models / "org/mine")
    for name, target in {"parent": "..", "drive": os.fspath(models.parent), "disk": models.anchor}.items():
        link = models / "org/mine" / name
        link.symlink_to(target)
        with moment(("scandir",), link, 1, fail), hf_overlay.open_session([models]) as session:
            assert ids(session) == scanned(session) == ["org/mine"]


# Folders that hold no model ------------------------------------------------------------------------------------


def put(name: str, content: bytes) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return lay


def link(name: str, target: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return lay


def huge(name: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(64 * 2**20 + 1)  # sparse

    return lay


def pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def folder_in_place(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def sharded(folder: Path, *, index: bytes | None = None, sizes: Mapping[int, int]) -> None:
    (folder / WEIGHTS).unlink()
    shards = {number: f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)}
    weight_map = {f"tensor {number}": name for number, name in shards.items()}
    (folder / "model.safetensors.index.json").write_bytes(index or json.dumps({"weight_map": weight_map}).encode())
    for number, size in sizes.items():
        (folder / shards[number]).write_bytes(b"x" * size)


def shards_without_index(folder: Path) -> None:
    sharded(folder, sizes={1: 5, 3: 5})
    (folder / "model.safetensors.index.json").unlink()


def copy_under_other_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.incomplete")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty config": (put("config.json", b""), "not valid JSON"),
    "cut short": (put("config.json", CONFIG[:-3]), "not valid JSON"),
    "json list": (put("config.json", b"[]"), "not a JSON object"),
    "json text": (put("config.json", b'"llama"'), "not a JSON object"),
    "deep lists": (put("config.json", b"[" * 200_000), "not valid JSON"),
    "deep objects": (put("config.json", b'{"a":' * 200_000), "not valid JSON"),
    "a number of 10,000 digits": (put("config.json", b'{"model_type": "llama", "n": ' + b"9" * 10_000 + b"}"), "JSON"),
    "binary": (put("config.json", bytes(range(256)) * 100), "not UTF-8|not valid JSON"),
    "latin-1": (put("config.json", '{"model_type": "llama", "é": 1}'.encode("latin-1")), "not UTF-8"),
    "utf-16": (put("config.json", CONFIG.decode().encode("utf-16")), "not UTF-8"),
    "byte order mark": (put("config.json", b"\xef\xbb\xbf" + CONFIG), "not valid JSON"),
    "no type": (put("config.json", b"{}"), "no model_type"),
    "type is no text": (put("config.json", b'{"model_type": ["llama"]}'), "model type"),
    "unknown type": (put("config.json", b'{"model_type": "unheard-of"}'), "unheard-of"),
    "lone surrogate": (put("config.json", b'{"model_type": "\\ud800"}'), "model type"),
    "huge config": (huge("config.json"), "larger than"),
    "pipe": (pipe, "no config.json"),
    "folder": (folder_in_place, "no config.json"),
    "device": (link("config.json", "/dev/zero"), "no config.json"),
    "dangling config": (link("config.json", "nowhere.json"), "no config.json"),
    "looping config": (link("config.json", "config.json"), "no config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
    "weights still under another name": (copy_under_other_name, "no weights"),
    "empty weights": (put(WEIGHTS, b""), "is empty: still being copied"),
    "dangling weights": (link(WEIGHTS, "nowhere"), "broken link"),
    "weights are a device": (link(WEIGHTS, "/dev/zero"), "no weights|broken link"),
    "shard missing": (lambda folder: sharded(folder, sizes={1: 5, 3: 5}), "1 of 3 shards not there.*00002"),
    "shards missing": (lambda folder: sharded(folder, sizes={}), "3 of 3 shards not there"),
    "shard empty": (lambda folder: sharded(folder, sizes={1: 5, 2: 0, 3: 5}), "00002.* is empty"),
    "shard missing without index": (shards_without_index, "1 of 3 shards not there.*00002"),
    "index is no json": (lambda folder: sharded(folder, index=b"{", sizes={1: 5, 2: 5, 3: 5}), "index.*not valid JSON"),
    "index is a list": (lambda folder: sharded(folder, index=b"[]", sizes={1: 5, 2: 5, 3: 5}), "index.*not a JSON obj"),
    "index without map": (lambda folder: sharded(folder, index=b"{}", sizes={1: 5, 2: 5, 3: 5}), "no weight_map"),
    "index with a list for a map": (
        lambda folder: sharded(folder, index=b'{"weight_map": []}', sizes={1: 5, 2: 5, 3: 5}),
        "no weight_map",
    ),
    "index leads out of the folder": (
        lambda folder: sharded(folder, index=b'{"weight_map": {"a": "../mine/model.safetensors"}}', sizes={1: 5}),
        "not there",
    ),
    "huge index": (huge("model.safetensors.index.json"), "larger than"),
}


@pytest.mark.parametrize(("break_it", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_hides_itself_alone_gives_its_reason_and_is_back_when_repaired(
    models: Path,
    hub: Path,
    sessions: Path,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Path], object],
    reason: str,
) -> None:
    lay_model(models / "org/mine")
    lay_model(models / "zoo/last")
    add_repo(hub, "org/cached", CACHED)
    others = ["org/cached", "org/mine", "zoo/last"]
    broken = models / "org/broken"
    break_it(lay_model(broken))
    settle(broken)
    with hf_overlay.open_session([models]) as session:
        for _ in range(2):
            assert ids(session) == scanned(session) == others
            assert loaded(session, "org/mine") == (models / "org/mine" / WEIGHTS).read_bytes()
            with pytest.raises(hf_overlay.ModelNotFound, match=reason) as raised:
                session.resolve("org/broken")
            assert len(str(raised.value)) < 2000
            shutil.rmtree(broken)
            lay_model(broken, settled=True)
            assert session.refresh().added == ("org/broken",)
            assert loaded(session, "org/broken") == (broken / WEIGHTS).read_bytes()
            assert session.resolve("org/broken") == broken
            break_it(broken)
            assert session.refresh().removed == ("org/broken",)
        add_repo(hub, "org/broken", CACHED)
        session.refresh()
        assert loaded(session, "org/broken") == CACHED[WEIGHTS], "the cache's copy answers for a broken folder"
        assert_as_new(session)
    assert len(set(warnings := said(caplog))) == len(warnings), "said once, not at each refresh"


def test_every_broken_model_at_once_hides_no_other(models: Path, hub: Path, sessions: Path) -> None:
    lay_model(models / "org/mine")
    for number, (break_it, _) in enumerate(BROKEN.values()):
        break_it(lay_model(models / f"broken/{number}"))
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == scanned(session) == ["org/mine"]
        shutil.rmtree(models / "broken")
        session.refresh()
        assert ids(session) == scanned(session) == ["org/mine"]


FAULTS = st.sampled_from(["whole", "gone", *BROKEN])


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.dictionaries(st.sampled_from(["a", "org/b", "org/c"]), FAULTS), min_size=1, max_size=5))
def test_whatever_breaks_and_is_repaired_a_refresh_shows_what_a_new_session_shows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, str]]
) -> None:
    models = tmp_path_factory.mktemp("models")
    state: dict[str, str] = {}
    with hf_overlay.open_session([models]) as session:
        for step in steps:
            for name, fault in step.items():
                shutil.rmtree(models / name, ignore_errors=True)
                if fault != "gone":
                    lay_model(models / name, settled=name == "a")
                if fault in BROKEN:
                    BROKEN[fault][0](models / name)
            state |= step
            session.refresh()
            assert ids(session) == scanned(session) == sorted(name for name in state if state[name] == "whole")
            assert_as_new(session)


# Names ---------------------------------------------------------------------------------------------------------

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "org/modèle"), unicodedata.normalize("NFD", "org/modèle")
NAMES = [
    "a name/with  spaces ",
    COMPOSED,
    DECOMPOSED,
    "org/模型🙂",
    "org/" + "n" * 255,
    "o" * 255,
    "o" * 238 + "/n",
    "o" * 220 + "/" + "n" * 9,
    "o" * 220 + "/" + "n" * 8,
    "/".join(["n" * 50] * 6),
    "/".join("abcdefghijklmnopqrstuvwxyz"),
    "org/a--b",
    "org/-",
    "-rf",
    "--help",
    "org/name-",
    "org-/name",
    "org/name.git",
    "org/new\nline",
    "org/\x07bell",
    "org/\x1b[31mred",
    "org/tab\tand\rreturn",
    "org/back\\slash",
    "org/\"quote'",
    "org/$HOME ${HOME} `id` *?[a]",
    "org/%s{0}",
    "models--odd",
    "refs/main",
    "blobs",
    "snapshots/" + "a" * 40,
    "con",
]


def test_every_name_a_disk_can_hold_is_listed_and_every_listed_id_resolves(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_repo(hub, "org/cached", CACHED)
    for name in NAMES:
        lay_model(models / name)
    with hf_overlay.open_session([models]) as session:
        listed = {model.id: model.path for model in session.models}
        refused = set(NAMES) - listed.keys()
        assert refused <= {"org/back\\slash"}, "only an id that `resolve` refuses as untrusted may be left out"
        assert [warning for warning in said(caplog) if "back\\slash" not in warning] == []
        for model_id, path in listed.items():
            assert session.resolve(model_id) == Path(path), "P11: what is listed resolves to the path it is listed with"
            assert model_id == "org/cached" or path == f"{models}/{model_id}"
        found = scanned(session)
        assert "org/cached" in found
        assert [name for name in ("org/name-", "con", COMPOSED, "org/\x07bell") if name not in found] == []
        assert "org/a/b" not in found, "`--` is `/` in a cache: that id is loaded by path"
        session.refresh()
        assert_as_new(session)


def test_dot_folders_are_no_models_and_hide_none(models: Path, sessions: Path) -> None:
    for name in (".hidden/org/name", "org/.hidden", "..odd", ".Trashes/501/name", "org/mine"):
        lay_model(models / name)
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == scanned(session) == ["org/mine"]


def rename_to_bytes(folder: Path, name: bytes) -> Path:
    """Give a folder a name that is no UTF-8; skips where a volume takes none."""
    try:
        return folder.rename(folder.with_name(os.fsdecode(name)))
    except OSError:
        pytest.skip("names must be UTF-8 on this volume")


# In a process of its own: test reports cannot hold such names.
REFRESH_AND_TELL = """
import json, logging, os, pathlib, sys, hf_overlay
from huggingface_hub import scan_cache_dir, snapshot_download
from tests.overlay.test_faults import assert_as_new

class Handler(logging.Handler):
    def emit(self, record):
        warnings.append(record.getMessage())

warnings = []
logging.getLogger("hf_overlay").addHandler(Handler(logging.WARNING))
with hf_overlay.open_session([sys.argv[1]]) as session:
    session.refresh()
    said = len(warnings)
    assert_as_new(session)
    info = scan_cache_dir(session.hub_cache)
    weights = pathlib.Path(snapshot_download("org/mine", cache_dir=session.hub_cache), "model.safetensors").read_bytes()
    assert weights == (session.resolve("org/mine") / "model.safetensors").read_bytes()
    print(json.dumps([
        said,
        [model.id for model in session.models],
        [repo.repo_id for repo in info.repos],
        len(info.warnings),
        os.fspath(session.resolve("org/mine")),
    ]))
"""


def refresh_and_tell(root: Path, home: Path) -> list[Any]:
    """Open a session and refresh it: how many warnings, what is listed, scanned and scanned with warnings; one path."""
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    command = [processes.PYTHON, "-c", REFRESH_AND_TELL, os.fspath(root)]
    answer = json.loads(processes.succeed(command, environ).out)
    assert isinstance(answer, list)
    return answer


def test_names_that_are_no_text_hide_themselves_alone_and_are_said_once(
    models: Path, home: Path, sessions: Path
) -> None:
    mine = lay_model(models / "org/mine")
    rename_to_bytes(lay_model(models / "org/odd", {"deeper/config.json": CONFIG}), b"odd-\xff\xfe")
    (mine / os.fsdecode(b"notes-\xff.txt")).write_bytes(b"x")
    (mine / os.fsdecode(b"folder-\xff")).mkdir()
    assert refresh_and_tell(models, home) == [1, ["org/mine"], ["org/mine"], 0, str(mine)]


def test_a_model_path_whose_own_name_is_no_text_is_as_good_as_any(tmp_path: Path, home: Path, sessions: Path) -> None:
    lay_model(tmp_path / "drive/org/mine")
    root = rename_to_bytes(tmp_path / "drive", b"drive-\xff")
    assert refresh_and_tell(root, home) == [0, ["org/mine"], ["org/mine"], 0, str(root / "org/mine")]


def test_names_reach_a_terminal_without_their_control_characters(models: Path, home: Path, sessions: Path) -> None:
    rename_to_bytes(lay_model(models / "org/odd"), b"\x1b[31m\x07\xff")
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    for command in (["run", "--model-path", str(models), "--", "true"], ["ls", "--model-path", str(models)]):
        done = processes.succeed([processes.OVERLAY, *command], environ)
        assert "not valid UTF-8" in done.err
        assert not [character for character in done.err if not character.isprintable() and character != "\n"]


def nest(folder: Path, name: str, depth: int) -> None:
    """Make folders in folders, deeper than a path can say, with a file in the last."""
    inner = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=inner)
        outer, inner = inner, os.open(name, os.O_RDONLY, dir_fd=inner)
        os.close(outer)
    os.close(os.open("notes.txt", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
    os.close(inner)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "length"),
    [("d", 2400), ("d" * 20, 4060), ("d" * 200, 6000)],
    ids=["deeper than Python's stack", "too long below a session's folder", "too long anywhere"],
)
def test_a_model_of_folders_in_folders_hides_no_other_and_is_cleared(
    models: Path, sessions: Path, name: str, length: int
) -> None:
    lay_model(models / "org/mine")
    deep = lay_model(models / "org/deep")
    nest(deep, name, (length - len(os.fsencode(deep))) // (len(name) + 1))
    try:
        with hf_overlay.open_session([models]) as session:
            for _ in range(2):
                assert "org/mine" in ids(session)
                assert "org/mine" in scanned(session)
                assert loaded(session, "org/mine") == (models / "org/mine" / WEIGHTS).read_bytes()
                session.refresh()
        assert left(sessions) == []
    finally:
        subprocess.run(["rm", "-rf", deep, sessions], check=True)  # shutil, and so pytest, would need as deep a stack


@pytest.mark.timeout(60)
def test_two_thousand_folders_are_listed_shown_refreshed_and_cleared(models: Path, sessions: Path) -> None:
    for number in range(2000):
        folder = models / f"org-{number % 40}" / f"model-{number}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(CONFIG if number % 100 else b"{")
        (folder / WEIGHTS).write_bytes(b"%d" % number)
    with hf_overlay.open_session([models]) as session:
        assert len(ids(session)) == 1980
        assert scanned(session) == ids(session)
        assert loaded(session, "org-1/model-1001") == b"1001"
        shutil.rmtree(models / "org-1")
        assert len(session.refresh().removed) == 50
        assert len(ids(session)) == 1930


# No room for the tree ------------------------------------------------------------------------------------------

MAKING = ("symlink", "mkdir", "open", "write", "pwrite", "replace")


@contextlib.contextmanager
def full_disk(below: Path, number: int, *, once: bool) -> Iterator[list[str]]:
    """The call `number` that makes something below a folder fails, and so do those after it unless `once`.

    Yields the names of the calls so far.
    """
    calls: list[str] = []

    def hooked(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            made = arguments[0] if name in ("symlink", "replace") else path
            makes = name != "open" or (arguments[0] & os.O_CREAT and not os.path.exists(path))
            if makes and (isinstance(made, int) or os.fspath(made).startswith(str(below))):
                calls.append(name)
                if len(calls) == number or (len(calls) > number and not once):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return real(path, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in MAKING:
            patch.setattr(os, name, hooked(name))
        yield calls


def left(sessions: Path) -> list[str]:
    return sorted(entry.name for entry in sessions.glob("session-*")) if sessions.exists() else []


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("once", [False, True], ids=["from then on", "for a moment"])
def test_a_disk_that_fills_up_at_any_moment_of_a_start_leaves_nothing_behind(
    models: Path, hub: Path, sessions: Path, once: bool
) -> None:
    lay_model(models / "org/mine", {"nested/file.txt": b"x"})
    lay_model(models / "flat")
    add_repo(hub, "org/cached", CACHED)
    (hub.parent / "token").write_text("hf_secret")
    whole = opened(models)
    before = listing(models), listing(hub)
    files = open_files()
    refusals = set()
    number, calls = 0, [""]
    while number <= len(calls):
        number += 1
        with full_disk(sessions, number, once=once) as calls:
            found: list[Any] = []
            refusals.add(refused(lambda found=found: found.append(opened(models))))  # type: ignore[misc]
            assert found in ([], [whole]), f"{calls[number - 1]} failed and nothing was said"
        if number > len(calls):
            break
        assert left(sessions) == [], f"{calls[number - 1]} (call {number}) failed: leaves nothing behind"
        assert open_files() == files, f"{calls[number - 1]} (call {number}) failed: leaves no file open"
        assert (listing(models), listing(hub)) == before
    assert number > 30, "many moments were tried"


def test_a_disk_that_fills_up_at_any_moment_of_a_refresh_leaves_the_old_tree_whole(
    models: Path, hub: Path, sessions: Path
) -> None:
    kept = lay_model(models / "org/kept")
    add_repo(hub, "org/cached", CACHED)
    number, calls = 0, [""]
    while number <= len(calls):
        number += 1
        lay_model(models / "org/removed")
        changed = lay_model(models / "org/changed")
        with hf_overlay.open_session([models]) as session:
            before, hub_folder = shown(session), session.hub_cache.resolve()
            shutil.rmtree(models / "org/removed")
            lay_model(changed, {"more.txt": b"x"})
            lay_model(models / "org/added")
            with full_disk(sessions, number, once=number % 2 == 0) as calls:
                refusal = refused(session.refresh)
            assert "\n" not in refusal
            if refusal:
                assert shown(session) == before, f"{calls[number - 1]} (call {number}) failed: the old tree stays"
                assert session.hub_cache.resolve() == hub_folder
                assert loaded(session, "org/kept") == (kept / WEIGHTS).read_bytes()
                session.refresh()
            assert_as_new(session)
            assert scanned(session) == ["org/added", "org/cached", "org/changed", "org/kept"]
        shutil.rmtree(models / "org/added")
        shutil.rmtree(changed)
    assert number > 10, "many moments were tried"


def test_the_refresh_that_shows_changes_tells_them_though_one_before_failed(models: Path, sessions: Path) -> None:
    lay_model(models / "org/removed")
    changed = lay_model(models / "org/changed")
    with hf_overlay.open_session([models]) as session:
        shutil.rmtree(models / "org/removed")
        lay_model(changed, {"more.txt": b"x"})
        lay_model(models / "org/added")
        with full_disk(sessions, 1, once=False), pytest.raises(hf_overlay.SessionError):
            session.refresh()
        assert session.refresh() == hf_overlay.Changes(("org/added",), ("org/changed",), ("org/removed",))
        assert session.refresh() == hf_overlay.Changes((), (), ())


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel write so many bytes into a file and refuse the next, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 10, 100, 1000, 5000])
def test_a_write_cut_short_by_a_full_disk_is_not_taken_for_a_whole_one(models: Path, sessions: Path, size: int) -> None:
    lay_model(models / "org/mine", {f"file-{number}.txt": b"x" for number in range(100)})
    with hf_overlay.open_session([models]) as session:
        whole = shown(session)
        with (
            contextlib.suppress(hf_overlay.SessionError),
            files_of_at_most(size),
            hf_overlay.open_session([models]) as other,
        ):
            assert shown(other) == whole
            assert lease.read_owner(str(other.path)), "P3: nobody would know where downloads in it belong"
        lay_model(models / "org/mine", {"more.txt": b"x"})
        with contextlib.suppress(hf_overlay.SessionError), files_of_at_most(size):
            session.refresh()
        session.refresh()
        assert_as_new(session)
    assert left(sessions) == []


def test_a_volume_without_links_is_refused_with_what_to_do(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def symlink(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))  # exFAT and SMB say so

    lay_model(models / "org/mine")
    monkeypatch.setattr(os, "symlink", symlink)
    with (
        pytest.raises(hf_overlay.SessionError, match=r"HF_OVERLAY_DIR.* symbolic links"),
        hf_overlay.open_session([models]),
    ):
        pass
    assert left(sessions) == []


# Several at once -----------------------------------------------------------------------------------------------

OPEN_ONE = """
import json, sys, hf_overlay
sys.stdin.readline()
with hf_overlay.open_session([sys.argv[1]]) as session:
    print(json.dumps([str(session.path), [model.id for model in session.models], sorted(
        path.name for path in session.hub_cache.iterdir()
    )]), flush=True)
    sys.stdin.readline()
    session.refresh()
"""


def test_sessions_building_at_once_do_not_meet(models: Path, hub: Path, home: Path, sessions: Path) -> None:
    """P10. They all begin with a leftover of a killed program to clear."""
    for number in range(50):
        lay_model(models / f"org/model-{number}")
    add_repo(hub, "org/cached", CACHED)
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    command = [processes.PYTHON, "-c", OPEN_ONE, str(models)]
    with processes.start(command, environ) as killed:
        assert killed.stdin
        killed.stdin.write(b"go\n")
        assert processes.read_line(killed.stdout)
    assert len(left(sessions)) == 1
    with contextlib.ExitStack() as stack:
        builders = [stack.enter_context(processes.start(command, environ)) for _ in range(5)]
        for line in (b"go\n", b"end\n"):
            for builder in builders:
                assert builder.stdin
                builder.stdin.write(line)
            if line == b"go\n":
                answers = [json.loads(processes.read_line(builder.stdout)) for builder in builders]
        for builder in builders:
            _, err = builder.communicate(timeout=processes.SECONDS)
            assert (builder.returncode, err) == (0, b"")
    assert len({path for path, _, _ in answers}) == 5
    assert all(answer[1:] == answers[0][1:] for answer in answers)
    assert len(answers[0][1]) == 51
    assert left(sessions) == []


WRITE_THE_CACHE = """
import os, shutil, sys
from pathlib import Path
from tests.support.hfcache import add_repo
hub = Path(sys.argv[1])
for number in range(300):
    name = f"org/model-{number % 4}"
    snapshot = add_repo(hub, name, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"%d" % number})
    if number % 3 == 0:
        shutil.rmtree(snapshot.parents[1])
    if number % 5 == 0:
        (snapshot.parents[1] / "blobs" / "x.incomplete").parent.mkdir(parents=True, exist_ok=True)
        (snapshot.parents[1] / "blobs" / "x.incomplete").write_bytes(b"")
    if number == 0:
        print("writing", flush=True)
"""


def test_a_session_goes_on_while_another_process_writes_the_cache(
    models: Path, hub: Path, home: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = lay_model(models / "org/mine")
    stable = add_repo(hub, "org/stable", CACHED)
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    with (
        hf_overlay.open_session([models]) as session,
        processes.start([processes.PYTHON, "-c", WRITE_THE_CACHE, str(hub)], environ) as writer,
    ):
        assert processes.read_line(writer.stdout) == "writing"
        refreshes = 0
        while writer.poll() is None and refreshes < 100_000:
            session.refresh()
            assert {"org/mine", "org/stable"} <= set(ids(session))
            assert session.resolve("org/stable") == stable
            assert loaded(session, "org/stable") == CACHED[WEIGHTS]
            assert loaded(session, "org/mine") == (mine / WEIGHTS).read_bytes()
            with contextlib.suppress(hf_overlay.ModelNotFound):
                session.resolve("org/model-1")
            refreshes += 1
        assert writer.wait() == 0
        assert refreshes > 3
        session.refresh()
        assert_as_new(session)
    assert said(caplog) == []


# The home ------------------------------------------------------------------------------------------------------


def test_a_home_with_spaces_and_dollars_in_its_name_is_as_good_as_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No variable has these names, so nothing expands them."""
    home = tmp_path / "John's $files & ${more} $ %s"
    mine = lay_model(home / "models/org/mine")
    hub = home / ".cache/huggingface/hub"
    add_repo(hub, "org/cached", CACHED)
    monkeypatch.setenv("HOME", str(home))
    for model_path in ("~/models", home / "models"):
        with hf_overlay.open_session([model_path]) as session:
            assert session.path.is_relative_to(home)
            assert session.settings.hub_cache == str(hub)
            assert ids(session) == scanned(session) == ["org/cached", "org/mine"]
            assert loaded(session, "org/mine") == (mine / WEIGHTS).read_bytes()
            environ = session.environment | hubs.environment(hubs.INSTALLED)
            script = "import huggingface_hub as h; print(h.snapshot_download('org/mine', local_files_only=True))"
            done = processes.succeed([processes.PYTHON, "-c", script], environ)
            assert Path(done.out.strip(), WEIGHTS).read_bytes() == (mine / WEIGHTS).read_bytes()
