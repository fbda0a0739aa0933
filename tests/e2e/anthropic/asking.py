"""Requests to the Messages API, and what tests look at in its answers."""

from __future__ import annotations

import json
from typing import Any

from anthropic import Anthropic
from anthropic.types import Message

from tests.support.dialects import Read, is_same, read_by_chat
from tests.support.server import Server

PLAIN, THINKS, CALLS, BOTH, RANDOM = "acme/plain", "acme/thinks", "acme/calls", "acme/both", "acme/random"
HELLO = "Hello there, general Kenobi."
SUNNY = "It is sunny."
COUNTS = "One two three four."
HI: list[Any] = [{"role": "user", "content": "hi"}]
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
SIGNATURE = "bWx4LW9tbmk="
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
}
WEATHER: dict[str, Any] = {"name": "weather", "description": "Now.", "input_schema": SCHEMA}
CLOCK: dict[str, Any] = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}


def reply(sdk: Anthropic, model: str, messages: str | list[Any] = "hi", **options: Any) -> Message:
    message: Message = sdk.messages.create(model=model, messages=_messages(messages), **{"max_tokens": 100, **options})
    return message


def _messages(messages: str | list[Any]) -> Any:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def reading_of(message: Message) -> Read:
    """What an answer says of its prompt."""
    cached = message.usage.cache_read_input_tokens or 0
    return Read(message.usage.input_tokens + cached, cached)


def is_read_as(
    server: Server, sdk: Anthropic, model: str, chat: list[Any], messages: list[Any] | str = "hi", **options: Any
) -> bool:
    """Whether a request has the prompt that chat completions make of `chat`."""
    return is_same(read_by_chat(server, model, chat), reading_of(reply(sdk, model, messages, max_tokens=1, **options)))


def _plain(event: Any) -> dict[str, Any]:
    """An event as it came, names of this one answer left out."""
    told: dict[str, Any] = json.loads(event) if isinstance(event, str) else event.to_dict(mode="json")
    for part in (told.get("message", {}), told.get("content_block", {})):
        if "id" in part:
            part["id"] = part["id"].partition("_")[0]
    return told


def events_of(sdk: Anthropic, model: str, **options: Any) -> list[dict[str, Any]]:
    with sdk.messages.create(model=model, messages=HI, stream=True, **{"max_tokens": 100, **options}) as events:
        return [_plain(event) for event in events]


def wire(server: Server, path: str = "/v1/messages", **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """A stream as it is on the wire: the name and the data of each event."""
    answer = server.http.post(path, json={"messages": HI, "max_tokens": 100, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    found = []
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = [line for line in part.splitlines() if not line.startswith(":")]
        found.append((name.removeprefix("event: "), _plain(data.removeprefix("data: "))))
    return found


def billed(hash_: str) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.197.{hash_}; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", **EPHEMERAL},
    ]


def outcome(sdk: Anthropic, model: str, *, stream: bool, **options: Any) -> dict[str, Any]:
    """A message as the SDK has it in the end, however it came."""
    if not stream:
        return reply(sdk, model, **options).to_dict(mode="json")
    with sdk.messages.stream(model=model, messages=HI, **{"max_tokens": 100, **options}) as events:
        return events.get_final_message().to_dict(mode="json")
