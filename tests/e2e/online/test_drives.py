"""Drives come and go while programs are online (P7)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.online.people import FILES, MINE, NEW, folder_of
from tests.support import hubs
from tests.support.online import Client, Person, cached, contents
from tests.support.processes import eventually


def test_an_unplugged_model_is_not_downloaded_instead(person: Person) -> None:
    """P2 and P12: the answer names the drive; back again, the model loads as before."""
    mine, away = folder_of(person), person.models.with_name("away")
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == mine
        person.models.rename(away)
        for call in (("snapshot_download", MINE), ("hf_hub_download", MINE, "config.json"), ("model_info", MINE)):
            assert str(person.models) in client.failure(*call).message, call
        assert contents(client.get("snapshot_download", NEW)) == FILES, "other models are not hidden"
        away.rename(person.models)
        eventually(lambda: loads(client, mine), "the model loads again")
    assert person.asked_about(MINE) == []
    assert not cached(person.cache, MINE)


def loads(client: Client, files: Mapping[str, bytes]) -> bool:
    """Whether MINE is these files; what has changed on disk may be refused for a few seconds, and no more."""
    reply = client.ask("snapshot_download", MINE)
    if "error" in reply:
        return False
    assert contents(reply["value"]) == files
    return True


def test_the_caches_copy_of_an_unplugged_model_loads(person: Person) -> None:
    """And not a byte is fetched for it, though the Hub has a newer commit by now."""
    theirs = {**FILES, "only-theirs.txt": b"theirs"}
    with person.plain_client() as plain:
        plain.get("snapshot_download", MINE)
    person.hub.add_repo(MINE, {"config.json": b"newer"})
    person.hub.reset_counts()
    mine, away = folder_of(person), person.models.with_name("away")
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == mine
        person.models.rename(away)
        eventually(lambda: loads(client, theirs), "the copy loads")
        assert Path(client.get("hf_hub_download", MINE, "config.json")).read_bytes() == FILES["config.json"]
        away.rename(person.models)
        eventually(lambda: is_folder_again(client, mine, theirs), "the folder's model loads again")
    assert person.asked_about(MINE) == []
    assert cached(person.cache, MINE) == theirs


def is_folder_again(client: Client, mine: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> bool:
    found = contents(client.get("snapshot_download", MINE))
    assert found in (mine, theirs), "neither the folder's model nor the copy, but something between"
    return found == mine


def test_a_model_that_is_copied_into_the_folder_meanwhile_is_seen(person: Person) -> None:
    """Without a restart, and also where the Hub has one of that id."""
    person.hub.add_repo("acme/late", FILES)
    with person.client() as client:
        assert client.failure("snapshot_download", "acme/late-too").error == "RepositoryNotFoundError"
        for name in ("acme/late", "acme/late-too"):
            shutil.copytree(person.models / MINE, person.models / name)
            assert contents(client.get("snapshot_download", name)) == folder_of(person)
            assert Path(client.get("hf_hub_download", name, "only-mine.txt")).read_bytes() == b"mine"
    assert person.asked_about("acme/late") == ["GET /api/models/acme/late-too/revision/main?"]


def test_a_model_that_is_deleted_from_the_folder_is_the_hubs(person: Person) -> None:
    """Nothing is unplugged: the user has taken it away, and the id is the Hub's again at once."""
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        shutil.rmtree(person.models / MINE)
        assert contents(client.get("snapshot_download", MINE)) == {**FILES, "only-theirs.txt": b"theirs"}
    assert cached(person.cache, MINE) == {**FILES, "only-theirs.txt": b"theirs"}


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
def test_a_file_that_was_edited_meanwhile_is_served_as_it_is(person: Person, release: str) -> None:
    """Its size, too: clients compare what they are told with what they get, and blame the network."""
    edited = b'{"model_type": "llama", "edited": true}'
    with person.client(release=release) as client:
        client.get("snapshot_download", MINE)
        (person.models / MINE / "config.json").write_bytes(edited)
        for how in ({}, {"force_download": True}, {"local_dir": str(person.home / "here")}):
            assert Path(client.get("hf_hub_download", MINE, "config.json", **how)).read_bytes() == edited, how
    assert person.asked_about(MINE) == []


@pytest.mark.parametrize("is_cached", [False, True])
def test_an_incomplete_model_is_not_downloaded_instead(person: Person, is_cached: bool) -> None:
    """P12: the answer says what is missing and what to do; where the cache has the model, that one loads."""
    if is_cached:
        with person.plain_client() as plain:
            plain.get("snapshot_download", MINE)
        person.hub.reset_counts()
    weights = person.models / MINE / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 4)
    with person.client() as client:
        if is_cached:
            assert contents(client.get("snapshot_download", MINE)) == {**FILES, "only-theirs.txt": b"theirs"}
        else:
            message = client.failure("snapshot_download", MINE).message
            assert f"{person.models / MINE} is incomplete (model.safetensors holds " in message
            assert f"--exclude {MINE}" in message
    assert person.asked_about(MINE) == []
