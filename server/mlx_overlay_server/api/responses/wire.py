"""OpenAI's Responses dialect, which Codex speaks (reference: platform.openai.com/docs/api-reference/responses)."""

from __future__ import annotations

import base64
import binascii
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field
from pydantic import Tag as Variant
from starlette.responses import Response

from mlx_overlay_server.api.fields import Body, Count, Json, Part, Share, Temperature, image
from mlx_overlay_server.api.openai import wire as openai
from mlx_overlay_server.api.responses.store import STORED, Store, Stored
from mlx_overlay_server.api.transport import EventStream, answer, dumps, unless_gone
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.events import Done, Event, Logprobs, Reasoning, Text, ToolCall, Usage
from mlx_overlay_server.chat.requests import ChatRequest, Params
from mlx_overlay_server.errors import InvalidRequest, ServerError
from mlx_overlay_server.service import Batch, Service, Ticket, gathered

_NAMES = {"messages": "input", "response_format": "text.format"}
"""Names that fields of the shared request have in this dialect, for errors about them."""

# Requests: input items -----------------------------------------------------------------------------------------


class TextPart(Part):
    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: str


class ImagePart(Part):
    type: Literal["input_image"]
    image_url: str


ContentPart = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]
Content = str | list[ContentPart]


class MessageItem(Part):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Part):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class OutputItem(Part):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Content


class CustomCallItem(Part):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class ReasoningText(Part):
    text: str


class ReasoningItem(Part):
    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


def _item_type(item: Any) -> str:
    """A message may leave its type out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return "function_call_output" if kind == "custom_tool_call_output" else str(kind)


Item = Annotated[
    Annotated[MessageItem, Variant("message")]
    | Annotated[CallItem, Variant("function_call")]
    | Annotated[OutputItem, Variant("function_call_output")]
    | Annotated[CustomCallItem, Variant("custom_tool_call")]
    | Annotated[ReasoningItem, Variant("reasoning")],
    Discriminator(_item_type),
]

# Requests: tools and options -----------------------------------------------------------------------------------


class Tool(Part):
    """A tool of any kind: those that somebody else's servers run are left out of the prompt."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    tools: list[Tool] | None = None


class Choice(Part):
    type: str
    name: str | None = None


class TextFormat(Body):
    type: Literal["text", "json_object"]


