"""OpenAI's two dialects, chat completions and completions, and their routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.responses import Response

from mlx_overlay_server.api.dialect import Dialect, documented, respond
from mlx_overlay_server.api.openai.answers import ChatCompletion, Completion, chat_completion, completion, new_id
from mlx_overlay_server.api.openai.errors import NAMES, ErrorAnswer, encode_error, refuse
from mlx_overlay_server.api.openai.stored import ChatStore, add_routes
from mlx_overlay_server.api.openai.stream import chat_chunks, data_event, text_chunks
from mlx_overlay_server.api.openai.wire import ChatCompletionRequest, CompletionRequest
from mlx_overlay_server.api.transport import comment
from mlx_overlay_server.chat.events import Done, Event
from mlx_overlay_server.chat.requests import ChatRequest, TextRequest
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.service import Batch, Service

_STREAM = "With `stream`: chunks as server-sent events, `[DONE]` at the end; an error ends the stream as a chunk."


@dataclass(frozen=True, slots=True)
class _ChatExchange:
    """A chat completion on its way."""

    body: ChatCompletionRequest
    request: ChatRequest
    store: ChatStore
    id: str

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.stream)

    def whole(self, answers: Sequence[Sequence[Event]]) -> ChatCompletion:
        made = chat_completion(self.request, answers, id_=self.id, has_functions=self.body.has_functions)
        if self.body.store:
            self.store.put(made, self.body.messages, self.body.metadata)
        return made

    def stream(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        return chat_chunks(
            self.request,
            self._kept(batches) if self.body.store else batches,
            id_=self.id,
            includes_usage=self.body.includes_usage,
            has_functions=self.body.has_functions,
        )

    async def _kept(self, batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        """Pass events on, and store the completion before its end is sent."""
        answers: list[list[Event]] = [[] for _ in range(self.request.answers)]
        async for index, events in batches:
            answers[index] += events
            if all(each and isinstance(each[-1], Done) for each in answers):
                self.whole(answers)
            yield index, events

    def fail(self, error: ServerError) -> bytes:
        return data_event(encode_error(error))


@dataclass(frozen=True, slots=True)
class _TextExchange:
    """A plain completion on its way."""

    request: TextRequest
    is_streamed: bool
    includes_usage: bool
    scores: int | None
    """The body's `prompt_logprobs`."""

    def whole(self, answers: Sequence[Sequence[Event]]) -> Completion:
        return completion(self.request, answers, scores=self.scores)

    def stream(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        return text_chunks(self.request, batches, includes_usage=self.includes_usage)

    def fail(self, error: ServerError) -> bytes:
        return data_event(encode_error(error))


class _OpenAI:
    """The shape of errors and pings, which both dialects share."""

    names = NAMES
    refuse = staticmethod(refuse)
    ping = staticmethod(comment)


class ChatCompletions(_OpenAI):
    """The dialect of `POST /v1/chat/completions`."""

    def __init__(self, store: ChatStore) -> None:
        """`store` holds the completions that are asked for with `store`."""
        self._store = store

    def decode(self, body: ChatCompletionRequest, headers: Headers) -> _ChatExchange:  # noqa: ARG002 - the protocol's
        """Return the exchange that a body begins. Raises InvalidRequest."""
        return _ChatExchange(body, body.decoded(), self._store, new_id("chatcmpl"))


class Completions(_OpenAI):
    """The dialect of `POST /v1/completions`."""

    def decode(self, body: CompletionRequest, headers: Headers) -> _TextExchange:  # noqa: ARG002 - the protocol's
        """Return the exchange that a body begins. Raises InvalidRequest."""
        return _TextExchange(body.decoded(), bool(body.stream), body.includes_usage, body.prompt_logprobs)


def router(service: Service) -> APIRouter:
    """Return the routes of both, each with and without `/v1`."""
    routes = APIRouter(tags=["OpenAI"])
    store = ChatStore()
    chat: Dialect[ChatCompletionRequest] = ChatCompletions(store)
    text: Dialect[CompletionRequest] = Completions()

    @routes.post("/v1/chat/completions", responses=documented(ChatCompletion, ErrorAnswer, stream=_STREAM))
    @routes.post("/chat/completions", include_in_schema=False)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, in one piece or as a stream of server-sent events."""
        return await respond(service, chat, body, request)

    @routes.post("/v1/completions", responses=documented(Completion, ErrorAnswer, stream=_STREAM))
    @routes.post("/completions", include_in_schema=False)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue plain prompts, in one piece or as a stream of server-sent events."""
        return await respond(service, text, body, request)

    add_routes(routes, store)
    return routes
