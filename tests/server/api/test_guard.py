"""Who may ask, and how much: the checks before any route."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.access import Access
from mlx_overlay_server.api import guard as guard_module
from mlx_overlay_server.api.guard import Guard, names_of_this_machine
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.settings import Settings
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LIMIT = 10
_OURS = (("host", "127.0.0.1:10240"),)

Header = tuple[str, str | bytes]


def access_with(api_key: str | None) -> Access:
    """Access by one key for everything, or, without it, by anybody."""
    return Access(lambda: Settings(api_key=api_key))


async def _plain(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers with what it was sent."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(body)(scope, receive, send)


def _fastapi() -> FastAPI:
    """The same, reading its body as FastAPI does, which takes every error of it for a mistake of the client's."""
    app = FastAPI()

    @app.post("/v1/models")
    async def echo(body: list[int]) -> Any:
        return body

    return app


@dataclass
class Door:
    """A guard, and what it did."""

    api_key: str | None = None
    host: str = "127.0.0.1"
    origins: Sequence[str] = ()
    app: ASGIApp = _plain
    counted: list[tuple[str, int]] = field(default_factory=list)
    refused: ServerError | None = None

    def ask(
        self,
        *headers: Header,
        ours: Iterable[Header] = _OURS,
        body: Iterable[bytes] = (),
        path: str = "/v1/models",
        method: str = "POST",
        guard: Guard | None = None,
    ) -> int:
        """The status of the answer, from a guard of its own, or the one given."""
        guard = guard or self.guard()
        pairs = [*ours, *headers]
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), each if isinstance(each, bytes) else each.encode()) for name, each in pairs],
        }
        chunks = [*body]
        sent: list[Message] = []

        async def receive() -> Message:
            chunk = chunks.pop(0) if chunks else b""
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

        async def send(message: Message) -> None:
            sent.append(message)

        asyncio.run(guard(scope, receive, send))
        (status,) = [message["status"] for message in sent if message["type"] == "http.response.start"]
        assert not sent[-1].get("more_body", False)
        return int(status)

    def guard(self) -> Guard:
        return Guard(
            self.app,
            access=access_with(self.api_key),
            host=self.host,
            origins=self.origins,
            max_body=_LIMIT,
            refuse=self._refuse,
            count=lambda path, status: self.counted.append((path, status)),
        )

    def _refuse(self, _: Scope, error: ServerError) -> Response:
        self.refused = error
        return PlainTextResponse(error.message, error.status)


# Without a key --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:10240",
        "localhost:10240",
        "LOCALHOST",
        "[::1]:10240",
        "192.168.1.20:10240",
        "models.example",
        f"{socket.gethostname()}:10240",
        f"{socket.gethostname()}.local:10240",
    ],
)
def test_the_server_s_own_names_and_plain_addresses_are_answered(host: str) -> None:
    assert Door(host="Models.example").ask(("host", host), ours=()) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:10240",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "printer.local",  # whoever is in the same network can have any such name
        "printer.local:10240",
        f"x.{socket.gethostname()}.local",
        ".local",
        "",
        "[",
        "[::1",
        "x y",
    ],
)
def test_a_foreign_name_is_refused_since_any_page_can_have_one_lead_here(host: str) -> None:
    door = Door()
    assert door.ask(("host", host), ours=()) == 403
    assert door.refused is not None
    assert door.refused.code == "foreign_host"


def test_a_request_that_names_no_host_is_refused() -> None:
    assert Door().ask(ours=()) == 403


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://localhost:3000", "https://127.0.0.1", "http://127.0.0.1:10241", "null", "", "//["],
)
def test_a_page_of_somebody_else_s_is_refused(origin: str) -> None:
    door = Door()
    assert door.ask(("origin", origin)) == 403
    assert door.refused is not None
    assert door.refused.code == "foreign_origin"


def test_a_page_of_the_server_s_own_is_answered() -> None:
    assert Door().ask(("origin", "http://127.0.0.1:10240")) == 200


