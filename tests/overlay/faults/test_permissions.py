"""A folder or file that may not be read hides itself alone, says so once, and is back when it may (P7)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.gateway.hub import Hub, Unavailable
from huggingface_hub import scan_cache_dir

from tests.overlay.faults.seen import CACHED, WEIGHTS, ids, loaded, opened, refused, said, scanned
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo, listing
from tests.support.permissions import respected


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
                if inner != "group":
                    assert isinstance(Hub(session).find(inner), Unavailable), "P2: it would be downloaded instead"
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
        with pytest.raises(hf_overlay.IncompleteModel, match="cannot be read: permission denied"):
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
