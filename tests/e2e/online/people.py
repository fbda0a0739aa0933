"""What tests of unmodified clients online share."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from tests.support import hubs
from tests.support.folders import lay_model, weights
from tests.support.online import Person, contents
from tests.support.processes import SECONDS

MINE = "acme/mine"
"""In the user's folder; the Hub has another commit of it, with a file more."""
NEW = "org/new"
"""On the Hub only."""
NOWHERE = "org/nowhere"
MINE_SAYS = "the folder speaks."
NEW_SAYS = "the Hub alone has this."
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(bytes(range(256)) * 500),
    "tokenizer.json": b"{}",
    "sub/note é.txt": b"a note",
}
RELEASES = ("0.36.2", "1.31.0", "1.33.0", hubs.INSTALLED)


def furnish(person: Person) -> None:
    lay_model(person.models / MINE, {"only-mine.txt": b"mine"}, settled=True)
    person.hub.add_repo(MINE, {**FILES, "only-theirs.txt": b"theirs"})
    person.hub.add_repo(NEW, FILES)
    person.hub.add_repo("org/data", FILES, repo_type="dataset")


def folder_of(person: Person) -> dict[str, bytes]:
    return contents(person.models / MINE)


class Reply(Mapping[str, str]):
    """An answer: a status, headers by lower-case name, a body."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.body = response.read()
        self._headers = {name.lower(): value for name, value in response.getheaders()}

    def __getitem__(self, name: str) -> str:
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def ask(endpoint: str, path: str, method: str = "GET", body: Any = None, **headers: str) -> Reply:
    url = urlsplit(endpoint)
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=SECONDS)
    try:
        connection.request(method, url.path + path, body, headers, encode_chunked=not isinstance(body, bytes | None))
        return Reply(connection.getresponse())
    finally:
        connection.close()