class SchemaFormat(Part):
    type: Literal["json_schema"]
    name: str
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class TextOptions(Part):
    format: Annotated[TextFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(Part):
    effort: str | None = None
    summary: str | None = None


class StreamOptions(Part):
    include_obfuscation: bool | None = None


class ResponsesRequest(Body):
    """`POST /v1/responses`."""

    model: str
    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    conversation: None = None
    prompt: None = None
    # What asks for nothing here: names for billing, caches of their own, and limits on tools that run elsewhere.
    metadata: dict[str, Any] | None = None
    client_metadata: Json | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None
    max_tool_calls: int | None = None

    def decoded(self, before: Sequence[requests.Message]) -> tuple[ChatRequest, _Tools]:
        """The request that all dialects share, after earlier turns; and its tools. Raises InvalidRequest."""
        tools = _Tools(self.tools or ())
        given = [requests.Message("user", (self.input,))] if isinstance(self.input, str) else _turns(self.input, tools)
        system = [requests.Message("system", (self.instructions,))] if self.instructions else []
        has_logprobs = "message.output_text.logprobs" in (self.include or ())
        logprobs = (self.top_logprobs or 0) if has_logprobs or self.top_logprobs is not None else None
        request = ChatRequest(
            model=self.model,
            params=Params(
                temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_output_tokens, logprobs=logprobs
            ),
            messages=(*system, *before, *given),
            tools=tools.tools,
            choice=self._choice(tools),
            format=self._format(),
            effort=self.reasoning.effort if self.reasoning is not None else None,
            is_effort_optional=True,
        )
        return request, tools

    def _choice(self, tools: _Tools) -> requests.ToolChoice:
        is_parallel = self.parallel_tool_calls is not False
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return requests.ToolChoice("none" if choice == "none" else "auto", parallel=is_parallel)
        if not tools.tools:
            raise InvalidRequest("`tool_choice` needs a function in `tools`", param="tool_choice")
        if choice == "required":
            return requests.ToolChoice("required", parallel=is_parallel)
        name = choice.name if isinstance(choice, Choice) else None
        if name is None or name not in {tool.name for tool in tools.tools}:
            raise InvalidRequest(f"`tools` has no function {name!r} that can be called here", param="tool_choice")
        return requests.ToolChoice("required", name, is_parallel)

    def _format(self) -> requests.Format | None:
        wanted = self.text.format if self.text is not None else None
        if isinstance(wanted, SchemaFormat):
            return requests.Format(wanted.schema_)
        return requests.Format(None) if wanted is not None and wanted.type == "json_object" else None


class _Tools:
    """The tools a request offers, and how the model's calls of them are told."""

    def __init__(self, given: Iterable[Tool]) -> None:
        found: dict[str, requests.Tool] = {}
        self._custom: set[str] = set()
        self._places: dict[str, tuple[str, str]] = {}
        """Names the model uses -> (namespace, name in it)."""
        flat = list(_flat(given))
        taken = {tool.name for namespace, tool in flat if namespace is None}
        for namespace, tool in flat:
            if tool.name is None:
                raise InvalidRequest("a function tool has no name", param="tools")
            name = tool.name
            while namespace is not None and name in taken:
                name = f"{namespace}__{name}"
            taken.add(name)
            parameters = tool.parameters
            if tool.type == "custom":  # takes plain text: a function of one string to the model
                self._custom.add(name)
                parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
            if namespace is not None:
                self._places[name] = (namespace, tool.name)
            found[name] = requests.Tool(name, tool.description, parameters)
        self.tools = tuple(found.values())

    def named(self, namespace: str | None, name: str) -> str:
        """What the model calls a function of a namespace."""
        return next((ours for ours, place in self._places.items() if place == (namespace, name)), name)

    def item(self, call: ToolCall) -> Json:
        """An output item for a call."""
        namespace, name = self._places.get(call.name, (None, call.name))
        place = {"namespace": namespace} if namespace is not None else {}
        if call.name in self._custom:
            given = json.loads(call.arguments).get("input", "")
            text = given if isinstance(given, str) else json.dumps(given)
            return {
                "type": "custom_tool_call",
                "id": _id("ctc"),
                "call_id": call.id,
                "name": name,
                "input": text,
                **place,
            }
        return {
            "type": "function_call",
            "id": _id("fc"),
            "call_id": call.id,
            "name": name,
            "arguments": call.arguments,
            "status": "completed",
            **place,
        }


def _flat(given: Iterable[Tool], namespace: str | None = None) -> Iterator[tuple[str | None, Tool]]:
    for tool in given:
        if tool.type in ("function", "custom"):
            yield namespace, tool
        elif tool.type == "namespace":
            yield from _flat(tool.tools or (), tool.name)


def _turns(items: Sequence[Item], tools: _Tools) -> list[requests.Message]:
    """Items as turns: what one answer was made of (reasoning, text, calls) becomes one assistant message again."""
    turns: list[requests.Message] = []
    reasoning: list[str] = []
    said: list[str | requests.Image] = []
    calls: list[requests.Call] = []

    def end_answer() -> None:
        if reasoning or said or calls:
            turns.append(requests.Message("assistant", tuple(said), "\n\n".join(reasoning), tuple(calls)))
            for part in (reasoning, said, calls):
                part.clear()

    for at, item in enumerate(items):
        where = f"input[{at}]"
        if isinstance(item, ReasoningItem):
            if said or calls:
                end_answer()
            reasoning.append(_reasoning(item))
        elif isinstance(item, CallItem):
            arguments = openai.arguments(item.arguments, where)
            calls.append(requests.Call(item.call_id, tools.named(item.namespace, item.name), arguments))
        elif isinstance(item, CustomCallItem):
            name = tools.named(item.namespace, item.name)
            calls.append(requests.Call(item.call_id, name, {"input": item.input}))
        elif isinstance(item, MessageItem) and item.role == "assistant":
            if calls:
                end_answer()
            said += _content(item.content, f"{where}.content")
        else:
            end_answer()
            if isinstance(item, OutputItem):
                turns.append(requests.Message("tool", _content(item.output, f"{where}.output"), call_id=item.call_id))
            else:
                role: requests.Role = "user" if item.role == "user" else "system"
                turns.append(requests.Message(role, _content(item.content, f"{where}.content")))
    end_answer()
    return turns


def _content(content: Content, where: str) -> tuple[str | requests.Image, ...]:
    if isinstance(content, str):
        return (content,)
    parts: list[str | requests.Image] = []
    for at, part in enumerate(content):
        if isinstance(part, ImagePart):
            parts.append(image(part.image_url, f"{where}[{at}].image_url"))
        else:
            parts.append(part.refusal if isinstance(part, RefusalPart) else part.text)
    return tuple(parts)


def _reasoning(item: ReasoningItem) -> str:
    texts = [part.text for part in item.content or item.summary]
    if not texts and item.encrypted_content:
        try:
            return base64.b64decode(item.encrypted_content, validate=True).decode()
        except (binascii.Error, ValueError):  # another server's
            return ""
    return "\n\n".join(texts)


# Answers -------------------------------------------------------------------------------------------------------


class _Answer:
    """Builds the response object, item by item, and tells each step as an event of the streaming protocol."""

    def __init__(self, body: ResponsesRequest, tools: _Tools) -> None:
        self._tools = tools
        self._sequence = -1
        self._item: Json | None = None
        """The reasoning or message item that is open."""
        self._tokens: list[Json] = []
        self._is_summary = body.reasoning is not None and body.reasoning.summary is not None
        self._is_encrypted = "reasoning.encrypted_content" in (body.include or ())
        self._has_logprobs = body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ())
        self.response = _head(body)

    def begin(self) -> Iterator[Json]:
        """The first two events, before anything is known of the answer."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def feed(self, event: Event) -> Iterator[Json]:
        """What an event adds."""
        if isinstance(event, Text):
            yield from self._text("message", event.text)
        elif isinstance(event, Reasoning):
            yield from self._text("reasoning", event.text)
        elif isinstance(event, Logprobs):
            self._tokens += openai.logprob_entries(event.tokens)
        elif isinstance(event, ToolCall):
            yield from self._close("completed")
            yield from self._call(self._tools.item(event))
        elif isinstance(event, Done):
            is_cut = event.reason == "length"
            yield from self._close("incomplete" if is_cut else "completed")
            self.response |= {
                "status": "incomplete" if is_cut else "completed",
                "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
                "completed_at": None if is_cut else int(time.time()),
                "usage": _usage(event.usage),
            }
            yield self._event(f"response.{self.response['status']}", response=self.response)

    def fail(self, error: ServerError) -> Iterator[Json]:
        """An error in the middle, or before anything else where the client had to wait for it."""
        if self._sequence < 0:
            yield from self.begin()
        code = (
            "rate_limit_exceeded" if error.status == 429 else "invalid_prompt" if error.status < 500 else "server_error"
        )
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        yield self._event("response.failed", response=self.response)

    def _text(self, kind: str, text: str) -> Iterator[Json]:
        if self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            yield from self._open(kind)
        assert self._item is not None  # noqa: S101 - opened above
        name, index = self._stream_name()
        self._part()["text"] += text
        extra: Json = {}
        if kind == "message":
            extra["logprobs"], self._tokens = self._tokens, []
            if self._has_logprobs:
                self._part()["logprobs"] += extra["logprobs"]
        yield self._event(f"{name}.delta", **self._place(), **index, delta=text, **extra)

    def _open(self, kind: str) -> Iterator[Json]:
        if kind == "message":
            self._item = {"type": kind, "id": _id("msg"), "status": "in_progress", "role": "assistant", "content": []}
        else:
            self._item = {"type": kind, "id": _id("rs"), "summary": []}
        yield self._event("response.output_item.added", output_index=self._index, item=_copy(self._item))
        part = self._new_part()
        name = "response.reasoning_summary_part" if "summary_text" in part["type"] else "response.content_part"
        yield self._event(f"{name}.added", **self._place(), **self._stream_name()[1], part=dict(part))
        self._item.setdefault("summary" if part["type"] == "summary_text" else "content", []).append(part)

    def _close(self, status: str) -> Iterator[Json]:
        if self._item is None:
            return
        (name, index), part = self._stream_name(), self._part()
        extra = {"logprobs": part.get("logprobs", [])} if self._item["type"] == "message" else {}
        yield self._event(f"{name}.done", **self._place(), **index, text=part["text"], **extra)
        whole = "response.reasoning_summary_part" if part["type"] == "summary_text" else "response.content_part"
        yield self._event(f"{whole}.done", **self._place(), **index, part=part)
        if self._item["type"] == "message":
            self._item["status"] = status
        elif self._is_encrypted:
            self._item["encrypted_content"] = base64.b64encode(part["text"].encode()).decode()
        yield self._event("response.output_item.done", output_index=self._index, item=self._item)
        self.response["output"] = [*self.response["output"], self._item]
        self._item = None

    def _call(self, item: Json) -> Iterator[Json]:
        kind, name = ("arguments", "response.function_call_arguments")
        if item["type"] == "custom_tool_call":
            kind, name = "input", "response.custom_tool_call_input"
        place = {"output_index": self._index, "item_id": item["id"]}
        begun = {**item, kind: "", **({"status": "in_progress"} if "status" in item else {})}
        yield self._event("response.output_item.added", output_index=self._index, item=begun)
        yield self._event(f"{name}.delta", **place, delta=item[kind])
        yield self._event(f"{name}.done", **place, **{kind: item[kind]}, name=item["name"])
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self.response["output"] = [*self.response["output"], item]

    @property
    def _index(self) -> int:
        return len(self.response["output"])

    def _place(self) -> Json:
        assert self._item is not None  # noqa: S101 - called while one is open
        return {"item_id": self._item["id"], "output_index": self._index}

    def _part(self) -> Json:
        """The part of the open item that text goes to."""
        assert self._item is not None  # noqa: S101 - called while one is open
        parts: list[Json] = self._item.get("content") or self._item["summary"]
        return parts[0]

    def _new_part(self) -> Json:
        assert self._item is not None  # noqa: S101 - called while one is open
        if self._item["type"] == "message":
            return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {"type": "summary_text" if self._is_summary else "reasoning_text", "text": ""}

    def _stream_name(self) -> tuple[str, Json]:
        assert self._item is not None  # noqa: S101 - called while one is open
        if self._item["type"] == "message":
            return "response.output_text", {"content_index": 0}
        if self._is_summary:
            return "response.reasoning_summary_text", {"summary_index": 0}
        return "response.reasoning_text", {"content_index": 0}

    def _event(self, kind: str, **content: Any) -> Json:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **content}


def _copy(item: Json) -> Json:
    return {key: list(value) if isinstance(value, list) else value for key, value in item.items()}


def _head(body: ResponsesRequest) -> Json:
    wanted = body.text.format if body.text is not None else None
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": body.reasoning.summary if body.reasoning else None,
        },
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": wanted.model_dump(by_alias=True) if wanted is not None else {"type": "text"}},
        "tool_choice": body.tool_choice.model_dump()
        if isinstance(body.tool_choice, Choice)
        else body.tool_choice or "auto",
        "tools": [_told(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _told(tool: Tool) -> Json:
    told = tool.model_dump(exclude_none=True)
    if tool.type == "function":
        told = {"parameters": None, "strict": None, **told}
    return told


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def _sse(event: Json) -> bytes:
    return f"event: {event['type']}\ndata: ".encode() + dumps(event) + b"\n\n"


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _said(events: Iterable[Event]) -> requests.Message:
    """An answer as a turn of the conversation."""
    text = reasoning = ""
    calls: list[requests.Call] = []
    for event in events:
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, ToolCall):
            calls.append(requests.Call(event.id, event.name, json.loads(event.arguments)))
    return requests.Message("assistant", (text,) if text else (), reasoning, tuple(calls))


# Routes --------------------------------------------------------------------------------------------------------


def router(service: Service) -> APIRouter:
    """The dialect's routes, each with and without `/v1`."""
    routes = APIRouter(tags=["Responses"])
    store = Store(STORED)

    def keep(body: ResponsesRequest, made: _Answer, asked: ChatRequest, events: Iterable[Event]) -> None:
        if body.store is not False:
            history = asked.messages[1:] if body.instructions else asked.messages
            store.put(Stored(made.response, (*history, _said(events))))

    async def stream(
        body: ResponsesRequest, made: _Answer, asked: ChatRequest, batches: AsyncIterator[Batch]
    ) -> AsyncGenerator[bytes]:
        said: list[Event] = []
        has_begun = False
        async for _, events in batches:
            data = b""
            if not has_begun:
                has_begun = True
                data = b"".join(map(_sse, made.begin()))
            for event in _logprobs_first(events):
                said.append(event)
                data += b"".join(map(_sse, made.feed(event)))
                if isinstance(event, Done):
                    keep(body, made, asked, said)  # before the client can ask for it
            if data:
                yield data

    @routes.post("/v1/responses")
    @routes.post("/responses", include_in_schema=False)
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """A response to some input, whole or as a stream of server-sent events."""
        asked, tools = body.decoded(store.turns_of(body.previous_response_id))
        made, ticket = _Answer(body, tools), Ticket()
        batches = _renamed(service.chat(asked, ticket))
        if body.stream:
            return EventStream(
                stream(body, made, asked, batches),
                ticket,
                refuse=openai.refuse,
                fail=lambda error: b"".join(map(_sse, made.fail(error))),
            )
        choices = await unless_gone(request, gathered(batches, 1))
        if choices is None:
            return Response(status_code=499)
        for event in _logprobs_first(choices[0]):
            for _ in made.feed(event):  # only the response it builds is wanted
                pass
        keep(body, made, asked, choices[0])
        return answer(made.response)

    @routes.get("/v1/responses/{response_id}")
    @routes.get("/responses/{response_id}", include_in_schema=False)
    async def retrieve(response_id: str) -> Response:
        """A stored response."""
        return answer(store.get(response_id).response)

    @routes.delete("/v1/responses/{response_id}")
    @routes.delete("/responses/{response_id}", include_in_schema=False)
    async def delete(response_id: str) -> Response:
        """Forget a stored response."""
        store.delete(response_id)
        return answer({"id": response_id, "object": "response", "deleted": True})

    return routes


async def _renamed(batches: AsyncIterator[Batch]) -> AsyncGenerator[Batch]:
    """The same, but errors name fields as this dialect does."""
    try:
        async for batch in batches:
            yield batch
    except InvalidRequest as error:
        error.param = _NAMES.get(error.param or "", error.param)
        raise


def _logprobs_first(events: list[Event]) -> list[Event]:
    """Log probabilities before the text they belong to: they are told in its delta."""
    ordered = list(events)
    for at in range(1, len(ordered)):
        if isinstance(ordered[at], Logprobs) and isinstance(ordered[at - 1], Text):
            ordered[at - 1], ordered[at] = ordered[at], ordered[at - 1]
    return ordered
