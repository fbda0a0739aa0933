"""The protocol of a dialect, and `respond`, which answers a request of any dialect."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response

from mlx_overlay_server.access import CURRENT
from mlx_overlay_server.api.fields import ModelBody
from mlx_overlay_server.api.transport import EventStream, answer, unless_gone
from mlx_overlay_server.chat.events import Event
from mlx_overlay_server.chat.requests import AnyRequest
from mlx_overlay_server.errors import Field, ServerError
from mlx_overlay_server.service import Batch, Service, gathered
from mlx_overlay_server.ticket import Ticket
from mlx_overlay_server.turns import turn

Body = TypeVar("Body", bound=ModelBody, contravariant=True)

CLIENT_GONE = 499
"""The status that is counted for an answer whose client has gone, as nginx has it."""

_LOOPBACK = frozenset({"127.0.0.1", "::1"})
_LONGEST_NAME = 60


class Exchange(Protocol):
    """One request of a dialect, decoded, and how to encode its answer."""

    @property
    def request(self) -> AnyRequest:
        """The request in the form that all dialects share."""

    @property
    def is_streamed(self) -> bool:
        """Whether the client wants server-sent events."""

    def whole(self, answers: Sequence[Sequence[Event]]) -> Mapping[str, object]:
        """Encode the answers in one piece; each answer is the list of all its events."""

    def stream(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        """Encode the answers as server-sent events, as they come."""

    def fail(self, error: ServerError) -> bytes:
        """Encode an error that ends a stream which has begun."""


class Dialect(Protocol[Body]):
    """The form of requests and answers that one family of clients uses. `Body` is the type of its requests."""

    @property
    def names(self) -> Mapping[Field, str | None]:
        """The dialect's name for each field of the shared request; None: it has no such field."""

    def decode(self, body: Body, headers: Headers) -> Exchange:
        """Decode a request. Raises InvalidRequest."""

    def refuse(self, error: ServerError) -> Response:
        """Encode an error as a response of its own."""

    def ping(self, note: str) -> bytes:
        """Encode an event that keeps a waiting client from giving up; `note` says what it waits for."""


async def respond(service: Service, dialect: Dialect[Body], body: Body, request: Request) -> Response:
    """Answer a request, in one piece or as a stream. Raises ServerError unless a stream has begun."""
    ticket = Ticket(client=client_of(request))
    await turn()
    body.name(service.default_model)
    exchange = dialect.decode(body, request.headers)
    batches = service.answer(exchange.request, ticket)
    if exchange.is_streamed:
        events = exchange.stream(batches)
        return EventStream(events, ticket, refuse=dialect.refuse, fail=exchange.fail, ping=dialect.ping)
    answers = await unless_gone(request, gathered(batches, exchange.request.answers))
    return Response(status_code=CLIENT_GONE) if answers is None else answer(exchange.whole(answers))


def client_of(request: Request) -> str:
    """Return a name for the client: its key's name, else that of its program, and its address unless it is local."""
    if (key := CURRENT.get()) is not None:
        return key.name
    agent = request.headers.get("user-agent", "")
    program = (
        "browser" if agent.startswith("Mozilla/") else agent.partition("(")[0].strip()[:_LONGEST_NAME] or "unknown"
    )
    address = request.client.host if request.client is not None else ""
    return program if address in _LOOPBACK or not address else f"{program} at {address}"


def documented(whole: Any, error: Any, *, stream: str | None = None) -> dict[int | str, dict[str, Any]]:
    """Describe a route's answers for `/openapi.json`. Answers are not validated against the description.

    `whole` and `error` are TypedDicts, or unions of them; `stream` describes the event stream in a sentence.
    """
    answered: dict[str, Any] = {"model": whole, "description": "The answer."}
    if stream is not None:
        answered["content"] = {"text/event-stream": {"schema": {"type": "string", "description": stream}}}
    return {
        200: answered,
        "4XX": {"model": error, "description": "What is wrong with the request."},
        "5XX": {"model": error, "description": "What is wrong with the server."},
    }
