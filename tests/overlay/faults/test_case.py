"""A volume that ignores case, as macOS has by default, takes several spellings of an id for one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay import config
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.gateway.hub import Hub
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.models import Code
from hf_overlay.tree.publish import Tree

from tests.overlay.faults.seen import CACHED, WEIGHTS, ids, loaded, said, scanned
from tests.support import fuse_disk, hfcache
from tests.support.folders import lay_model

Fold = Callable[[Path], Path]


@pytest.fixture
def fold(tmp_path: Path) -> Iterator[Fold]:
    """Shows a folder at another place, on a disk that ignores case; nothing may be written there."""
    if tmp_path.with_name(tmp_path.name.swapcase()).exists():
        yield lambda folder: folder
        return
    if (why := fuse_disk.why_not()) is not None:
        pytest.skip(why)
    with ExitStack() as disks:

        def mount(folder: Path) -> Path:
            where = tmp_path / "folds" / folder.name
            disks.enter_context(fuse_disk.mounted(folder, where, ignores_case=True))
            return where

        yield mount


@pytest.fixture(params=["disk", "injected"])
def drive(request: pytest.FixtureRequest, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model path with `org/Qwen3`, and `org/Half`, of which a part is missing, on a disk that ignores case."""
    lay_model(models / "org/Qwen3", settled=True)
    lay_model(models / "org/Half", {"model-00001-of-00002.safetensors": (models / "org/Qwen3" / WEIGHTS).read_bytes()})
    hfcache.add_repo(models, "org/Repo", CACHED)
    if request.param == "disk":
        where: Path = request.getfixturevalue("fold")(models)
        return where
    monkeypatch.setattr("hf_overlay.catalog.spelling._is_same", lambda path, other: path.lower() == other.lower())
    return models


def test_every_spelling_of_an_id_is_the_users_model(drive: Path, hub: Path, sessions: Path) -> None:
    """P2, also for the gateway: no spelling asks the Hub, and none makes it look at the disk again."""
    with hf_overlay.open_session([drive]) as session:
        for spelled in ("org/Qwen3", "org/qwen3", "ORG/QWEN3"):
            model = session.find(spelled)
            assert (model.id, model.path) == ("org/Qwen3", str(drive / "org/Qwen3"))
            found = Hub(session).find(spelled)
            assert isinstance(found, LinkedRepo)
            assert found.model == model
            assert not Hub(session)._is_behind(spelled, "models")
        assert session.find("ORG/repo").id == "org/Repo", "a repo in cache layout, too"
        with pytest.raises(hf_overlay.IncompleteModel):
            session.resolve("org/half")
        assert Hub(session).find("org/half") is not None, "P12: it is not downloaded instead"
        with pytest.raises(hf_overlay.ModelNotFound):
            session.resolve("org/qwen4")


def test_an_excluded_id_may_be_spelled_in_any_way(drive: Path, sessions: Path) -> None:
    with hf_overlay.open_session([drive], exclude=["org/qwen3", "org/half"]) as session:
        assert ids(session) == ["org/Repo"]
        assert Hub(session).find("org/half") is Hub(session).find("org/qwen3") is None, "the Hub answers"


def test_the_users_model_stands_in_front_of_a_cached_one_of_another_spelling(
    drive: Path, hub: Path, sessions: Path
) -> None:
    hfcache.add_repo(hub, "org/QWEN3", CACHED)
    with hf_overlay.open_session([drive]) as session:
        assert ids(session) == ["org/Qwen3", "org/Repo"]
        assert session.find("org/QWEN3").source == "custom"
    reasons = [each.reason.code for each in Catalog(config.load([str(drive)], os.environ, "/")).explain("org/qwen3")]
    assert reasons[0] is Code.WINS


