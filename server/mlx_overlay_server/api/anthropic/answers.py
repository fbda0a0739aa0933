"""The answers that Anthropic's clients get in one piece: their types, and how they are made of events."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from mlx_overlay_server.chat.events import Done, Event, Reasoning, Text, ToolCall
from mlx_overlay_server.chat.requests import ChatRequest
from mlx_overlay_server.errors import InvalidRequest
from mlx_overlay_server.models.library import Listed

StopReason = Literal["end_turn", "max_tokens", "tool_use", "stop_sequence"]

SIGNATURE = "bWx4LW9tbmk="
"""Of every thinking block. Clients send it back; reasoning that never left the machine needs no proof of origin."""


class TextContent(TypedDict):
    """A text of an answer."""

    type: Literal["text"]
    text: str


class ThinkingContent(TypedDict):
    """Reasoning before the answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseContent(TypedDict):
    """A call of one of the request's tools."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


AnswerContent = TextContent | ThinkingContent | ToolUseContent


class MessageUsage(TypedDict):
    """Token counts. `input_tokens` are those of the prompt that did not come from the KV cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(TypedDict):
    """The answer to `POST /v1/messages` without `stream`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerContent]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """The answer to `POST /v1/messages/count_tokens`."""

    input_tokens: int


class AnthropicModel(TypedDict):
    """A model; `created_at` is in UTC, as RFC 3339 writes it.

    `context_length` is the number of tokens that its configuration gives prompt and answer together, `max_input_tokens`
    and `max_model_len` the number that this server takes. All are left out where they are not known.
    """

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: NotRequired[int]
    context_length: NotRequired[int]
    max_model_len: NotRequired[int]


class AnthropicModelPage(TypedDict):
    """A page of the models; `first_id` and `last_id` are cursors for the pages beside it."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


def message(request: ChatRequest, events: Iterable[Event]) -> AnthropicMessage:
    """Return the answer that some events make up."""
    content: list[AnswerContent] = []
    done: Done | None = None
    for event in events:
        last = content[-1] if content else None
        if isinstance(event, Text):
            if last is not None and last["type"] == "text":
                last["text"] += event.text
            else:
                content.append({"type": "text", "text": event.text})
        elif isinstance(event, Reasoning) and request.thinking:
            if last is not None and last["type"] == "thinking":
                last["thinking"] += event.text
            else:
                content.append({"type": "thinking", "thinking": event.text, "signature": SIGNATURE})
        elif isinstance(event, ToolCall):
            content.append(
                {"type": "tool_use", "id": event.id, "name": event.name, "input": json.loads(event.arguments)}
            )
        elif isinstance(event, Done):
            done = event
    assert done is not None  # noqa: S101 - the last event of every answer
    begun = message_head(
        request.model, content, message_usage(done.usage.prompt, done.usage.cached, done.usage.completion)
    )
    begun["stop_reason"], begun["stop_sequence"] = stop_reason(done), done.stop_sequence
    return begun


def message_head(model: str, content: list[AnswerContent], usage: MessageUsage) -> AnthropicMessage:
    """Return an answer that has not ended."""
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


def message_usage(prompt: int, cached: int, completion: int) -> MessageUsage:
    """Return token counts; `cached` tokens of the prompt came from the KV cache."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }


def stop_reason(done: Done) -> StopReason:
    """Return Anthropic's name for why an answer ended."""
    names: dict[str, StopReason] = {
        "stop": "end_turn",
        "length": "max_tokens",
        "tool_calls": "tool_use",
        "stop_sequence": "stop_sequence",
    }
    return names[done.reason]


def model_page(
    models: Sequence[Listed], *, limit: int, after_id: str | None, before_id: str | None
) -> AnthropicModelPage:
    """Return up to `limit` models after one of them, or before one. Raises InvalidRequest for an unknown cursor.

    Those that embed or rank are left out: this dialect has no use for them.
    """
    models = [each for each in models if each.kind == "text"]
    ids = [each.id for each in models]
    for name, cursor in (("after_id", after_id), ("before_id", before_id)):
        if cursor is not None and cursor not in ids:
            raise InvalidRequest(f"there is no model {cursor!r}", param=name)
    start = ids.index(after_id) + 1 if after_id is not None else 0
    end = ids.index(before_id) if before_id is not None else len(ids)
    within = models[start:end]
    page = within[-limit:] if before_id is not None else within[:limit]
    return {
        "data": [model_info(each) for each in page],
        "has_more": len(page) < len(within),
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }


def model_info(listed: Listed) -> AnthropicModel:
    """Return one model."""
    created = datetime.fromtimestamp(listed.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    info: AnthropicModel = {
        "type": "model",
        "id": listed.id,
        "display_name": listed.id,
        "created_at": created,
        "lifecycle": "active",
    }
    if listed.context is not None:
        info["context_length"] = listed.context
    if listed.usable is not None:
        info["max_input_tokens"] = info["max_model_len"] = listed.usable
    return info
