"""The Hub's errors reach a program as they would without an overlay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.online.people import NEW, NOWHERE
from tests.support.loopback_hub import LoopbackHub
from tests.support.online import Client, Failure, Person

CALLS = (
    ("snapshot_download",),
    ("hf_hub_download", "config.json"),
    ("model_info",),
    ("list_repo_files",),
)


@pytest.fixture
def failures(pair: tuple[Person, Client, Client]) -> Iterator[tuple[LoopbackHub, Callable[..., Failure]]]:
    """The Hub, and what a call raises through the overlay, which must be what it raises without."""
    person, overlaid, plain = pair

    def failure(*call: str, **arguments: Any) -> Failure:
        alone = as_said_to(plain.failure(*call, **arguments), plain)
        assert as_said_to(overlaid.failure(*call, **arguments), overlaid) == alone
        return alone

    yield person.hub, failure
    person.hub.heal()
    person.hub.recover()


def as_said_to(failure: Failure, client: Client) -> Failure:
    """Without what differs from one request, and one cache, to the next."""
    message = failure.message.replace(client.environ["HF_ENDPOINT"], "HUB")
    return Failure(failure.error, re.sub(r"Root=[-\w.]+(;[-\w.]+)?", "ID", message))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("repo_id", [NOWHERE, "nowhere", "org/secret"])
def test_what_the_hub_refuses_is_refused_in_its_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]], repo_id: str, call: tuple[str, ...]
) -> None:
    """P12: type and message, but for the URL."""
    _, failure = failures
    name, *rest = call
    assert failure(name, repo_id, *rest).error == "RepositoryNotFoundError"


def test_a_gated_repo_is_refused_in_the_hubs_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]],
) -> None:
    """P12: with where to ask for access."""
    _, failure = failures
    assert failure("hf_hub_download", "org/gated", "config.json").error == "GatedRepoError"
    assert failure("snapshot_download", "org/gated", max_workers=1).error == "GatedRepoError"


def test_a_revision_and_a_file_that_the_hub_lacks_are_refused_in_its_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]],
) -> None:
    _, failure = failures
    assert failure("snapshot_download", NEW, revision="v9").error == "RevisionNotFoundError"
    assert failure("hf_hub_download", NEW, "config.json", revision="v9").error == "RevisionNotFoundError"
    assert failure("hf_hub_download", NEW, "no-such-file").error == "RemoteEntryNotFoundError"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [400, 403])
def test_other_refusals_are_told_in_the_hubs_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]], status: int, call: tuple[str, ...]
) -> None:
    hub, failure = failures
    hub.fail(status)
    name, *rest = call
    failure(name, NEW, *rest)


@pytest.mark.parametrize("call", ["snapshot_download", "model_info"])  # others try again for half a minute
@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_hubs_own_trouble_is_told_in_its_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]], status: int, call: str
) -> None:
    hub, failure = failures
    hub.fail(status)
    failure(call, NEW)


def test_without_a_hub_a_download_fails_as_without_a_network(pair: tuple[Person, Client, Client]) -> None:
    """The same error; its text also tells which Hub the gateway could not reach."""
    person, overlaid, plain = pair
    person.hub.outage()
    try:
        alone = plain.failure("snapshot_download", NEW)
        failure = overlaid.failure("snapshot_download", NEW)
    finally:
        person.hub.recover()
    assert failure.error == alone.error == "LocalEntryNotFoundError"
    assert failure.message.splitlines()[-1] == alone.message.splitlines()[-1]
    assert f"{person.hub.endpoint} cannot be reached" in failure.message
