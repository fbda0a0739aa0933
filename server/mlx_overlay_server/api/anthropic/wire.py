"""Anthropic's dialect: messages, count_tokens, models (reference: docs.anthropic.com/en/api/messages)."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response

from mlx_overlay_server import errors
from mlx_overlay_server.api.fields import MAX_STOPS, Body, Count, Json, Part, Share, image
from mlx_overlay_server.api.transport import EventStream, answer, dumps, unless_gone
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.events import Done, Event, Reasoning, Started, Text, ToolCall, Usage
from mlx_overlay_server.chat.requests import ChatRequest, Params
from mlx_overlay_server.errors import InvalidRequest, ServerError
from mlx_overlay_server.models.library import Listed
from mlx_overlay_server.service import Batch, Service, Ticket, gathered

_TYPES: dict[type[ServerError], str] = {
    errors.InvalidRequest: "invalid_request_error",
    errors.MethodNotAllowed: "invalid_request_error",
    errors.Unauthorized: "authentication_error",
    errors.Forbidden: "permission_error",
    errors.NotFound: "not_found_error",
    errors.TooLarge: "request_too_large",
    errors.Overloaded: "rate_limit_error",
    errors.Unavailable: "overloaded_error",
}
_SIGNATURE = "bWx4LW9tbmk="
"""Clients keep it and send it back; reasoning that never left the machine needs no proof of where it came from."""
_BILLING = "x-anthropic-billing-header:"
"""A system block of Claude Code's: its hash changes with each prompt, so that no prefix would ever be reused."""


