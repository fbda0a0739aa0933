"""OpenAI's Responses: its dialect and its routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import Response

from mlx_overlay_server.api.dialect import Dialect, documented, respond
from mlx_overlay_server.api.openai.errors import ErrorAnswer
from mlx_overlay_server.api.responses.answers import DeletedResponse, ResponseAnswer, turn_of
from mlx_overlay_server.api.responses.errors import NAMES, refuse
from mlx_overlay_server.api.responses.store import STORED, Store, Stored
from mlx_overlay_server.api.responses.stream import ResponseBuilder, named_event
from mlx_overlay_server.api.responses.wire import ResponsesRequest
from mlx_overlay_server.api.transport import answer, comment
from mlx_overlay_server.chat.events import Done, Event, Logprobs, Text
from mlx_overlay_server.chat.requests import ChatRequest
from mlx_overlay_server.errors import PromptTooLong, ServerError
from mlx_overlay_server.service import Batch, Service

_STREAM = "With `stream`: named server-sent events, `response.created` to `response.completed` or another end."


@dataclass(frozen=True, slots=True)
class _ResponseExchange:
    """A response on its way."""

    body: ResponsesRequest
    request: ChatRequest
    builder: ResponseBuilder
    store: Store

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.stream)

    def whole(self, answers: Sequence[Sequence[Event]]) -> ResponseAnswer:
        for event in _logprobs_first(answers[0]):
            for _ in self.builder.feed(event):  # only the response it builds is wanted
                pass
        self._keep(answers[0])
        return self.builder.response

    async def stream(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        all_events: list[Event] = []
        has_begun = False
        try:
            async for _, events in batches:
                data = b""
                if not has_begun:
                    has_begun = True
                    data = b"".join(map(named_event, self.builder.begin()))
                for event in _logprobs_first(events):
                    all_events.append(event)
                    data += b"".join(map(named_event, self.builder.feed(event)))
                    if isinstance(event, Done):
                        self._keep(all_events)  # before the client can ask for it
                if data:
                    yield data
        except PromptTooLong as error:  # clients look for its code in the stream, as OpenAI sends it
            yield self.fail(error)

    def fail(self, error: ServerError) -> bytes:
        return b"".join(map(named_event, self.builder.fail(error)))

    def _keep(self, events: Iterable[Event]) -> None:
        """Store the response, unless the request forbids it."""
        if self.body.store is not False:
            history = self.request.messages[1:] if self.body.instructions else self.request.messages
            self.store.put(Stored(self.builder.response, (*history, turn_of(events))))


class Responses:
    """The dialect of `POST /v1/responses`."""

    names = NAMES
    refuse = staticmethod(refuse)
    ping = staticmethod(comment)

    def __init__(self, store: Store) -> None:
        """`store` holds the responses that requests may continue."""
        self._store = store

    def decode(self, body: ResponsesRequest, headers: Headers) -> _ResponseExchange:  # noqa: ARG002 - the protocol's
        """Return the exchange that a body begins. Raises InvalidRequest."""
        request, tools = body.decoded(self._store.turns_of(body.previous_response_id))
        return _ResponseExchange(body, request, ResponseBuilder(body, tools), self._store)


def router(service: Service) -> APIRouter:
    """Return the dialect's routes, each with and without `/v1`."""
    routes = APIRouter(tags=["Responses"])
    store = Store(STORED)
    dialect: Dialect[ResponsesRequest] = Responses(store)

    @routes.post("/v1/responses", responses=documented(ResponseAnswer, ErrorAnswer, stream=_STREAM))
    @routes.post("/responses", include_in_schema=False)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Respond to some input, in one piece or as a stream of server-sent events."""
        return await respond(service, dialect, body, request)

    @routes.get("/v1/responses/{response_id}", responses=documented(ResponseAnswer, ErrorAnswer))
    @routes.get("/responses/{response_id}", include_in_schema=False)
    async def retrieve(response_id: str) -> Response:
        """Return a stored response."""
        return answer(store.get(response_id).response)

    @routes.delete("/v1/responses/{response_id}", responses=documented(DeletedResponse, ErrorAnswer))
    @routes.delete("/responses/{response_id}", include_in_schema=False)
    async def delete(response_id: str) -> Response:
        """Forget a stored response."""
        store.delete(response_id)
        deleted: DeletedResponse = {"id": response_id, "object": "response", "deleted": True}
        return answer(deleted)

    return routes


def _logprobs_first(events: Sequence[Event]) -> list[Event]:
    """Return events with log probabilities before their text: the text's event holds both."""
    ordered = list(events)
    for at in range(1, len(ordered)):
        if isinstance(ordered[at], Logprobs) and isinstance(ordered[at - 1], Text):
            ordered[at - 1], ordered[at] = ordered[at], ordered[at - 1]
    return ordered
