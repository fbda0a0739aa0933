"""One request of a program to the gateway, and the answer to it."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

Headers = Sequence[tuple[str, str]]


class Request(NamedTuple):
    """A request, of which the head has been read."""

    method: str
    target: str
    """The path and the query, as they were sent."""
    headers: Headers
    """Their names are in small letters."""
    body: Iterator[bytes]
    """Reads what the program sends, as far as it is asked for. Raises OSError, or h11.RemoteProtocolError."""

    @property
    def path(self) -> str:
        """The path, still quoted."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The query, still quoted; empty without one."""
        return self.target.partition("?")[2]

    def header(self, name: str) -> str | None:
        """The first value of a header; None without it."""
        return _first(self.headers, name)


class Answer(NamedTuple):
    """An answer, whose body may still have to be read from somewhere."""

    status: int
    headers: Headers
    body: bytes | Iterable[bytes] = b""
    """Raises OSError where it breaks off, for then the program must not take what it got for the whole."""
    close: Callable[[], object] = lambda: None
    """To be called in any case when nothing more of the body is wanted."""

    def header(self, name: str) -> str | None:
        """The first value of a header, whose name is given in small letters; None without it."""
        return _first(self.headers, name)


def whole(status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """An answer whose body is there."""
    return Answer(status, [*headers, ("Content-Type", media_type), ("Content-Length", str(len(body)))], body)


def in_json(content: object, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Answer:
    """An answer in JSON."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return whole(status, body, "application/json", headers)


def _first(headers: Headers, wanted: str) -> str | None:
    return next((value for name, value in headers if name.lower() == wanted), None)
