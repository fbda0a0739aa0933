"""Requests to the Responses API, and what tests look at in its answers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from tests.support.dialects import Read, is_same, read_by_chat
from tests.support.server import Server

PLAIN, THINKS, CALLS, BOTH, RANDOM = "acme/plain", "acme/thinks", "acme/calls", "acme/both", "acme/random"
HELLO = "Hello there, general Kenobi."
SUNNY = "It is sunny."
OSLO = '{"city": "Oslo"}'
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Now.", "parameters": CITY}
WEATHER: dict[str, Any] = {"type": "function", **FUNCTION, "strict": True}
CUSTOM: dict[str, Any] = {"type": "custom", "name": "apply", "description": "Takes text."}
SEARCH: dict[str, Any] = {"type": "web_search", "search_context_size": "low"}


def reply(sdk: OpenAI, model: str, input_: Any = "hi", **options: Any) -> Response:
    response: Response = sdk.responses.create(model=model, input=input_, **options)
    return response


def reading_of(response: Response) -> Read:
    """What a response says of its prompt."""
    assert response.usage is not None
    return Read(response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens)


def is_read_as(server: Server, model: str, chat: list[Any], input_: Any = "hi", **options: Any) -> bool:
    """Whether a request has the prompt that chat completions make of `chat`."""
    read = read_by_chat(server, model, chat)
    return is_same(read, reading_of(reply(server.openai, model, input_, max_output_tokens=1, **options)))


def refusal_of(
    sdk: OpenAI, param: str | None, model: str = PLAIN, input_: Any = "hi", **options: Any
) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as refused:
        reply(sdk, model, input_, **options)
    assert refused.value.param == param, refused.value.message
    assert refused.value.type == "invalid_request_error"
    return refused.value


def events_of(sdk: OpenAI, model: str, input_: Any = "hi", **options: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose numbers are contiguous, names of this one answer left out."""
    with sdk.responses.create(model=model, input=input_, stream=True, **options) as stream:
        events = [event.to_dict(mode="json") for event in stream]
    assert [event.pop("sequence_number") for event in events] == list(range(len(events)))
    return events


def outcome(sdk: OpenAI, model: str, input_: Any = "hi", *, stream: bool, **options: Any) -> Response:
    """A response as the SDK has it in the end, however it came."""
    if not stream:
        return reply(sdk, model, input_, **options)
    with sdk.responses.stream(model=model, input=input_, **options) as events:
        *_, last = events
        # Of a response that was cut the SDK keeps the event alone.
        return last.response if last.type == "response.incomplete" else events.get_final_response()


def namespace(*tools: dict[str, Any], name: str = "sky") -> dict[str, Any]:
    return {"type": "namespace", "name": name, "description": "Above.", "tools": list(tools)}
