"""Each release of huggingface_hub loads every model, and refuses or takes links as is known of it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.overlay.users_bytes.world import BELOW, CACHED, CUSTOM, World, contents, load, remove_repo
from tests.support import hubs
from tests.support.hfcache import repo_folder
from tests.support.hubs import Answer, HubProcess


def test_the_releases_are_those_whose_deletions_differ(client: HubProcess) -> None:
    makefile = Path(__file__).parents[3] / "Makefile"
    assert f"HUB_VERSIONS := {' '.join(hubs.ASIDE)}\n" in makefile.read_text()
    if client.release == hubs.INSTALLED:
        assert int(client.version.split(".")[0]) >= 2
    else:
        assert client.version == client.release


def test_every_model_loads_so_that_there_is_something_to_lose(world: World, client: HubProcess) -> None:
    with world.open() as session:
        scanned = client.ask("scan", hub=str(session.hub_cache)).value
        assert set(scanned) == {f"model/{model_id}" for model_id in (*CUSTOM, *CACHED, *BELOW)} | {"dataset/org/data"}
        numbers = {name: len(found) for name, found in scanned.items()}
        assert {name: numbers[name] for name in ("model/org/shared", "model/tier/only", "dataset/org/data")} == {
            "model/org/shared": 3,
            "model/tier/only": 2,
            "dataset/org/data": 3,
        }
        assert all(len(found) == (1 if name[6:] in CUSTOM else len(found)) for name, found in scanned.items())
        for model in session.models:
            answer = load(world, client, session.hub_cache, model.id)
            if model.id.count("/") > 1:
                assert answer.error is not None
                assert answer.error.startswith("HFValidationError")
            else:
                assert answer == Answer(contents(model), None)
                for how in ("file", "cached"):
                    one = client.ask(how, hub=str(session.hub_cache), model_id=model.id, name="config.json")
                    assert one == Answer({"config.json": answer.value["config.json"]}, None)
    world.check_over()


def test_a_client_refuses_to_delete_a_link_to_a_repo_or_takes_just_the_link(world: World, client: HubProcess) -> None:
    """Else the deletions tested here would not be deletions."""
    world.roots[0].joinpath("twin").rename(world.users / "twin")  # else the next test's matter
    world.changed_by_the_user()
    with world.open() as session:
        for model_id in [*CUSTOM[:-1], *CACHED, *BELOW]:
            answer = remove_repo(world, client, session.hub_cache, model_id)
            is_there = os.path.lexists(session.hub_cache / repo_folder(model_id))
            if client.release in hubs.FOLLOWING_LINKS:
                assert "symbolic link" in (answer.error or "")
                assert is_there
            else:
                assert answer == Answer("done", None)
                assert not is_there
    world.check_over()