@pytest.mark.parametrize("allowed", ["http://localhost:3000", "*"])
def test_a_page_that_was_allowed_is_answered(allowed: str) -> None:
    assert Door(origins=["http://other.example", allowed]).ask(("origin", "http://localhost:3000")) == 200


@pytest.mark.parametrize("allowed", ["http://localhost:3000", "*"])
def test_no_other_page_manages_the_server_also_where_it_may_use_it(allowed: str) -> None:
    door = Door(origins=[allowed])
    assert door.ask(("origin", "http://localhost:3000"), path="/manage/v1/models/unload") == 403
    assert door.refused is not None
    assert door.refused.code == "foreign_origin"
    assert door.ask(("origin", "http://127.0.0.1:10240"), path="/manage/v1/models/unload") == 200
    assert door.ask(path="/manage/v1/models/unload") == 200, "a program, which no page can make send this"


_odd = st.binary(max_size=10) | st.text("h:/[]@.#?%1", max_size=10).map(str.encode)


@given(host=_odd, origin=st.none() | _odd)
def test_no_host_and_no_origin_break_the_guard(host: bytes, origin: bytes | None) -> None:
    headers: list[Header] = [("host", host)]
    if origin is not None:
        headers.append(("origin", origin))
    assert Door().ask(*headers, ours=()) in (200, 403)


# With a key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [("authorization", "Bearer secret"), ("authorization", "bearer secret"), ("x-api-key", "secret")],
)
def test_who_sends_the_key_is_answered_under_any_name_and_from_any_page(header: Header) -> None:
    headers: list[Header] = [("host", "any.example"), ("origin", "https://any.example"), header]
    assert Door(api_key="secret").ask(*headers, ours=()) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "secret")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer secret2")],
        [("authorization", "Bearer secre")],
        [("x-api-key", "")],
        [("x-api-key", "wrong"), ("authorization", "Bearer secret2")],
        [("x-api-key", b"\xff\xfe")],
        [("authorization", "Bearer schlüssel")],
        [("authorization", b"Bearer \x80")],
    ],
)
def test_who_does_not_is_refused(headers: list[Header]) -> None:
    door = Door(api_key="secret")
    assert door.ask(*headers) == 401
    assert door.refused is not None
    assert "secret" not in door.refused.message


def test_a_key_may_have_any_letters() -> None:
    assert Door(api_key="Schlüssel€").ask(("x-api-key", "Schlüssel€")) == 200
    assert Door(api_key="Schlüssel€").ask(("authorization", "Bearer Schlüssel€")) == 200


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
def test_health_needs_no_key(path: str) -> None:
    assert Door(api_key="secret").ask(path=path, method="GET") == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/ui/app.js"])
def test_the_server_s_own_pages_are_read_without_one(path: str) -> None:
    assert Door(api_key="secret").ask(path=path, method="GET") == 200
    assert Door(api_key="secret").ask(path=path, method="POST") == 401


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/health/", "/v1/health/x", "//health", "/v1/models", "/openapi.json", "/manage/v1/status", "/ui"],
)
def test_everything_else_does(path: str) -> None:
    assert Door(api_key="secret").ask(path=path, method="GET") == 401


def test_browsers_may_ask_beforehand_without_the_key() -> None:
    assert Door(api_key="secret").ask(method="OPTIONS") == 200


# Bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [_plain, _fastapi()], ids=["plain", "fastapi"])
@pytest.mark.parametrize("body", [[b"[1,2,3,4]]"[:9]], [b"[1,2", b",3,4", b"]"], [b"", b"[1]"]])
def test_a_body_within_the_limit_is_taken(app: ASGIApp, body: list[bytes]) -> None:
    size = str(sum(map(len, body)))
    assert Door(app=app).ask(("content-length", size), ("content-type", "application/json"), body=body) == 200
    assert Door(app=app).ask(("content-type", "application/json"), body=body) == 200


