"""Tiers below the user's own cache, and maps before all else, as unmodified programs with a Hub find them (P1-P4)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.online.people import FILES, ask
from tests.support import hubs
from tests.support.folders import lay_model, weights
from tests.support.hfcache import Entry, add_repo, listing, repo_folder
from tests.support.online import Person, at_a_shell, cached, contents

HELD = "org/held"
"""In the tier, as the Hub has it."""
NEWER = {**FILES, "config.json": b'{"model_type": "llama", "newer": true}', "more.txt": b"more"}
"""The next revision on the Hub, of which the weights are the same."""
KINDS = ("model", "dataset", "space")


class Shared(NamedTuple):
    """A person beside a tier."""

    person: Person
    tier: Path
    before: dict[str, Entry]
    """What is in the tier."""

    @property
    def options(self) -> tuple[str, ...]:
        return ("--below", str(self.tier))


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    """A person without a cache, and a tier with one repo of each kind; in the end the tier is as it was (P1)."""
    with at_a_shell(tmp_path) as person:
        tier = tmp_path / "shared" / "hub"
        for kind in KINDS:
            commit = person.hub.add_repo(HELD, FILES, repo_type=kind)  # type: ignore[arg-type]
            add_repo(tier, HELD, FILES, repo_type=kind, commit=commit, locks=True)
        before = listing(tier)
        yield Shared(person, tier, before)
        assert listing(tier) == before, "P1: the tier was changed"


def leads_to(tier: Path, cache: Path) -> list[str]:
    """Links in a cache that end in a tier."""
    return [str(path) for path in cache.rglob("*") if os.path.realpath(path).startswith(f"{tier}/")]


@pytest.mark.parametrize("release", ["0.36.2", hubs.INSTALLED])
def test_nothing_is_fetched_of_a_revision_that_a_tier_holds(shared: Shared, release: str) -> None:
    """P2: of models, datasets and spaces, though the Hub is asked."""
    person = shared.person
    with person.client(release=release, options=shared.options) as client:
        for kind in KINDS:
            assert contents(client.get("snapshot_download", HELD, repo_type=kind)) == FILES
            name = client.get("hf_hub_download", HELD, "config.json", repo_type=kind)
            assert Path(name).read_bytes() == FILES["config.json"]
    assert person.asked_about(HELD), "the Hub names the revision"
    assert person.hub.bytes_served(HELD) == 0
    assert not leads_to(shared.tier, person.cache)


@pytest.mark.parametrize("release", ["0.36.2", hubs.INSTALLED])
def test_of_a_newer_revision_only_what_no_tier_holds_is_fetched_and_comes_home(shared: Shared, release: str) -> None:
    """P2 to P4: the new files are in the user's own cache, those that are the same stay the tier's."""
    person = shared.person
    commit = person.hub.add_repo(HELD, NEWER)
    for _ in range(2):  # the second time nothing at all
        with person.client(release=release, options=shared.options) as client:
            assert contents(client.get("snapshot_download", HELD)) == NEWER
            scanned = client.get("scan_cache_dir")
            assert scanned["warnings"] == []
        assert person.downloads(HELD) == {"config.json": 1, "more.txt": 1}
        repo = person.cache / repo_folder(HELD)
        new = {name: NEWER[name] for name in ("config.json", "more.txt")}
        assert contents(repo / "snapshots" / commit) == new, "what was downloaded is home, and nothing of the tier's"
        assert not (repo / "refs/main").exists(), "without the tier the revision is not whole, and is main for nobody"
    if release != "0.36.2":  # which leaves no listing of what belongs to a revision
        with person.client(release=release, options=(*shared.options, "--offline")) as client:
            assert contents(client.get("snapshot_download", HELD, revision=commit)) == NEWER
    with person.plain_client(release=release) as alone:
        assert contents(alone.get("snapshot_download", HELD)) == NEWER
    assert person.downloads(HELD) == dict.fromkeys(NEWER, 1)


def test_a_revision_that_shares_nothing_with_a_tier_comes_home_whole(shared: Shared) -> None:
    person = shared.person
    other = {"config.json": b'{"all": "new"}', "model.safetensors": weights(b"all new")}
    person.hub.add_repo(HELD, other, repo_type="dataset")
    with person.client(options=shared.options) as client:
        assert contents(client.get("snapshot_download", HELD, repo_type="dataset")) == other
    assert cached(person.cache, HELD, "dataset") == other
    with person.offline_client() as alone:
        assert contents(alone.get("snapshot_download", HELD, repo_type="dataset")) == other


def test_the_own_cache_and_two_tiers_show_all_their_revisions(shared: Shared, tmp_path: Path) -> None:
    """Offline: each by its commit, main as the own cache has it."""
    person = shared.person
    second = tmp_path / "second"
    old = add_repo(second, HELD, {"config.json": b"old"}, refs=("main", "v1")).name
    own = add_repo(person.cache, HELD, {"config.json": b"own"}).name
    held = (shared.tier / repo_folder(HELD) / "refs/main").read_text()
    options = (*shared.options, "--below", str(second), "--offline")
    with person.client(options=options) as client:
        assert contents(client.get("snapshot_download", HELD)) == {"config.json": b"own"}
        for commit, files in {own: {"config.json": b"own"}, old: {"config.json": b"old"}, held: FILES}.items():
            assert contents(client.get("snapshot_download", HELD, revision=commit)) == files
        assert contents(client.get("snapshot_download", HELD, revision="v1")) == {"config.json": b"old"}
    assert person.hub.requests == []


def test_a_plain_folder_in_a_tier_stands_in_for_the_hubs_model(shared: Shared) -> None:
    """It proves no revision, so the Hub is not asked."""
    person = shared.person
    person.hub.add_repo("acme/plain", FILES)
    folder = lay_model(shared.tier.parent / "models/acme/plain")
    mine = contents(folder)
    with person.client(options=("--below", str(folder.parents[1]))) as client:
        assert contents(client.get("snapshot_download", "acme/plain")) == mine
    assert not person.asked_about("acme/plain")


def test_a_model_path_stands_before_tiers_and_the_own_cache_before_a_plain_folder_in_one(shared: Shared) -> None:
    person = shared.person
    mine = contents(lay_model(person.models / HELD))
    lay_model(shared.tier.parent / "models/org/cached")
    add_repo(person.cache, "org/cached", FILES, commit=person.hub.add_repo("org/cached", FILES))
    options = (*shared.options, "--below", str(shared.tier.parent / "models"))
    with person.client(options=options) as client:
        assert contents(client.get("snapshot_download", HELD)) == mine
        assert contents(client.get("snapshot_download", "org/cached")) == FILES
    assert not person.asked_about(f"models/{HELD}")
    assert person.hub.bytes_served() == 0


def test_a_mapped_folder_answers_for_a_model_and_for_a_dataset(shared: Shared, tmp_path: Path) -> None:
    """Wherever it lies and whatever it is called; the Hub hears nothing."""
    person = shared.person
    model = lay_model(tmp_path / "elsewhere/my experiment 3")
    data = tmp_path / "elsewhere/rows"
    (data / "data").mkdir(parents=True)
    (data / "data/train.csv").write_bytes(b"a,b\n1,2\n")
    options = (*shared.options, "--map", f"{HELD}={model}", "--map", f"datasets/{HELD}={data}")
    mine, rows = contents(model), contents(data)
    with person.client(options=options) as client:
        assert contents(client.get("snapshot_download", HELD)) == mine
        assert contents(client.get("snapshot_download", HELD, repo_type="dataset")) == rows
        assert client.get("list_repo_files", HELD, repo_type="dataset") == ["data/train.csv"]
        assert client.get("dataset_info", HELD)["id"] == HELD
        assert contents(client.get("snapshot_download", HELD, repo_type="space")) == FILES
        assert ask(client.environ["HF_ENDPOINT"], f"/datasets/{HELD}/resolve/main/data/train.csv").body == b"a,b\n1,2\n"
    assert [each for each in person.asked_about(HELD) if "spaces" not in each] == []


@pytest.mark.parametrize("how", ["missing", "a mount point"])
def test_a_mapped_folder_that_is_away_is_never_downloaded_instead(shared: Shared, tmp_path: Path, how: str) -> None:
    """P7: what a map stands for is known even before the folder was ever there, or anything in it."""
    person = shared.person
    away = tmp_path / "drive that is away"
    if how == "a mount point":
        away.mkdir()
    with person.client(options=("--map", f"{HELD}={away}")) as client:
        assert str(away) in client.failure("hf_hub_download", HELD, "config.json").message
        assert client.failure("snapshot_download", HELD).error == "LocalEntryNotFoundError"
        mine = contents(lay_model(away))
        assert contents(client.get("snapshot_download", HELD)) == mine
    assert not person.asked_about(HELD)


def test_a_tier_that_goes_away_hides_what_it_held_and_what_the_own_cache_has_stays(shared: Shared) -> None:
    """P7: nothing that it held is downloaded meanwhile; it is back as soon as the tier is."""
    person = shared.person
    add_repo(person.cache, HELD, FILES, repo_type="space", commit=person.hub.add_repo(HELD, FILES, repo_type="space"))
    gone = shared.tier.with_name("gone")
    with person.client(options=shared.options) as client:
        assert contents(client.get("snapshot_download", HELD)) == FILES
        shared.tier.rename(gone)
        for kind in ("model", "dataset"):
            assert str(shared.tier) in client.failure("hf_hub_download", HELD, "config.json", repo_type=kind).message
        assert contents(client.get("snapshot_download", HELD, repo_type="space")) == FILES
        gone.rename(shared.tier)
        for kind in KINDS:
            assert contents(client.get("snapshot_download", HELD, repo_type=kind)) == FILES
    assert person.hub.bytes_served() == 0
