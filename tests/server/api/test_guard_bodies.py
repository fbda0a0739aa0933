"""The limit on bodies, to the byte, and what becomes of an answer that has begun before its request is too large."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from mlx_overlay_server.access import Access
from mlx_overlay_server.api.guard import Guard
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.settings import Settings
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LIMIT = 10


def ask(app: ASGIApp, chunks: Sequence[bytes], *headers: tuple[bytes, bytes]) -> list[Message]:
    """Send a body in chunks through a guard: everything that the client is sent."""
    scope: Any = {"type": "http", "method": "POST", "path": "/v1/models", "query_string": b""}
    scope["headers"] = [(b"host", b"localhost"), *headers]
    coming = iter(
        {"type": "http.request", "body": chunk, "more_body": number < len(chunks)}
        for number, chunk in enumerate(chunks, 1)
    )
    sent: list[Message] = []

    async def receive() -> Message:
        return next(coming)

    async def send(message: Message) -> None:
        sent.append(message)

    def refuse(_: Scope, error: ServerError) -> Response:
        return PlainTextResponse(error.message, error.status)

    guard = Guard(
        app,
        access=Access(Settings),
        host="localhost",
        origins=(),
        max_body=_LIMIT,
        refuse=refuse,
        count=lambda *_: None,
    )
    asyncio.run(guard(scope, receive, send))
    return sent


def statuses(sent: Sequence[Message]) -> list[int]:
    """Of every answer that was begun: a client takes one."""
    return [message["status"] for message in sent if message["type"] == "http.response.start"]


async def reads(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers once it has the whole body."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(body)(scope, receive, send)


async def begins(scope: Scope, receive: Receive, send: Send) -> None:
    """Begins its answer after the first chunk of the body, and ends it whatever comes then."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    try:
        await receive()
    finally:
        await send({"type": "http.response.body", "body": b"b"})


@pytest.mark.parametrize("is_announced", [True, False], ids=["announced", "in chunks"])
@pytest.mark.parametrize(("size", "status"), [(0, 200), (1, 200), (_LIMIT, 200), (_LIMIT + 1, 413)])
def test_a_body_may_be_as_large_as_the_limit_and_no_larger(size: int, status: int, is_announced: bool) -> None:
    headers = [(b"content-length", b"%d" % size)] if is_announced else [(b"transfer-encoding", b"chunked")]
    sent = ask(reads, [b"x" * (size // 2), b"x" * (size - size // 2)], *headers)
    assert statuses(sent) == [status]


def test_an_answer_that_has_begun_ends_and_no_other_begins_after_it() -> None:
    sent = ask(begins, [b"x" * _LIMIT, b"x"], (b"transfer-encoding", b"chunked"))
    assert statuses(sent) == [200]
    assert b"".join(message.get("body", b"") for message in sent) == b"ab"


def test_an_answer_to_a_body_that_was_too_large_is_the_guard_s() -> None:
    """Also where the application takes the error for a mistake of the client's and answers it."""

    async def misreads(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except ServerError:
            await PlainTextResponse("bad", 400)(scope, receive, send)

    assert statuses(ask(misreads, [b"x" * (_LIMIT + 1)])) == [413]


@pytest.mark.parametrize("size", [b"x", b"-1", b"1.5"])
def test_a_length_that_is_no_number_of_bytes_is_refused(size: bytes) -> None:
    assert statuses(ask(reads, [b""], (b"content-length", size))) == [400]


def test_an_application_that_fails_sends_nothing_twice() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("error", 500)(scope, receive, send)
        raise RuntimeError  # as Starlette's error handler does once it has answered

    assert statuses(ask(fails, [b"x"])) == [500]
