"""Streams of the Messages API."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic import Anthropic
from anthropic.types import Message

from tests.e2e.anthropic.asking import (
    BOTH,
    CALLS,
    HELLO,
    HI,
    PLAIN,
    SIGNATURE,
    THINKS,
    WEATHER,
    events_of,
    reading_of,
    reply,
    text_of,
    wire,
)
from tests.support.dialects import Read
from tests.support.server import Server


def _start(model: str, read: Read) -> dict[str, Any]:
    usage = _usage(read, 0)
    head: dict[str, Any] = {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
    }
    return {"type": "message_start", "message": {**head, "stop_sequence": None, "usage": usage}}


def _usage(read: Read, output: int) -> dict[str, int]:
    return {
        "input_tokens": read.tokens - read.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": read.cached,
        "output_tokens": output,
    }


def _block(index: int, block: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": block},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def _end(reason: str, usage: dict[str, int], sequence: str | None = None) -> list[dict[str, Any]]:
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


def _joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring deltas of one kind as one: how many there are says only how fast they came."""
    joined: list[dict[str, Any]] = []
    for event in events:
        last = joined[-1] if joined else {}
        if (
            event["type"] == "content_block_delta" == last.get("type")
            and event["delta"]["type"] == last["delta"]["type"]
        ):
            kind = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
            name = kind[event["delta"]["type"]]
            delta = {**last["delta"], name: last["delta"][name] + event["delta"][name]}
            joined[-1] = {**last, "delta": delta}
        else:
            joined.append(event)
    return joined


def test_a_stream_of_text_is_these_events_in_this_order(sdk: Anthropic) -> None:
    read = reading_of(reply(sdk, PLAIN))
    known = Read(read.tokens, read.tokens - 1)
    text = _block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": HELLO})
    expected = [_start(PLAIN, known), *text, *_end("end_turn", _usage(known, 4))]
    assert _joined(events_of(sdk, PLAIN)) == expected


def test_a_stream_of_thinking_text_and_calls_is_one_block_after_the_other(sdk: Anthropic) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "thinking": {"type": "adaptive"}}
    read = reading_of(reply(sdk, BOTH, **options))
    known = Read(read.tokens, read.tokens - 1)
    call = {"type": "tool_use", "id": "call", "name": "weather", "input": {}}
    assert _joined(events_of(sdk, BOTH, **options)) == [
        _start(BOTH, known),
        *_block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "Hm."},
            {"type": "signature_delta", "signature": SIGNATURE},
        ),
        *_block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Both. "}),
        *_block(2, call, {"type": "input_json_delta", "partial_json": '{"city": "Oslo"}'}),
        *_block(3, call, {"type": "input_json_delta", "partial_json": '{"city": "Rome"}'}),
        *_end("tool_use", _usage(known, reply(sdk, BOTH, **options).usage.output_tokens)),
    ]


def test_a_streams_end_names_the_stop_sequence(sdk: Anthropic) -> None:
    events = events_of(sdk, "acme/counts", stop_sequences=["three"])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "three"}
    (_, whole, *_) = _joined(events)[1:]
    assert whole["delta"] == {"type": "text_delta", "text": "One two "}


def test_a_streams_end_says_that_it_was_cut(sdk: Anthropic) -> None:
    events = events_of(sdk, PLAIN, max_tokens=1)
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 1


def test_on_the_wire_each_event_has_its_name_and_a_ping_follows_the_start(server: Server) -> None:
    events = wire(server, model=PLAIN)
    assert all(name == data["type"] for name, data in events)
    assert events[1] == ("ping", {"type": "ping"})
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("model", [PLAIN, THINKS, CALLS, BOTH])
def test_the_sdk_puts_a_stream_together_to_the_same_message(sdk: Anthropic, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": HI,
        "max_tokens": 100,
        "thinking": {"type": "adaptive"},
        "tools": [WEATHER],
    }
    whole = sdk.messages.create(**options)
    with sdk.messages.stream(**options) as stream:
        said = [(event.type, getattr(event, event.type, None)) for event in stream]
        final = stream.get_final_message()
    assert _without_ids(final) == _without_ids(whole)
    assert "".join(str(text) for kind, text in said if kind == "text") == text_of(whole)
    thought = "".join(block.thinking for block in whole.content if block.type == "thinking")
    assert "".join(str(text) for kind, text in said if kind == "thinking") == thought


def _without_ids(message: Message) -> tuple[list[Any], Any, int]:
    content = [{**block.to_dict(), "id": None, "parsed_output": None} for block in message.content]
    return content, message.stop_reason, message.usage.output_tokens


def test_the_text_stream_is_the_text(sdk: Anthropic) -> None:
    with sdk.messages.stream(model=THINKS, messages=HI, max_tokens=100) as stream:
        assert "".join(stream.text_stream) == stream.get_final_text() == "Yes, of course."
