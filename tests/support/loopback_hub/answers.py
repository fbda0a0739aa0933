"""Requests as they arrive, and the answers and refusals that they get."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from tests.support.loopback_hub.files import File

Query = dict[str, list[str]]


@dataclass
class Request:
    """A request as it arrived, and what it was answered with so far."""

    method: str
    host: Literal["hub", "cdn", "outside"]
    """Outside: not under the hub's prefix."""
    path: str
    """Without that prefix, quoted as it came."""
    query: Query
    target: str
    """Path and query as one text, not quoted."""
    headers: dict[str, str]
    """Names in lower case."""
    at: float
    """time.monotonic() when its headers had been read."""
    body: bytes = b""
    """Empty where it was larger than 64 MiB."""
    body_size: int = 0
    body_sha256: str = ""
    repo_id: str | None = None
    """The repo it is about, whether there is such a repo or not."""
    name: str | None = None
    """The file of which the answer's body is a part, or for HEAD would be."""
    status: int = 0
    """0 until it is answered."""
    sent: int = 0
    """Bytes of the answer's body that went out, framing and compression included."""
    finished: bool = False
    """Whether the last byte of the file went out: to the kernel, not necessarily into the client's hands."""
    over: bool = False
    """Whether nothing more will be sent, as all was or the client left. Shortly after the client may know it."""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    file: File | None = None
    start: int = 0
    stop: int = 0
    compressible: bool = False

    @property
    def length(self) -> int:
        return len(self.body) if self.file is None else self.stop - self.start

    def chunks(self) -> Iterable[memoryview]:
        return [memoryview(self.body)] if self.file is None else self.file.read(self.start, self.stop)


class Refusal(Exception):
    """An answer that says no."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers or {})

    def answer(self, *, as_text: bool) -> Answer:
        if as_text:
            return text_answer(self.status, self.message, self.headers)
        return json_answer({"error": self.message}, self.headers, self.status)


def no_page() -> Refusal:
    return Refusal(404, None, "Sorry, we can't find the page you are looking for.")


class Moved(Exception):
    """The path at which to ask instead."""


def json_answer(content: object, headers: Mapping[str, str] | None = None, status: int = 200) -> Answer:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, kind | dict(headers or {}), json.dumps(content).encode(), compressible=True)


def text_answer(status: int, content: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, {"Content-Type": "text/plain; charset=utf-8"} | dict(headers or {}), content.encode())


def redirect(status: Literal[302, 307], location: str, headers: Mapping[str, str] | None = None) -> Answer:
    said = f"{HTTPStatus(status).phrase}. Redirecting to {location}"
    return text_answer(status, said, {"Location": location} | dict(headers or {}))


def file_answer(file: File, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    """A file, or the part of it that a Range header wants."""
    headers = {
        "Content-Type": "application/octet-stream" if file.sha256 else "text/plain; charset=utf-8",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(file.name)}; filename=\"{Path(file.name).name}\";",
        "Accept-Ranges": "bytes",
    } | dict(headers)
    part = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", wanted or "", re.IGNORECASE)
    if part is None or part.groups() == ("", ""):
        return Answer(200, headers, b"", file, 0, file.size, compressible=file.sha256 is None)
    first, last = part.groups()
    start = int(first) if first else max(0, file.size - int(last))
    stop = min(file.size, int(last) + 1) if first and last else file.size
    if start >= stop:
        raise Refusal(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{file.size}"})
    return Answer(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}, b"", file, start, stop)
