"""A Hub in trouble, behind a proxy, or out of reach: models of the user's load all the same (P7)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.online.people import FILES, MINE, NEW, NOWHERE, folder_of, furnish
from tests.support import hubs
from tests.support.loopback_hub import LoopbackHub
from tests.support.online import Person, at_a_shell, cached, contents

# A Hub in trouble -----------------------------------------------------------------------------------------------


TROUBLES: dict[str, Callable[[LoopbackHub], None]] = {
    "refuses connections": lambda hub: hub.outage(),
    "answers 500": lambda hub: hub.fail(500),
    "answers 503": lambda hub: hub.fail(503),
    "hangs": lambda hub: hub.hang(600),
}


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_cached_copies_load_while_the_hub_is_in_trouble(person: Person, trouble: str, release: str) -> None:
    """And the user's own models do so all the more."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", NEW)
    with person.client(release=release) as client:
        TROUBLES[trouble](person.hub)
        if trouble != "hangs":  # there, a plain snapshot_download waits for ever
            assert contents(client.get("snapshot_download", NEW)) == FILES
        config = client.get("hf_hub_download", NEW, "config.json", etag_timeout=1)
        assert Path(config).read_bytes() == FILES["config.json"]
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        person.hub.heal()
        person.hub.recover()
        assert client.get("model_info", NEW)["id"] == NEW, "the gateway did not come back with the Hub"


# A way to the Hub that is not straight --------------------------------------------------------------------------


def test_the_users_own_endpoint_is_the_upstream_with_the_path_in_it(tmp_path: Path) -> None:
    """A mirror behind a path, whose redirects are relative and whose listings have many pages."""
    with at_a_shell(tmp_path, prefix="/mirror/hf", page_size=1, compress=True) as person:
        furnish(person)
        person.hub.rename("org/old", NEW)
        with person.client(HF_ENDPOINT=f"{person.hub.endpoint}/") as client:
            assert contents(client.get("snapshot_download", NEW)) == FILES
            assert contents(client.get("snapshot_download", "org/old")) == FILES
            assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        assert {request.host for request in person.hub.requests} == {"hub", "cdn"}
        assert person.asked_about(MINE) == []
        assert cached(person.cache, NEW) == FILES


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_users_proxy_leads_to_the_hub_and_not_to_the_gateway(person: Person, variable: str) -> None:
    """The loopback Hub is also such a proxy: an address where nobody listens can only be reached through it."""
    proxy = "http://{}:{}".format(*urlsplit(person.hub.endpoint).netloc.split(":"))
    environ = {variable: proxy, "HF_ENDPOINT": "http://127.0.0.3", "NO_PROXY": "localhost"}
    with person.client(**environ) as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        assert contents(client.get("snapshot_download", NEW)) == FILES
    assert {request.headers["host"] for request in person.hub.requests if request.host == "hub"} == {"127.0.0.3"}
    assert person.asked_about(MINE) == []


# Without a network ----------------------------------------------------------------------------------------------


def test_offline_there_is_neither_a_gateway_nor_a_request(person: Person) -> None:
    """`--offline`: the folder and the cache, and nothing else."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", NEW)
    person.hub.reset_counts()
    with person.client(options=["--offline"]) as client:
        assert client.environ["HF_HUB_OFFLINE"] == "1"
        assert client.environ["HF_ENDPOINT"] == person.hub.endpoint
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        assert contents(client.get("snapshot_download", NEW)) == FILES
        assert client.failure("snapshot_download", NOWHERE).error == "LocalEntryNotFoundError"
    assert person.hub.requests == []
