"""Anthropic's dialect and its routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import Response

from mlx_overlay_server.api.anthropic.answers import AnthropicMessage, TokenCount, message
from mlx_overlay_server.api.anthropic.errors import NAMES, AnthropicErrorAnswer, encode_error, refuse
from mlx_overlay_server.api.anthropic.stream import MessageStream, named_event, ping
from mlx_overlay_server.api.anthropic.wire import CountRequest, MessagesRequest
from mlx_overlay_server.api.dialect import Dialect, documented, respond
from mlx_overlay_server.api.transport import answer
from mlx_overlay_server.chat.events import Event
from mlx_overlay_server.chat.requests import ChatRequest
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.service import Batch, Service
from mlx_overlay_server.ticket import Ticket

_STREAM = "With `stream`: named server-sent events, `message_start` to `message_stop`; `error` ends one that fails."


@dataclass(frozen=True, slots=True)
class _MessageExchange:
    """A message on its way."""

    request: ChatRequest
    is_streamed: bool

    def whole(self, answers: Sequence[Sequence[Event]]) -> AnthropicMessage:
        return message(self.request, answers[0])

    def stream(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        return MessageStream(self.request).encode(batches)

    def fail(self, error: ServerError) -> bytes:
        return named_event("error", encode_error(error))


class Messages:
    """The dialect of `POST /v1/messages`."""

    names = NAMES
    refuse = staticmethod(refuse)
    ping = staticmethod(ping)

    def decode(self, body: MessagesRequest, headers: Headers) -> _MessageExchange:
        """Return the exchange that a body begins. Raises InvalidRequest."""
        return _MessageExchange(body.decoded(has_beta="anthropic-beta" in headers), bool(body.stream))


def router(service: Service) -> APIRouter:
    """Return the dialect's routes, at `/v1` and at `/anthropic/v1`."""
    routes = APIRouter(tags=["Anthropic"])
    dialect: Dialect[MessagesRequest] = Messages()

    @routes.post("/v1/messages", responses=documented(AnthropicMessage, AnthropicErrorAnswer, stream=_STREAM))
    @routes.post("/anthropic/v1/messages", include_in_schema=False)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, in one piece or as a stream of server-sent events."""
        return await respond(service, dialect, body, request)

    @routes.post("/v1/messages/count_tokens", responses=documented(TokenCount, AnthropicErrorAnswer))
    @routes.post("/anthropic/v1/messages/count_tokens", include_in_schema=False)
    async def count_tokens(body: CountRequest) -> Response:
        """Count the tokens of a conversation, as the model's own template writes it."""
        body.name(service.default_model)
        count: TokenCount = {"input_tokens": await service.count_tokens(body.decoded(), Ticket())}
        return answer(count)

    return routes
