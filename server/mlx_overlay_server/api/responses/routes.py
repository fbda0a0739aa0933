"""OpenAI's Responses: its dialect and its routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from mlx_overlay_server.api.dialect import CLIENT_GONE, Dialect, client_of, documented, respond
from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.api.newest import Page, page_of
from mlx_overlay_server.api.openai.errors import ErrorAnswer
from mlx_overlay_server.api.responses.answers import (
    CompactedResponse,
    DeletedResponse,
    InputTokens,
    ResponseAnswer,
    response_head,
    turn_of,
)
from mlx_overlay_server.api.responses.compaction import compacted
from mlx_overlay_server.api.responses.errors import NAMES, refuse
from mlx_overlay_server.api.responses.items import as_items
from mlx_overlay_server.api.responses.store import Store, Stored
from mlx_overlay_server.api.responses.stream import ResponseBuilder, named_event, replayed
from mlx_overlay_server.api.responses.wire import CompactRequest, InputTokensRequest, ResponsesRequest
from mlx_overlay_server.api.transport import answer, comment, unless_gone
from mlx_overlay_server.chat.events import Done, Event, Logprobs, Text
from mlx_overlay_server.chat.requests import ChatRequest
from mlx_overlay_server.errors import InvalidRequest, PromptTooLong, ServerError
from mlx_overlay_server.service import Batch, Service, gathered
from mlx_overlay_server.ticket import Ticket
from mlx_overlay_server.turns import turn

_STREAM = "With `stream`: named server-sent events, `response.created` to `response.completed` or another end."


@dataclass(frozen=True, slots=True)
class _ResponseExchange:
    """A response on its way."""

    body: ResponsesRequest
    request: ChatRequest
    builder: ResponseBuilder
    store: Store
    earlier: tuple[Json, ...]
    """The items of the conversation that the request continues."""

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
            items = (*self.earlier, *as_items(self.body.input))
            self.store.put(
                Stored(self.builder.response, (*history, turn_of(events)), items, tuple(self.builder.pieces))
            )


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
        before = self._store.before(body.previous_response_id)
        body.input = self._store.resolved(body.input)
        request, tools = body.decoded(before.turns if before is not None else ())
        builder = ResponseBuilder(
            response_head(body),
            tools,
            is_summary=body.reasoning is not None and body.reasoning.summary is not None,
            is_encrypted="reasoning.encrypted_content" in (body.include or ()),
            has_logprobs=body.has_logprobs,
        )
        return _ResponseExchange(body, request, builder, self._store, before.all_items if before is not None else ())


def router(service: Service) -> APIRouter:
    """Return the dialect's routes, each with and without `/v1`."""
    routes = APIRouter(tags=["Responses"])
    store = Store()
    dialect: Dialect[ResponsesRequest] = Responses(store)

    @routes.post("/v1/responses", responses=documented(ResponseAnswer, ErrorAnswer, stream=_STREAM))
    @routes.post("/responses", include_in_schema=False)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Respond to some input, in one piece or as a stream of server-sent events."""
        return await respond(service, dialect, body, request)

    @routes.post("/v1/responses/input_tokens", responses=documented(InputTokens, ErrorAnswer))
    @routes.post("/responses/input_tokens", include_in_schema=False)
    async def input_tokens(body: InputTokensRequest, request: Request) -> Response:
        """Count the tokens of a prompt."""
        await turn()
        body.name(service.default_model)
        before = store.before(body.previous_response_id)
        body.input = store.resolved(body.input)
        asked, _ = body.conversation_after(before.turns if before is not None else ())
        count = await unless_gone(request, service.count_tokens(asked, Ticket()))
        if count is None:
            return Response(status_code=CLIENT_GONE)
        counted: InputTokens = {"object": "response.input_tokens", "input_tokens": count}
        return answer(counted)

    @routes.post("/v1/responses/compact", responses=documented(CompactedResponse, ErrorAnswer))
    @routes.post("/responses/compact", include_in_schema=False)
    async def compact(body: CompactRequest, request: Request) -> Response:
        """Let the model sum a conversation up, in an item that later requests begin with."""
        await turn()
        body.name(service.default_model)
        before = store.before(body.previous_response_id)
        body.input = store.resolved(body.input or [])
        asked = body.decoded(before.turns if before is not None else ())
        answers = await unless_gone(request, gathered(service.answer(asked, Ticket(client=client_of(request))), 1))
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        items = (*(before.all_items if before is not None else ()), *as_items(body.input or ()))
        return answer(compacted(items, answers[0]))

    @routes.get("/v1/responses/{response_id}", responses=documented(ResponseAnswer, ErrorAnswer, stream=_STREAM))
    @routes.get("/responses/{response_id}", include_in_schema=False)
    async def retrieve(
        response_id: str, *, stream: bool = False, starting_after: Annotated[int, Query(ge=0)] | None = None
    ) -> Response:
        """Return a stored response, or its stream again, from the event that follows number `starting_after`."""
        stored = store.get(response_id)
        if not stream:
            if starting_after is not None:
                raise InvalidRequest("`starting_after` needs `stream`", param="starting_after")
            return answer(stored.response)
        after = -1 if starting_after is None else starting_after
        events = (
            named_event(event) for event in replayed(stored.response, stored.pieces) if event["sequence_number"] > after
        )
        return StreamingResponse(events, media_type="text/event-stream")

    @routes.get("/v1/responses/{response_id}/input_items", responses=documented(Page, ErrorAnswer))
    @routes.get("/responses/{response_id}/input_items", include_in_schema=False)
    async def input_items(
        response_id: str,
        *,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """List what a stored response answers, with the conversation before it."""
        return answer(page_of(store.get(response_id).items, after=after, limit=limit, is_reversed=order == "desc"))

    @routes.post("/v1/responses/{response_id}/cancel", responses=documented(ResponseAnswer, ErrorAnswer))
    @routes.post("/responses/{response_id}/cancel", include_in_schema=False)
    async def cancel(response_id: str) -> Response:
        """Refuse: there are no background responses here, and a client that closes its connection ends its answer."""
        store.get(response_id)
        raise InvalidRequest(
            "only background responses can be cancelled, and this server has none; close the connection of an answer "
            "to end it",
            param="response_id",
        )

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
