"""OpenAI's dialect: chat completions and completions (reference: platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from mlx_overlay_server import errors
from mlx_overlay_server.api.fields import MAX_STOPS, Body, Count, Json, Part, Penalty, Seed, Share, Temperature, image
from mlx_overlay_server.api.transport import EventStream, answer, dumps, unless_gone
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.events import (
    Done,
    Event,
    Logprobs,
    Reasoning,
    Started,
    Text,
    TokenLogprob,
    ToolCall,
    Usage,
)
from mlx_overlay_server.chat.requests import ChatRequest, Params, TextRequest
from mlx_overlay_server.errors import InvalidRequest, ServerError
from mlx_overlay_server.models.library import Listed
from mlx_overlay_server.service import Batch, Service, Ticket, gathered

_TYPES: dict[type[ServerError], str] = {
    errors.Unauthorized: "authentication_error",
    errors.Forbidden: "permission_error",
    errors.Overloaded: "rate_limit_error",
    errors.Failed: "server_error",
    errors.Unavailable: "server_error",
}


def refuse(error: ServerError) -> Response:
    """An error in OpenAI's shape."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return answer(_error(error), error.status, headers)


def _error(error: ServerError) -> Json:
    kind = next((_TYPES[each] for each in type(error).__mro__ if each in _TYPES), "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _fail(error: ServerError) -> bytes:
    return b"data: " + dumps(_error(error)) + b"\n\n"


# Requests ------------------------------------------------------------------------------------------------------


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(Body):
    """What chat completions and completions have in common."""

    model: str
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    repetition_context_size: Count | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # What asks for nothing here: names for billing and caches of their own.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def _params(self, logprobs: int | None, max_tokens: int | None) -> Params:
        return Params(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            repetition_context=self.repetition_context_size,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            max_tokens=max_tokens,
            logprobs=logprobs,
        )

    def _stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise InvalidRequest("a stop sequence is empty", param="stop")
        return stops

    def _check_stream(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream`", param="stream_options")

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Part):
    type: Literal["text"]
    text: str


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: str


class ImageUrl(Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]
Content = str | list[ContentPart]


class CallFunction(Part):
    name: str
    arguments: str


class HistoryCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: CallFunction


class SystemMessage(Part):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Part):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Part):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """As some clients and servers call it."""
    tool_calls: list[HistoryCall] | None = None


class ToolMessage(Part):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(Part):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    type: Literal["text"]


class ObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Part):
    name: str
    description: str | None = None
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class ChatCompletionRequest(_Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: Json | None = None
    # What asks for nothing here.
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    def decoded(self) -> ChatRequest:
        """The request that all dialects share. Raises InvalidRequest."""
        self._check_stream()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`", param="top_logprobs")
        tools = tuple(
            requests.Tool(each.function.name, each.function.description, each.function.parameters)
            for each in self.tools or ()
        )
        return ChatRequest(
            model=self.model,
            params=self._params(
                (self.top_logprobs or 0) if self.logprobs else None, self.max_completion_tokens or self.max_tokens
            ),
            stop=self._stops(),
            n=self.n or 1,
            messages=tuple(_message(each, f"messages[{at}]") for at, each in enumerate(self.messages)),
            tools=tools,
            choice=self._choice(tools),
            format=self._format(),
            effort=self.reasoning_effort,
            template_kwargs=self.chat_template_kwargs or {},
        )

    def _choice(self, tools: tuple[requests.Tool, ...]) -> requests.ToolChoice:
        is_parallel = self.parallel_tool_calls is not False
        if self.tool_choice is None or self.tool_choice == "auto":
            return requests.ToolChoice(parallel=is_parallel)
        if self.tool_choice == "none":
            return requests.ToolChoice("none")
        if not tools:
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        if self.tool_choice == "required":
            return requests.ToolChoice("required", parallel=is_parallel)
        name = self.tool_choice.function.name
        if name not in {tool.name for tool in tools}:
            raise InvalidRequest(f"`tools` has no function {name}", param="tool_choice")
        return requests.ToolChoice("required", name, is_parallel)

    def _format(self) -> requests.Format | None:
        if isinstance(self.response_format, ObjectFormat):
            return requests.Format(None)
        if isinstance(self.response_format, SchemaFormat):
            return requests.Format(self.response_format.json_schema.schema_)
        return None


def _message(message: SystemMessage | UserMessage | AssistantMessage | ToolMessage, where: str) -> requests.Message:
    content = _content(message.content, f"{where}.content")
    if isinstance(message, SystemMessage):
        return requests.Message("system", content, name=message.name)
    if isinstance(message, UserMessage):
        return requests.Message("user", content, name=message.name)
    if isinstance(message, ToolMessage):
        return requests.Message("tool", content, call_id=message.tool_call_id)
    calls = tuple(
        requests.Call(
            call.id, call.function.name, arguments(call.function.arguments, f"{where}.tool_calls[{at}].function")
        )
        for at, call in enumerate(message.tool_calls or ())
    )
    return requests.Message(
        "assistant", content, message.reasoning_content or message.reasoning or "", calls, name=message.name
    )


def _content(content: Content | None, where: str) -> tuple[str | requests.Image, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (content,)
    parts: list[str | requests.Image] = []
    for at, part in enumerate(content):
        if isinstance(part, TextPart):
            parts.append(part.text)
        elif isinstance(part, RefusalPart):
            parts.append(part.refusal)
        else:
            parts.append(image(part.image_url.url, f"{where}[{at}].image_url.url"))
    return tuple(parts)


def arguments(text: str, where: str) -> Json:
    """The arguments of an earlier call. Raises InvalidRequest."""
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest("a call's arguments are a JSON object", param=f"{where}.arguments")
    return parsed


Prompt = str | Annotated[list[str], Field(min_length=1)] | Annotated[list[int], Field(min_length=1)]
Prompts = Prompt | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1)]


class CompletionRequest(_Sampling):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: None = None

    def decoded(self) -> TextRequest:
        """The request that all dialects share. Raises InvalidRequest."""
        self._check_stream()
        count = self.n or 1
        if self.best_of is not None and self.best_of != count:
            raise InvalidRequest("`best_of` is not supported: ask for `n` and choose", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("`logprobs` of an echoed prompt are not supported", param="echo")
        prompts: list[str | tuple[int, ...]] = []
        if isinstance(self.prompt, str):
            prompts = [self.prompt]
        elif all(isinstance(each, int) for each in self.prompt):
            prompts = [tuple(each for each in self.prompt if isinstance(each, int))]
        else:
            prompts = [
                each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)
            ]
        if len(prompts) * count > 128:
            raise InvalidRequest("more than 128 answers to one request", param="n")
        return TextRequest(
            model=self.model,
            # OpenAI's default for completions, which have no end of turn to stop at.
            params=self._params(self.logprobs, self.max_tokens or 16),
            stop=self._stops(),
            n=count,
            prompts=tuple(prompts),
            echo=bool(self.echo),
        )


# Answers -------------------------------------------------------------------------------------------------------


def _usage(all_usage: Iterable[Usage], prompts: int = 1) -> Json:
    """Tokens of a whole request: a prompt counts once, however many choices it has."""
    every = list(all_usage)
    once = every[:: max(1, len(every) // prompts)]
    prompt, completion = sum(each.prompt for each in once), sum(each.completion for each in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached for each in once)},
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning for each in every)},
    }