def test_a_drive_that_is_gone_is_named_for_every_spelling(models: Path, tmp_path: Path, sessions: Path) -> None:
    """P7: whether its volume ignored case can no longer be seen; on the Hub case does not matter."""
    lay_model(models / "org/Qwen3")
    with hf_overlay.open_session([models]) as session:
        models.rename(tmp_path / "unplugged")
        session.refresh()
        for spelled in ("org/Qwen3", "org/qwen3"):
            with pytest.raises(hf_overlay.SourceAway, match=str(models)):
                session.resolve(spelled)


def test_a_cached_model_has_the_id_that_the_disk_spells(
    fold: Fold, hub: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hfcache.add_repo(hub, "org/Qwen3", CACHED)
    where = fold(hub)
    monkeypatch.setenv("HF_HUB_CACHE", str(where))
    with hf_overlay.open_session([]) as session:
        for spelled in ("org/Qwen3", "org/qwen3"):
            model = session.find(spelled)
            assert model.id == "org/Qwen3"
            assert model.path.startswith(f"{where}/models--org--Qwen3/")


def test_where_case_counts_spellings_are_different_models(models: Path, hub: Path, sessions: Path) -> None:
    if (models / "../MODELS").exists():
        pytest.skip("this volume ignores case")
    lay_model(models / "org/Qwen3")
    lay_model(models / "org/QWEN3")
    hfcache.add_repo(hub, "org/qwen3", CACHED)
    with hf_overlay.open_session([models]) as session:
        assert ids(session) == ["org/QWEN3", "org/Qwen3", "org/qwen3"]
        assert [session.find(each).id for each in ids(session)] == ids(session)
        with pytest.raises(hf_overlay.ModelNotFound):
            session.resolve("org/qWEN3")


# A cache where case counts, and sessions where it does not ----------------------------------------------------------


def test_cached_repos_that_differ_in_case_only_keep_no_session_from_opening(
    models: Path, hub: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One of them is shown, the one that holds something; the other one is named once (P12)."""
    hfcache.add_repo(hub, "org/qwen3", CACHED)
    if (hub / "models--org--Qwen3").exists():
        pytest.skip("this volume ignores case")
    (hub / "models--org--Qwen3/snapshots").mkdir(parents=True)
    monkeypatch.setattr(Tree, "is_case_insensitive", True)
    with hf_overlay.open_session([models]) as session:
        assert scanned(session) == ["org/qwen3"]
        assert loaded(session, "org/qwen3") == CACHED[WEIGHTS]
        [warning] = said(caplog)
        assert "models--org--Qwen3 differs from" in warning
        session.refresh()
        assert said(caplog) == []
        assert len({name.lower() for name in os.listdir(session.hub_cache)}) == len(os.listdir(session.hub_cache))


@pytest.mark.parametrize("ours", ["folder", "cache"])
def test_what_a_client_wrote_under_another_spelling_takes_no_name_twice(
    ours: str, models: Path, hub: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tree, "is_case_insensitive", True)
    with hf_overlay.open_session([models]) as session:
        hfcache.add_repo(session.hub_cache, "org/qwen3", CACHED)
        if ours == "folder":
            lay_model(models / "org/Qwen3")
        else:
            hfcache.add_repo(hub, "org/Qwen3", CACHED)
        session.refresh()
        lay_model(models / "org/more")
        session.refresh()
        shown = "models--org--Qwen3" if ours == "folder" else "models--org--qwen3"
        assert sorted(os.listdir(session.hub_cache)) == sorted([shown, "models--org--more"])


def test_a_cached_model_stands_in_front_of_one_of_another_spelling_in_a_tier(
    fold: Fold, hub: Path, tmp_path: Path, sessions: Path
) -> None:
    """P11: the order of layers is the same for every spelling."""
    tier = tmp_path / "tier"
    lay_model(tier / "org/Qwen3")
    lay_model(tier / "org/Other")
    hfcache.add_repo(hub, "org/qwen3", CACHED)
    with hf_overlay.open_session([], below=[fold(tier)]) as session:
        assert session.find("org/qwen3").source == "cache"
        assert session.find("org/OTHER").id == "org/Other"
