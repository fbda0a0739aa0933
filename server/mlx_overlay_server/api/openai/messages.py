"""The messages of a conversation, as OpenAI's clients send them, and how they are decoded."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from mlx_overlay_server.api.fields import Json, Part, image
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest


class TextPart(Part):
    """A text in a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Part):
    """A refusal of an earlier answer, sent back as text."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Part):
    """The address of an image: a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Part):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]
Content = str | list[ContentPart]


class CallFunction(Part):
    """The function that an earlier answer called; `arguments` is a JSON object, as text or as it is."""

    name: str
    arguments: str | Json


class HistoryCall(Part):
    """A tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CallFunction


class SystemMessage(Part):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Part):
    """A message of the user's."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Part):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """As some clients and servers call it."""
    tool_calls: list[HistoryCall] | None = None
    function_call: CallFunction | None = None
    """The call of an answer to `functions`."""


class ToolMessage(Part):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str


class FunctionMessage(Part):
    """The result of a `function_call`, which is found by the function's name."""

    role: Literal["function"]
    content: Content | None = None
    name: str


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")
]


def decoded_message(message: ChatMessage, where: str) -> requests.Message:
    """Return a message, whose place in the request is `where`. Raises InvalidRequest."""
    content = _content(message.content, f"{where}.content")
    if isinstance(message, SystemMessage):
        return requests.Message("system", content, name=message.name)
    if isinstance(message, UserMessage):
        return requests.Message("user", content, name=message.name)
    if isinstance(message, ToolMessage):
        return requests.Message("tool", content, call_id=message.tool_call_id)
    if isinstance(message, FunctionMessage):
        return requests.Message("tool", content, call_id=message.name, name=message.name)
    calls = tuple(
        requests.Call(
            call.id, call.function.name, arguments(call.function.arguments, f"{where}.tool_calls[{at}].function")
        )
        for at, call in enumerate(message.tool_calls or ())
    )
    if (call := message.function_call) is not None:
        calls += (requests.Call(call.name, call.name, arguments(call.arguments, f"{where}.function_call")),)
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


def arguments(given: str | Json, where: str) -> Json:
    """Return the arguments of an earlier call, whose place is `where`. Raises InvalidRequest."""
    if not isinstance(given, str):
        return given
    try:
        parsed = json.loads(given or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the arguments of a call must be a JSON object", param=f"{where}.arguments")
    return parsed
