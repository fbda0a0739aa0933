"""Streams of the Responses API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import Response

from tests.e2e.responses.asking import BOTH, CALLS, CUSTOM, OSLO, PLAIN, THINKS, WEATHER, events_of, outcome
from tests.support.server import Server


def _joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring deltas as one: how many there are says only how fast they came. Ids as their kind."""
    joined: list[dict[str, Any]] = []
    for event in events:
        last = joined[-1] if joined else {}
        if event["type"].endswith(".delta") and event["type"] == last.get("type"):
            joined[-1] = {**last, "delta": last["delta"] + event["delta"]}
        else:
            joined.append(_anonymous(event))
    return joined


def _anonymous(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: each.partition("_")[0] if name in ("id", "item_id", "call_id") else _anonymous(each)
            for name, each in value.items()
        }
    return [_anonymous(each) for each in value] if isinstance(value, list) else value


def _message_events(index: int, text: str, status: str = "completed") -> list[dict[str, Any]]:
    place = {"item_id": "msg", "output_index": index, "content_index": 0}
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    item = {"id": "msg", "type": "message", "role": "assistant"}
    return [
        {
            "type": "response.output_item.added",
            "output_index": index,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []},
        {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": status, "content": [part]},
        },
    ]


def _reasoning_events(index: int, text: str, *, is_summary: bool) -> list[dict[str, Any]]:
    place = {"item_id": "rs", "output_index": index, "summary_index" if is_summary else "content_index": 0}
    part_name = "response.reasoning_summary_part" if is_summary else "response.content_part"
    text_name = "response.reasoning_summary_text" if is_summary else "response.reasoning_text"
    part = {"type": "summary_text" if is_summary else "reasoning_text", "text": text}
    whole = {"summary": [part]} if is_summary else {"summary": [], "content": [part]}
    item = {"id": "rs", "type": "reasoning"}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": {**item, "summary": []}},
        {"type": f"{part_name}.added", **place, "part": {**part, "text": ""}},
        {"type": f"{text_name}.delta", **place, "delta": text},
        {"type": f"{text_name}.done", **place, "text": text},
        {"type": f"{part_name}.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": index, "item": {**item, **whole}},
    ]


def _call_events(index: int, arguments: str) -> list[dict[str, Any]]:
    place = {"item_id": "fc", "output_index": index}
    item = {"id": "fc", "type": "function_call", "call_id": "call", "name": "weather"}
    name = "response.function_call_arguments"
    return [
        {
            "type": "response.output_item.added",
            "output_index": index,
            "item": {**item, "status": "in_progress", "arguments": ""},
        },
        {"type": f"{name}.delta", **place, "delta": arguments},
        {"type": f"{name}.done", **place, "arguments": arguments, "name": "weather"},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "completed", "arguments": arguments},
        },
    ]


@pytest.mark.parametrize("is_summary", [False, True])
def test_every_event_comes_in_its_order(sdk: OpenAI, is_summary: bool) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "reasoning": {"summary": "auto"} if is_summary else {}}
    created, in_progress, *events, completed = _joined(events_of(sdk, BOTH, **options))
    assert events == [
        *_reasoning_events(0, "Hm.", is_summary=is_summary),
        *_message_events(1, "Both. "),
        *_call_events(2, OSLO),
        *_call_events(3, '{"city": "Rome"}'),
    ]
    assert [created["type"], in_progress["type"], completed["type"]] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert completed["response"]["output"] == items
    assert (completed["response"]["status"], completed["response"]["usage"] is None) == ("completed", False)


def test_a_stream_that_is_cut_ends_with_incomplete(sdk: OpenAI) -> None:
    _, _, *events, last = _joined(events_of(sdk, PLAIN, max_output_tokens=2))
    assert events == _message_events(0, "Hello there,", status="incomplete")
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_custom_tools_input_has_events_of_its_own(sdk: OpenAI) -> None:
    _, _, *events, _ = _joined(events_of(sdk, "acme/applies", tools=[CUSTOM]))
    item = {"id": "ctc", "type": "custom_tool_call", "call_id": "call", "name": "apply"}
    name, text = "response.custom_tool_call_input", "*** Begin é\n"
    told = [{key: value for key, value in event.items() if key != "name"} for event in events]
    assert told == [
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "input": ""}},
        {"type": f"{name}.delta", "item_id": "ctc", "output_index": 0, "delta": text},
        {"type": f"{name}.done", "item_id": "ctc", "output_index": 0, "input": text},
        {"type": "response.output_item.done", "output_index": 0, "item": {**item, "input": text}},
    ]


def test_on_the_wire_each_event_has_its_name(server: Server) -> None:
    answer = server.http.post("/v1/responses", json={"model": PLAIN, "input": "hi", "stream": True})
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.splitlines()
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


@pytest.mark.parametrize("model", [PLAIN, THINKS, CALLS, BOTH])
@pytest.mark.parametrize("options", [{}, {"max_output_tokens": 3}, {"reasoning": {"summary": "auto"}}])
def test_the_sdk_puts_a_stream_together_to_the_same_response(sdk: OpenAI, model: str, options: Any) -> None:
    def told(response: Response) -> Any:
        parsed: dict[str, Any] = response.to_dict(mode="json", exclude_none=True)
        for name in ("created_at", "completed_at", "usage"):
            parsed.pop(name, None)
        for item in parsed["output"]:
            item.pop("parsed_arguments", None)
        return _anonymous(parsed)

    options = {"tools": [WEATHER], **options}
    whole, streamed = (outcome(sdk, model, stream=stream, **options) for stream in (False, True))
    assert told(streamed) == told(whole)
    assert whole.usage is not None
    assert streamed.usage is not None
    assert streamed.usage.output_tokens == whole.usage.output_tokens
