"""What tests of unmodified clients online share: people with a Hub of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.online.people import FILES, MINE, MINE_SAYS, NEW, NEW_SAYS, furnish
from tests.support.hfcache import listing, repo_folder
from tests.support.models import make_model
from tests.support.online import Client, Person, at_a_shell

HUB_SAYS = "the Hub must not speak of this."


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    """With MINE in the folder, and another MINE, and NEW, on the Hub."""
    with at_a_shell(tmp_path) as person:
        furnish(person)
        yield person


@pytest.fixture(scope="package")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """The same with models that load; whatever the tests do, the folder stays as it is, and MINE out of the cache."""
    top = tmp_path_factory.mktemp("speaking")
    with at_a_shell(top) as person:
        make_model(person.models / MINE, MINE_SAYS, shards=2)
        person.hub.add_repo(MINE, make_model(top / "hidden", HUB_SAYS))
        person.hub.add_repo(NEW, make_model(top / "new", NEW_SAYS, shards=2))
        before = listing(person.models)
        yield person
        assert listing(person.models) == before, "P1: the user's folder was changed"
        assert not (person.cache / repo_folder(MINE)).exists(), "a model of the user's is in the real cache"


@pytest.fixture(scope="package")
def session(speaking: Person) -> Iterator[Client]:
    """One client in one session, for all that only reads."""
    with speaking.client() as client:
        yield client


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Person, Client, Client]]:
    """Somebody with a client in a session and one without."""
    with at_a_shell(tmp_path_factory.mktemp("pair")) as person:
        furnish(person)
        person.hub.add_repo("org/secret", FILES, private=True)
        person.hub.add_repo("org/gated", FILES, gated=True)
        with person.client() as overlaid, person.plain_client() as plain:
            yield person, overlaid, plain
