"""The response object: its types, and how it is made of a request and of events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.api.openai.logprobs import SampledTokenEntry
from mlx_overlay_server.api.responses.items import new_id
from mlx_overlay_server.api.responses.tools import ToolParam, Tools
from mlx_overlay_server.api.responses.wire import ResponsesRequest, ToolChoiceParam
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.events import Event, Reasoning, Text, ToolCall, Usage

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    """A text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Json]
    logprobs: list[SampledTokenEntry]


class ReasoningText(TypedDict):
    """A text of reasoning, whole or as a summary; both hold the same text here."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class MessageOutput(TypedDict):
    """An output item with a message."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningOutput(TypedDict):
    """An output item with reasoning; `encrypted_content` is its text in base64."""

    type: Literal["reasoning"]
    id: str
    summary: list[ReasoningText]
    content: NotRequired[list[ReasoningText]]
    encrypted_content: NotRequired[str]


class FunctionCallItem(TypedDict):
    """An output item with a function call; `arguments` is a JSON object as text."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    namespace: NotRequired[str]


class CustomToolCallItem(TypedDict):
    """An output item with a call of a tool that takes plain text."""

    type: Literal["custom_tool_call"]
    id: str
    call_id: str
    name: str
    input: str
    namespace: NotRequired[str]


TextItem = MessageOutput | ReasoningOutput
CallItem = FunctionCallItem | CustomToolCallItem


class ResponseError(TypedDict):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    """Why a response ended early."""

    reason: Literal["max_output_tokens"]


class InputTokenDetails(TypedDict):
    """Details on the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokenDetails(TypedDict):
    """Details on the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    output_tokens_details: OutputTokenDetails
    total_tokens: int


class ReasoningSettings(TypedDict):
    """The request's options for reasoning."""

    effort: str | None
    summary: str | None


class TextSettings(TypedDict):
    """The request's format for the answer."""

    format: Json


class ResponseAnswer(TypedDict):
    """The answer to `POST /v1/responses` without `stream`; events of a stream hold it, too."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: Json
    model: str
    output: list[TextItem | CallItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningSettings
    store: bool
    temperature: float | None
    text: TextSettings
    tool_choice: str | Json
    tools: list[Json]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class InputTokens(TypedDict):
    """The answer to `POST /v1/responses/input_tokens`."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class CompactedResponse(TypedDict):
    """The answer to `POST /v1/responses/compact`: the user's messages, and one item that stands for all the rest."""

    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[Json]
    usage: ResponseUsage


class DeletedResponse(TypedDict):
    """The answer to `DELETE /v1/responses/{response_id}`."""

    id: str
    object: Literal["response"]
    deleted: bool


def response_head(body: ResponsesRequest) -> ResponseAnswer:
    """Return a response without output: the request's own settings."""
    wanted = body.text.format if body.text is not None else None
    choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, ToolChoiceParam) else body.tool_choice
    return {
        "id": new_id("resp"),
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
        "tool_choice": choice or "auto",
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
    }


def call_item(call: ToolCall, tools: Tools) -> CallItem:
    """Return an output item for a tool call, by the tool's name to the client."""
    origin = tools.origin(call.name)
    item: CallItem
    if origin.is_custom:
        given = json.loads(call.arguments).get("input", "")
        item = {
            "type": "custom_tool_call",
            "id": new_id("ctc"),
            "call_id": call.id,
            "name": origin.name,
            "input": given if isinstance(given, str) else json.dumps(given),
        }
    else:
        item = {
            "type": "function_call",
            "id": new_id("fc"),
            "call_id": call.id,
            "name": origin.name,
            "arguments": call.arguments,
            "status": "completed",
        }
    if origin.namespace is not None:
        item["namespace"] = origin.namespace
    return item


def response_usage(usage: Usage) -> ResponseUsage:
    """Return token counts."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


def turn_of(events: Iterable[Event]) -> requests.Message:
    """Return an answer as a turn of the conversation, for the requests that continue it."""
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


def _tool(tool: ToolParam) -> Json:
    given = tool.model_dump(exclude_none=True)
    return {"parameters": None, "strict": None, **given} if tool.type == "function" else given
