"""One request of a program to the gateway, and the answer to it."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

Headers = Sequence[tuple[str, str]]


class Request(NamedTuple):
    """A request, of which the head has been read."""

    method: str
    target: str
    """Path and query, as they were sent."""
    headers: Headers
    """The headers; names are in lower case."""
    body: Iterator[bytes]
    """Reads the body in pieces, as they are asked for. Raises OSError, or h11.RemoteProtocolError."""

    @property
    def path(self) -> str:
        """The path, percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The query, percent-encoded; empty where there is none."""
        return self.target.partition("?")[2]

    def header(self, name: str) -> str | None:
        """Return the first value of a header, whose name is given in lower case; None where there is none."""
        return _first(self.headers, name)


class Answer(NamedTuple):
    """An answer, whose body may still have to be read from somewhere."""

    status: int
    headers: Headers
    body: bytes | Iterable[bytes] = b""
    """The body in pieces. Raises OSError where it breaks off, so that the program does not take a part for the whole.
    """
    close: Callable[[], object] = lambda: None
    """Frees what the body is read from. It must be called in any case."""

    def header(self, name: str) -> str | None:
        """Return the first value of a header, whose name is given in lower case; None where there is none."""
        return _first(self.headers, name)


def whole(status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """Return an answer whose body is in memory."""
    return Answer(status, [*headers, ("Content-Type", media_type), ("Content-Length", str(len(body)))], body)


def in_json(content: object, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """Return an answer in JSON."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return whole(status, body, "application/json", headers)


def _first(headers: Headers, wanted: str) -> str | None:
    return next((value for name, value in headers if name.lower() == wanted), None)
