"""Who answers for a model on the gateway, and that only a question which says so refreshes the overlay."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.gateway.hub import SETTLE_SECONDS, Hub, Unavailable
from hf_overlay.hfcache import LinkedRepo

from tests.support import hfcache
from tests.support.folders import lay_model, weights

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"from the cache"),
    "tokenizer.json": b"{}",
}


class Clock:
    """Time as the session sees it."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("hf_overlay.session.time", clock)
    return clock


@pytest.fixture
def session(models: Path, sessions: Path, clock: Clock) -> Iterator[hf_overlay.Session]:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models]) as session:
        yield session


def path_of(found: LinkedRepo | Unavailable | None) -> str:
    assert isinstance(found, LinkedRepo)
    return found.model.path


def test_the_users_model_answers_for_its_id_and_the_real_hub_for_others(
    session: hf_overlay.Session, models: Path
) -> None:
    hub = Hub(session)
    assert path_of(hub.find("org/name")) == str(models / "org/name")
    assert hub.find("org/other") is None
    assert hub.find("../name") is hub.refresh_and_find("../name") is None
    assert session.seconds_since_change("org/name") == math.inf


def test_only_refresh_and_find_refreshes_and_only_where_the_tree_is_behind(
    session: hf_overlay.Session, models: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshes = []
    refresh = session.refresh
    monkeypatch.setattr(session, "refresh", lambda: refreshes.append(refresh()))
    hub = Hub(session)
    lay_model(models / "org/new")
    assert hub.find("org/new") is None
    assert path_of(hub.refresh_and_find("org/name")) == str(models / "org/name")
    assert refreshes == []
    hub.refresh_and_find("org/new")
    assert [changes.added for changes in refreshes] == [("org/new",)]
    clock.now += SETTLE_SECONDS
    assert path_of(hub.find("org/new")) == str(models / "org/new")


def test_a_model_that_has_just_changed_sends_clients_to_their_cache_for_a_while(
    session: hf_overlay.Session, models: Path, clock: Clock
) -> None:
    hub = Hub(session)
    (models / "org/name/added.txt").write_text("changes the commit")
    session.refresh()
    found = hub.find("org/name")
    assert isinstance(found, Unavailable)
    assert found.has_copy
    assert "has just changed" in found.message
    clock.now += SETTLE_SECONDS
    assert isinstance(hub.find("org/name"), LinkedRepo)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_model_on_a_drive_that_is_away_is_not_the_real_hubs_to_answer(
    session: hf_overlay.Session, models: Path, hub: Path, is_cached: bool
) -> None:
    if is_cached:
        hfcache.add_repo(hub, "org/name", FILES)
    models.rename(models.parent / "unplugged")
    found = Hub(session).refresh_and_find("org/name")
    assert isinstance(found, Unavailable)
    assert found.has_copy == is_cached
    assert str(models) in found.message


@pytest.mark.mlx_lm
@pytest.mark.parametrize("is_cached", [False, True])
def test_an_incomplete_folder_is_not_the_real_hubs_to_answer_unless_it_is_excluded(
    models: Path, sessions: Path, hub: Path, is_cached: bool
) -> None:
    if is_cached:
        hfcache.add_repo(hub, "org/name", FILES)
    os.truncate(lay_model(models / "org/name") / "model.safetensors", 40)
    lay_model(models / "org/no-model", {"config.json": b"{}"})
    with hf_overlay.open_session([models]) as session:
        found = Hub(session).refresh_and_find("org/name")
        assert isinstance(found, Unavailable)
        assert found.has_copy == is_cached
        assert f"org/name in {models}/org/name is incomplete (model.safetensors holds 40 of" in found.message
        assert "--exclude org/name lets the Hub answer" in found.message
        assert Hub(session).refresh_and_find("org/no-model") is None, "what is not a model at all is the Hub's"
    with hf_overlay.open_session([models], exclude=["org/name"]) as session:
        assert Hub(session).refresh_and_find("org/name") is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_cannot_be_used_is_not_the_real_hubs_to_answer(models: Path, sessions: Path, name: str) -> None:
    """P2: the user has the model, although its config.json is cut, or its weights are on a drive that is away."""
    file = lay_model(models / "org/name") / name
    file.unlink()
    if name == "config.json":
        file.write_bytes(b'{"model_type": "lla')
    else:
        file.symlink_to("/no/such/drive/model.safetensors")
    with hf_overlay.open_session([models]) as session:
        found = Hub(session).refresh_and_find("org/name")
        assert isinstance(found, Unavailable)
        assert f"org/name in {models}/org/name {name} is " in found.message
        assert "; correct that, or --exclude org/name lets the Hub answer" in found.message
        with pytest.raises(hf_overlay.IncompleteModel):
            session.resolve("org/name")


def test_what_answers_for_an_incomplete_folder_is_said_once(
    models: Path, sessions: Path, hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = hfcache.add_repo(hub, "org/name", FILES)
    folder = lay_model(models / "org/name")
    os.truncate(folder / "model.safetensors", 40)
    with hf_overlay.open_session([models]) as session:
        for size in (40, 41, 42):  # as a copy goes on
            os.truncate(folder / "model.safetensors", size)
            session.refresh()
        assert session.resolve("org/name") == cached
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"{folder} is incomplete; until it is whole, org/name comes from {cached}"]
