"""The answers that OpenAI's clients get as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from mlx_overlay_server.api.openai.answers import (
    CalledFunction,
    CompletionUsage,
    FinishName,
    MessageToolCall,
    finish_name,
    joined,
    logprob_encoder,
    new_id,
    tool_call,
    usage_of,
)
from mlx_overlay_server.api.openai.logprobs import ChatLogprobs, TextLogprobEncoder, TextLogprobs, chat_logprobs
from mlx_overlay_server.api.transport import dumps
from mlx_overlay_server.chat.events import Done, Logprobs, Reasoning, Started, Text, TokenLogprob, ToolCall, Usage
from mlx_overlay_server.chat.requests import ChatRequest, TextRequest
from mlx_overlay_server.service import Batch


class ToolCallDelta(MessageToolCall):
    """A whole tool call; `index` counts the calls of one choice."""

    index: int


class ChatDelta(TypedDict, total=False):
    """The text and calls that a chunk adds to a message."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]
    function_call: CalledFunction


class ChatChunkChoice(TypedDict):
    """The choice that a chunk adds to."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishName | None


class TextChunkChoice(TypedDict):
    """The continuation that a chunk adds to."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishName | None


class ChunkHead(TypedDict):
    """The fields that all chunks of one stream have in common."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    usage: NotRequired[CompletionUsage | None]
    """With `stream_options.include_usage`: null until the last chunk."""


def data_event(content: Mapping[str, object]) -> bytes:
    """Return a server-sent event without a name."""
    return b"data: " + dumps(content) + b"\n\n"


END = b"data: [DONE]\n\n"
"""The event that ends every stream."""


async def chat_chunks(
    request: ChatRequest,
    batches: AsyncIterator[Batch],
    *,
    id_: str,
    includes_usage: bool,
    has_functions: bool = False,
) -> AsyncGenerator[bytes]:
    """Yield the answers to a conversation as chunks. `has_functions`: calls have the older form."""
    head = _head(id_, "chat.completion.chunk", request.model, includes_usage=includes_usage)
    has_logprobs = request.params.logprobs is not None
    usages: dict[int, Usage] = {}
    calls: dict[int, int] = {}
    async for index, events in batches:
        delta: ChatDelta = {}
        done: Done | None = None
        tokens: list[TokenLogprob] = []
        for event in events:
            if isinstance(event, Text):
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, Reasoning):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
            elif isinstance(event, Started):
                delta["role"], delta["content"] = "assistant", ""
            elif isinstance(event, ToolCall) and has_functions:
                delta["function_call"] = tool_call(event)["function"]
            elif isinstance(event, ToolCall):
                number = calls.get(index, 0)
                calls[index] = number + 1
                delta.setdefault("tool_calls", []).append({"index": number, **tool_call(event)})
            elif isinstance(event, Logprobs):
                tokens += event.tokens
            elif isinstance(event, Done):
                done, usages[index] = event, event.usage
        logprobs = chat_logprobs(tokens) if tokens and has_logprobs else None
        if delta or logprobs:
            yield _chat_chunk(head, {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if done is not None:
            reason = finish_name(done, has_functions=has_functions)
            end: ChatChunkChoice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
            yield _chat_chunk(head, end)
    if includes_usage:
        yield _usage_chunk(head, usages, 1)
    yield END


async def text_chunks(
    request: TextRequest, batches: AsyncIterator[Batch], *, includes_usage: bool
) -> AsyncGenerator[bytes]:
    """Yield the continuations of plain prompts as chunks."""
    head = _head(new_id("cmpl"), "text_completion", request.model, includes_usage=includes_usage)
    usages: dict[int, Usage] = {}
    encoders: dict[int, TextLogprobEncoder | None] = {}
    async for index, events in batches:
        text = joined(events, Text)
        done = events[-1] if isinstance(events[-1], Done) else None
        encoder = encoders.setdefault(index, logprob_encoder(request))
        logprobs = encoder.encode(events) if encoder is not None else None
        if text or logprobs or done:
            choice: TextChunkChoice = {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": finish_name(done) if done else None,
            }
            yield data_event({**head, "choices": [choice]})
        if done:
            usages[index] = done.usage
    if includes_usage:
        yield _usage_chunk(head, usages, len(request.prompts))
    yield END


def _head(
    id_: str, name: Literal["chat.completion.chunk", "text_completion"], model: str, *, includes_usage: bool
) -> ChunkHead:
    head: ChunkHead = {"id": id_, "object": name, "created": int(time.time()), "model": model}
    if includes_usage:
        head["usage"] = None
    return head


def _chat_chunk(head: ChunkHead, choice: ChatChunkChoice) -> bytes:
    return data_event({**head, "choices": [choice]})


def _usage_chunk(head: ChunkHead, usages: Mapping[int, Usage], prompts: int) -> bytes:
    """The last chunk: no choices, and the tokens of all of them."""
    usage = usage_of([usages[index] for index in sorted(usages)], prompts)
    return data_event({**head, "choices": [], "usage": usage})