def refuse(error: ServerError) -> Response:
    """An error in Anthropic's shape."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return answer(_error(error), error.status, headers)


def _error(error: ServerError) -> Json:
    kind = next((_TYPES[each] for each in type(error).__mro__ if each in _TYPES), "api_error")
    message = error.message
    # There is no field for it. Clients know the beginning of the message for a prompt that is too long.
    if error.param is not None and error.param not in message and not isinstance(error, errors.PromptTooLong):
        message = f"`{error.param}`: {message}"
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": f"req_{uuid.uuid4().hex[:24]}",
    }


def _fail(error: ServerError) -> bytes:
    return _event("error", _error(error))


def _event(name: str, content: Json) -> bytes:
    return f"event: {name}\ndata: ".encode() + dumps(content) + b"\n\n"


def _ping(note: str) -> bytes:
    return f": {note}\n".encode() + _event("ping", {"type": "ping"})


# Requests ------------------------------------------------------------------------------------------------------


class TextBlock(Part):
    type: Literal["text"]
    text: str


class Base64Source(Part):
    type: Literal["base64"]
    media_type: str
    data: str


class UrlSource(Part):
    type: Literal["url"]
    url: str


class ImageBlock(Part):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class TextSource(Part):
    type: Literal["text"]
    data: str


class DocumentBlock(Part):
    """A document of plain text; of other kinds the model would see nothing."""

    type: Literal["document"]
    source: TextSource
    title: str | None = None


class ThinkingBlock(Part):
    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Part):
    type: Literal["redacted_thinking"]


class ToolUseBlock(Part):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


ResultContent = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultContent] | None = None
    is_error: bool | None = None


Block = Annotated[
    TextBlock | ImageBlock | DocumentBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class Message(Part):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Part):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: Json
    strict: bool | None = None


class Choice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class OutputFormat(Part):
    type: Literal["json_schema"]
    schema_: Annotated[Json, Field(alias="schema")]


class OutputConfig(Part):
    effort: str | None = None
    format: OutputFormat | None = None


class _Prompt(Body):
    """What messages and count_tokens have in common."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    # What asks for nothing here: marks for a cache that works without, and names for billing.
    cache_control: Json | None = None
    context_management: Json | None = None
    betas: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_hosted_tools(cls, data: Any) -> Any:
        """Say of a tool that Anthropic's servers would run that it is one, rather than that it has no schema."""
        tools = data.get("tools") if isinstance(data, dict) else None
        for at, tool in enumerate(tools if isinstance(tools, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(kind, str) and kind != "custom":
                raise InvalidRequest(f"tools of type {kind!r} cannot be run here", param=f"tools[{at}].type")
        return data

    def _chat(self, params: Params, stop: tuple[str, ...]) -> ChatRequest:
        tools = tuple(requests.Tool(each.name, each.description, each.input_schema) for each in self.tools or ())
        config = self.output_config or OutputConfig()
        wanted = config.format or self.output_format
        is_thinking = self.thinking is not None and self.thinking.type != "disabled"
        return ChatRequest(
            model=self.model,
            params=params,
            stop=stop,
            messages=tuple(self._turns()),
            tools=tools,
            choice=self._choice(tools),
            format=requests.Format(wanted.schema_) if wanted is not None else None,
            continues=True,
            thinking=is_thinking,
            reasoning_budget=self.thinking.budget_tokens if self.thinking is not None and is_thinking else None,
            effort=config.effort if is_thinking else None,
            is_effort_optional=True,
        )

    def _choice(self, tools: Sequence[requests.Tool]) -> requests.ToolChoice:
        choice = self.tool_choice
        if choice is None:
            return requests.ToolChoice()
        is_parallel = not choice.disable_parallel_tool_use
        if choice.type in ("auto", "none"):
            return requests.ToolChoice("none" if choice.type == "none" else "auto", parallel=is_parallel)
        if not tools:
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        if choice.type == "any":
            return requests.ToolChoice("required", parallel=is_parallel)
        if choice.name not in {tool.name for tool in tools}:
            raise InvalidRequest(f"`tools` has no tool {choice.name!r}", param="tool_choice.name")
        return requests.ToolChoice("required", choice.name, is_parallel)

    def _turns(self) -> Iterable[requests.Message]:
        blocks = [self.system] if isinstance(self.system, str) else [block.text for block in self.system or ()]
        system = "\n\n".join(text for text in blocks if not text.startswith(_BILLING))
        if system:
            yield requests.Message("system", (system,))
        for at, message in enumerate(self.messages):
            yield from _turns(message, f"messages[{at}]")


class MessagesRequest(_Prompt):
    """`POST /v1/messages`."""

    model_config = ConfigDict(extra="allow")

    max_tokens: Count
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: Json | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    speed: Literal["standard"] | None = None

    def decoded(self, *, has_beta: bool) -> ChatRequest:
        """The request that all dialects share. Raises InvalidRequest.

        With an `anthropic-beta` header, fields of betas that are not known here are let through.
        """
        if self.model_extra and not has_beta:
            name = next(iter(self.model_extra))
            raise InvalidRequest(f"`{name}` is not supported by this server", param=name)
        params = Params(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=self.max_tokens)
        return self._chat(params, tuple(self.stop_sequences or ()))


class CountRequest(_Prompt):
    """`POST /v1/messages/count_tokens`. Clients send what they would send for the answer, too."""

    model_config = ConfigDict(extra="ignore")

    def decoded(self) -> ChatRequest:
        """The request that all dialects share. Raises InvalidRequest."""
        return self._chat(Params(), ())


def _turns(message: Message, where: str) -> Iterable[requests.Message]:
    """One message as turns: each tool result is a turn of its own, before what the user says with them."""
    if isinstance(message.content, str):
        yield requests.Message(message.role, (message.content,))
        return
    said: list[str | requests.Image] = []
    reasoning: list[str] = []
    calls: list[requests.Call] = []
    for at, block in enumerate(message.content):
        place = f"{where}.content[{at}]"
        if isinstance(block, ToolResultBlock):
            content = (block.content,) if isinstance(block.content, str) else _parts(block.content or (), place)
            if block.is_error:
                content = ("Error: ", *content)
            yield requests.Message("tool", content, call_id=block.tool_use_id)
        elif isinstance(block, ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(requests.Call(block.id, block.name, block.input))
        elif not isinstance(block, RedactedBlock):
            parts = _parts([block], place)
            if said and isinstance(said[-1], str) and isinstance(parts[0], str):
                said.append("\n\n")
            said += parts
    if said or calls or reasoning:
        yield requests.Message(message.role, tuple(said), "\n\n".join(reasoning), tuple(calls))


def _parts(blocks: Sequence[TextBlock | ImageBlock | DocumentBlock], where: str) -> tuple[str | requests.Image, ...]:
    parts: list[str | requests.Image] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            parts.append(block.text)
        elif isinstance(block, DocumentBlock):
            parts.append(f"{block.title}\n\n{block.source.data}" if block.title else block.source.data)
        elif isinstance(block.source, Base64Source):
            parts.append(image(f"data:{block.source.media_type};base64,{block.source.data}", f"{where}.source"))
        else:
            parts.append(image(block.source.url, f"{where}.source.url"))
    return tuple(parts)


# Answers -------------------------------------------------------------------------------------------------------


def _usage(prompt: int, cached: int, completion: int) -> Json:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


def _stop_reason(done: Done) -> str:
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "stop_sequence": "stop_sequence"}
    return reasons[done.reason]


def _head(model: str, content: list[Json], usage: Json) -> Json:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _whole(request: ChatRequest, events: Iterable[Event]) -> Json:
    """The answer in one piece."""
    content: list[Json] = []
    done: Done | None = None
    for event in events:
        last = content[-1] if content else {"type": None}
        if isinstance(event, Text):
            if last["type"] != "text":
                content.append({"type": "text", "text": ""})
            content[-1]["text"] += event.text
        elif isinstance(event, Reasoning) and request.thinking:
            if last["type"] != "thinking":
                content.append({"type": "thinking", "thinking": "", "signature": _SIGNATURE})
            content[-1]["thinking"] += event.text
        elif isinstance(event, ToolCall):
            content.append(
                {"type": "tool_use", "id": event.id, "name": event.name, "input": json.loads(event.arguments)}
            )
        elif isinstance(event, Done):
            done = event
    assert done is not None  # noqa: S101 - the last event of every choice
    usage: Usage = done.usage
    whole = _head(request.model, content, _usage(usage.prompt, usage.cached, usage.completion))
    return {**whole, "stop_reason": _stop_reason(done), "stop_sequence": done.stop_sequence}


class _Stream:
    """Events as Anthropic's: one content block after the other, each opened and closed."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._open: str | None = None
        self._index = -1

    async def encode(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        async for _, events in batches:
            data = b"".join(part for event in events for part in self._encode(event))
            if data:
                yield data

    def _encode(self, event: Event) -> Iterable[bytes]:
        if isinstance(event, Started):
            message = _head(self._request.model, [], _usage(event.prompt, event.cached, 0))
            yield _event("message_start", {"type": "message_start", "message": message})
            yield _event("ping", {"type": "ping"})
        elif isinstance(event, Text):
            yield from self._block("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, Reasoning) and self._request.thinking:
            yield from self._block("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, ToolCall):
            yield from self._close()
            yield from self._block("tool_use", {"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": event.arguments})
            yield from self._close()
        elif isinstance(event, Done):
            yield from self._close()
            delta = {"stop_reason": _stop_reason(event), "stop_sequence": event.stop_sequence}
            usage = _usage(event.usage.prompt, event.usage.cached, event.usage.completion)
            yield _event("message_delta", {"type": "message_delta", "delta": delta, "usage": usage})
            yield _event("message_stop", {"type": "message_stop"})

    def _block(self, kind: str, block: Json) -> Iterable[bytes]:
        """Open a block unless one of its kind is open."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._index += 1
        yield _event(
            "content_block_start", {"type": "content_block_start", "index": self._index, "content_block": block}
        )

    def _close(self) -> Iterable[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        self._open = None
        yield _event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta})


# Models --------------------------------------------------------------------------------------------------------


def page(models: Sequence[Listed], *, limit: int, after_id: str | None, before_id: str | None) -> Response:
    """A page of the models, in Anthropic's shape. Raises InvalidRequest for a cursor that is no model."""
    ids = [each.id for each in models]
    for name, cursor in (("after_id", after_id), ("before_id", before_id)):
        if cursor is not None and cursor not in ids:
            raise InvalidRequest(f"there is no model {cursor!r}", param=name)
    start = ids.index(after_id) + 1 if after_id is not None else 0
    end = ids.index(before_id) if before_id is not None else len(ids)
    within = models[start:end]
    shown = within[-limit:] if before_id is not None else within[:limit]
    return answer(
        {
            "data": [model_info(each) for each in shown],
            "has_more": len(shown) < len(within),
            "first_id": shown[0].id if shown else None,
            "last_id": shown[-1].id if shown else None,
        }
    )


def model_info(listed: Listed) -> Json:
    """One model, in Anthropic's shape."""
    created = datetime.fromtimestamp(listed.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "type": "model",
        "id": listed.id,
        "display_name": listed.id,
        "created_at": created,
        "lifecycle": "active",
    }


# Routes --------------------------------------------------------------------------------------------------------


def router(service: Service) -> APIRouter:
    """The dialect's routes, at `/v1` and at `/anthropic/v1`."""
    routes = APIRouter(tags=["Anthropic"])

    @routes.post("/v1/messages")
    @routes.post("/anthropic/v1/messages", include_in_schema=False)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        asked, ticket = body.decoded(has_beta="anthropic-beta" in request.headers), Ticket()
        batches = service.chat(asked, ticket)
        if body.stream:
            return EventStream(_Stream(asked).encode(batches), ticket, refuse=refuse, fail=_fail, ping=_ping)
        choices = await unless_gone(request, gathered(batches, 1))
        return Response(status_code=499) if choices is None else answer(_whole(asked, choices[0]))

    @routes.post("/v1/messages/count_tokens")
    @routes.post("/anthropic/v1/messages/count_tokens", include_in_schema=False)
    async def count_tokens(body: CountRequest) -> Response:
        """How many tokens a conversation has, as the model's own template writes it."""
        return answer({"input_tokens": await service.count_tokens(body.decoded(), Ticket())})

    return routes