def test_a_body_that_says_that_it_is_too_large_is_refused_unread() -> None:
    def unread() -> Iterable[bytes]:
        yield b""

    door = Door()
    assert door.ask(("content-length", str(_LIMIT + 1)), body=unread()) == 413


@pytest.mark.parametrize("app", [_plain, _fastapi()], ids=["plain", "fastapi"])
@pytest.mark.parametrize("length", [None, "3"])
@pytest.mark.parametrize("body", [[b"[1,2,3,4,5,6,7]"], [b"[1,2", b",3,4", b",5,6,7]"], [b"[1]"] * 100])
def test_a_body_that_turns_out_too_large_is_refused(app: ASGIApp, length: str | None, body: list[bytes]) -> None:
    headers: list[Header] = [("content-length", length)] if length else []
    door = Door(app=app)
    assert door.ask(("content-type", "application/json"), *headers, body=body) == 413
    assert door.refused is not None
    assert door.refused.code == "request_too_large"
    assert [status for _, status in door.counted] == [413]


@pytest.mark.parametrize("length", ["x", "1.5", "-1", "0x10", b"\xb2", "9" * 5000])
def test_a_length_that_is_no_number_is_the_client_s_mistake(length: str | bytes) -> None:
    assert Door().ask(("content-length", length)) in (400, 413)


# What is counted ------------------------------------------------------------------------------------------------


def test_answers_are_counted_by_route_and_not_by_what_clients_make_up() -> None:
    door = Door(app=_fastapi())
    door.ask(("content-type", "application/json"), body=[b"[1]"])
    door.ask(path="/v1/made-up")
    door.ask(("host", "evil.example"), ours=())
    assert door.counted == [("/v1/models", 200), ("other", 404), ("other", 403)]


def test_what_is_no_http_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        return {}

    guard = Guard(
        app,
        access=access_with("secret"),
        host="127.0.0.1",
        origins=(),
        max_body=_LIMIT,
        refuse=lambda _, error: PlainTextResponse(error.message, error.status),
        count=lambda *_: None,
    )
    asyncio.run(guard({"type": "lifespan"}, nothing, nothing))
    assert seen == ["lifespan"]


# Names of a Mac ------------------------------------------------------------------------------------------------------


def test_the_name_that_a_mac_announces_is_its_own_also_where_the_network_calls_it_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "dhcp-17.example.org")
    assert names_of_this_machine(lambda: "Anns-MacBook\n") == {
        "anns-macbook",
        "anns-macbook.local",
        "dhcp-17.example.org",
        "dhcp-17.example.org.local",
    }
    monkeypatch.setattr(guard_module, "_announced_name", lambda: "Anns-MacBook")
    door = Door(host="0.0.0.0")
    for name in ("Anns-MacBook.local:10240", "anns-macbook.local.", "dhcp-17.example.org"):
        assert door.ask(ours=[("host", name)]) == 200, name
    assert door.ask(ours=[("host", "bobs-macbook.local")]) == 403


def test_a_name_that_the_network_gives_later_is_its_own_too(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(host="0.0.0.0")
    guard = door.guard()
    assert door.ask(ours=[("host", "renamed.example.org:10240")], guard=guard) == 403
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed.example.org")
    assert door.ask(ours=[("host", "renamed.example.org:10240")], guard=guard) == 200


def test_the_announced_name_is_asked_for_on_macos_alone_and_its_failure_does_no_harm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Sequence[str]] = []

    def scutil(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if len(asked) > 1:
            raise subprocess.TimeoutExpired(command, 2)
        return subprocess.CompletedProcess(command, 0, "Anns-MacBook\n", "")

    monkeypatch.setattr(subprocess, "run", scutil)
    monkeypatch.setattr(sys, "platform", "linux")
    names_of_this_machine()
    assert asked == []
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "anns-macbook.local" in names_of_this_machine()
    assert asked == [["/usr/sbin/scutil", "--get", "LocalHostName"]]
    assert "anns-macbook.local" not in names_of_this_machine()
