"""The transport that all dialects share: JSON answers, refusals, event streams, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_overlay_server.errors import Failed, Field, ServerError
from mlx_overlay_server.ticket import Ticket

T = TypeVar("T")
logger = logging.getLogger("mlx_overlay_server")

PATIENCE_SECONDS = 3.0
"""Seconds to wait for a stream's first event before the response begins. Until then, an error gets an HTTP status of
its own.
"""
PING_SECONDS = 5.0
"""Seconds of silence after which a ping is sent. Clients and proxies give up silent streams after 15 seconds or more.
"""


def dumps(content: object) -> bytes:
    """Encode a value as compact JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def answer(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(dumps(content), status, headers, "application/json")


def refusal(error: ServerError, content: object) -> Response:
    """Return the JSON response that refuses a request; `content` is the error in the dialect's form."""
    return answer(content, error.status, {"Retry-After": "1"} if error.status in (429, 503) else None)


def param_of(error: ServerError, names: Mapping[Field, str | None]) -> str | None:
    """Return the client's name for the field that an error blames; `names` are the dialect's for shared fields."""
    if error.param is not None or error.field is None:
        return error.param
    name = names[error.field]
    return name if name is None or error.key is None else f"{name}.{error.key}"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of some work. If the client hangs up first, cancel the work and return None."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class ByteStream(Response):
    """An answer that is sent as it comes, in pieces. Ends its source as soon as the client is gone.

    An error that comes after the first piece cuts the connection, so that the client notices.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes], media_type: str, *, refuse: Callable[[ServerError], Response]
    ) -> None:
        """Stream some pieces; `refuse` encodes an error that comes before the first."""
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._refuse = refuse
        self._has_begun = False
        self._last_sent = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        others = [asyncio.ensure_future(_disconnected(receive)), asyncio.ensure_future(self._keep_alive(send))]
        try:
            await asyncio.wait({sending, others[0]}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, *others):
                task.cancel()
            await asyncio.gather(sending, *others, return_exceptions=True)
        if not sending.cancelled():
            sending.result()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for data in self._pieces:
                await self._write(send, data)
        except Exception as error:  # noqa: BLE001 - the boundary: a stream ends with an error its client understands
            known = as_server_error(error)
            if not self._has_begun:
                self._has_begun, self._last_sent = True, time.monotonic()  # no ping before the refusal
                await self._refuse(known)(scope, receive, send)
                return
            await self._fail(known, send)
        finally:
            await self._pieces.aclose()
        await self._write(send, b"", more=False)

    async def _fail(self, error: ServerError, send: Send) -> None:  # noqa: ARG002 - for events, which can tell it
        """Tell the client of an error after the first piece."""
        raise error

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        self._last_sent = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})

    async def _keep_alive(self, send: Send) -> None:
        """Keep a waiting client patient, for as long as the answer is being sent."""


class EventStream(ByteStream):
    """A `text/event-stream` of already encoded events, with others between them that keep the client patient."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        ticket: Ticket,
        *,
        refuse: Callable[[ServerError], Response],
        fail: Callable[[ServerError], bytes],
        ping: Callable[[str], bytes],
    ) -> None:
        """Stream some events, which come as the request in `ticket` makes progress.

        `refuse` encodes an error before the stream has begun, `fail` after; `ping` keeps a waiting client patient.
        """
        super().__init__(events, "text/event-stream", refuse=refuse)
        self._ticket = ticket
        self._failed = fail
        self._ping = ping

    async def _fail(self, error: ServerError, send: Send) -> None:
        await self._write(send, self._failed(error))

    async def _keep_alive(self, send: Send) -> None:
        await asyncio.sleep(PATIENCE_SECONDS)
        if not self._has_begun:
            await self._write(send, self._ping(self._ticket.note()))
        while True:
            await asyncio.sleep(max(0.1, self._last_sent + PING_SECONDS - time.monotonic()))
            if time.monotonic() >= self._last_sent + PING_SECONDS:
                await self._write(send, self._ping(self._ticket.note()))


def comment(note: str) -> bytes:
    """Return a comment of an event stream, which every client ignores (HTML standard, server-sent events, 9.2.6)."""
    return f": {note}\n\n".encode()


def as_server_error(error: Exception) -> ServerError:
    """Return an error that may be shown to a client.

    Of an unexpected error that is only its type; the log names its place.
    """
    if isinstance(error, ServerError):
        return error
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {place[0].filename}:{place[0].lineno}" if place else ""
    logger.error("unexpected %s%s", type(error).__name__, where)  # without its text, which may quote the prompt
    return Failed(f"unexpected {type(error).__name__}; the server's log says where", code="internal_error")