def _finish_reason(done: Done) -> str:
    return "stop" if done.reason == "stop_sequence" else done.reason


def logprob_entries(tokens: Iterable[TokenLogprob]) -> list[Json]:
    """Tokens with their log probabilities, as chat completions and responses tell them."""

    def entry(token: str, data: bytes, logprob: float) -> Json:
        return {"token": token, "logprob": max(-9999.0, logprob), "bytes": list(data)}

    return [
        {**entry(each.token, each.data, each.logprob), "top_logprobs": [entry(*other) for other in each.top]}
        for each in tokens
    ]


def _chat_logprobs(tokens: Iterable[TokenLogprob]) -> Json:
    return {"content": logprob_entries(tokens), "refusal": None}


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _joined(events: Iterable[Event], kind: type[Text | Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def _chat_choice(index: int, events: list[Event], *, has_logprobs: bool) -> Json:
    done = events[-1]
    assert isinstance(done, Done)  # noqa: S101 - for the type checker
    calls = [_call(event) for event in events if isinstance(event, ToolCall)]
    text, reasoning = _joined(events, Text), _joined(events, Reasoning)
    message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    tokens = [token for event in events if isinstance(event, Logprobs) for token in event.tokens]
    return {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(tokens) if has_logprobs else None,
        "finish_reason": _finish_reason(done),
    }


class _ChatStream:
    """Events of all choices as chunks."""

    def __init__(self, request: ChatRequest, *, includes_usage: bool) -> None:
        self._head: Json = {
            "id": _id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request.model,
        }
        self._usage: dict[str, None] = {"usage": None} if includes_usage else {}
        self._includes_usage = includes_usage
        self._has_logprobs = request.params.logprobs is not None

    async def encode(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        usages: dict[int, Usage] = {}
        calls: dict[int, int] = {}
        async for index, events in batches:
            delta: Json = {}
            finish: str | None = None
            tokens: list[TokenLogprob] = []
            for event in events:
                if isinstance(event, Text):
                    delta["content"] = delta.get("content", "") + event.text
                elif isinstance(event, Reasoning):
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
                elif isinstance(event, Started):
                    delta |= {"role": "assistant", "content": ""}
                elif isinstance(event, ToolCall):
                    number = calls.get(index, 0)
                    calls[index] = number + 1
                    delta.setdefault("tool_calls", []).append({"index": number, **_call(event)})
                elif isinstance(event, Logprobs):
                    tokens += event.tokens
                else:
                    finish, usages[index] = _finish_reason(event), event.usage
            logprobs = _chat_logprobs(tokens) if tokens and self._has_logprobs else None
            if delta or logprobs:
                yield self._chunk(index, delta, logprobs, None)
            if finish is not None:
                yield self._chunk(index, {}, None, finish)
        if self._includes_usage:
            ordered = [usages[index] for index in sorted(usages)]
            yield b"data: " + dumps({**self._head, "choices": [], "usage": _usage(ordered)}) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return b"data: " + dumps({**self._head, "choices": [choice], **self._usage}) + b"\n\n"


class _TextLogprobs:
    """The older shape, for completions: four lists, offsets counted in characters."""

    def __init__(self, start: int) -> None:
        self._offset = start

    def encode(self, tokens: Iterable[TokenLogprob]) -> Json:
        shape: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in tokens:
            shape["tokens"].append(each.token)
            shape["token_logprobs"].append(max(-9999.0, each.logprob))
            shape["top_logprobs"].append({token: max(-9999.0, logprob) for token, _, logprob in each.top})
            shape["text_offset"].append(self._offset)
            self._offset += len(each.token)
        return shape


def _text_choice(index: int, events: list[Event], *, has_logprobs: bool) -> Json:
    done = events[-1]
    assert isinstance(done, Done)  # noqa: S101 - for the type checker
    tokens = [token for event in events if isinstance(event, Logprobs) for token in event.tokens]
    return {
        "index": index,
        "text": _joined(events, Text),
        "logprobs": _TextLogprobs(0).encode(tokens) if has_logprobs else None,
        "finish_reason": _finish_reason(done),
    }


async def _text_stream(
    request: TextRequest, batches: AsyncIterator[Batch], *, includes_usage: bool
) -> AsyncGenerator[bytes]:
    head: Json = {
        "id": _id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": request.model
    }  # fmt: skip
    null_usage: dict[str, None] = {"usage": None} if includes_usage else {}
    usages: dict[int, Usage] = {}
    offsets: dict[int, _TextLogprobs] = {}
    async for index, events in batches:
        text = _joined(events, Text)
        tokens = [token for event in events if isinstance(event, Logprobs) for token in event.tokens]
        done = events[-1] if isinstance(events[-1], Done) else None
        logprobs = offsets.setdefault(index, _TextLogprobs(0)).encode(tokens) if tokens else None
        if text or logprobs or done:
            choice = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": _finish_reason(done) if done else None,
            }
            yield b"data: " + dumps({**head, "choices": [choice], **null_usage}) + b"\n\n"
        if done:
            usages[index] = done.usage
    if includes_usage:
        total = _usage([usages[index] for index in sorted(usages)], len(request.prompts))
        yield b"data: " + dumps({**head, "choices": [], "usage": total}) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


# Routes --------------------------------------------------------------------------------------------------------


def router(service: Service) -> APIRouter:
    """The dialect's routes, each with and without `/v1`."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions")
    @routes.post("/chat/completions", include_in_schema=False)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of server-sent events."""
        asked, ticket = body.decoded(), Ticket()
        batches = service.chat(asked, ticket)
        if body.stream:
            stream = _ChatStream(asked, includes_usage=body.includes_usage)
            return EventStream(stream.encode(batches), ticket, refuse=refuse, fail=_fail)
        choices = await unless_gone(request, gathered(batches, asked.n))
        if choices is None:
            return Response(status_code=499)
        has_logprobs = asked.params.logprobs is not None
        usages = [done.usage for events in choices if isinstance(done := events[-1], Done)]
        return answer(
            {
                "id": _id("chatcmpl"),
                "object": "chat.completion",
                "created": int(time.time()),
                "model": asked.model,
                "choices": [_chat_choice(at, events, has_logprobs=has_logprobs) for at, events in enumerate(choices)],
                "usage": _usage(usages),
            }
        )

    @routes.post("/v1/completions")
    @routes.post("/completions", include_in_schema=False)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continuations of plain prompts, whole or as a stream of server-sent events."""
        asked, ticket = body.decoded(), Ticket()
        batches = service.complete(asked, ticket)
        if body.stream:
            encoded = _text_stream(asked, batches, includes_usage=body.includes_usage)
            return EventStream(encoded, ticket, refuse=refuse, fail=_fail)
        choices = await unless_gone(request, gathered(batches, len(asked.prompts) * asked.n))
        if choices is None:
            return Response(status_code=499)
        usages = [done.usage for events in choices if isinstance(done := events[-1], Done)]
        has_logprobs = asked.params.logprobs is not None
        return answer(
            {
                "id": _id("cmpl"),
                "object": "text_completion",
                "created": int(time.time()),
                "model": asked.model,
                "choices": [_text_choice(at, events, has_logprobs=has_logprobs) for at, events in enumerate(choices)],
                "usage": _usage(usages, len(asked.prompts)),
            }
        )

    return routes


def model_info(listed: Listed) -> Json:
    """One model, in OpenAI's shape."""
    owner, slash, _ = listed.id.partition("/")
    return {"id": listed.id, "object": "model", "created": listed.created, "owned_by": owner if slash else "local"}
