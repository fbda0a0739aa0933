"""Stored responses: listed, streamed again and compacted, and what a prompt has in tokens, by OpenAI's SDK."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.responses.asking import (
    BOTH,
    CALLS,
    HELLO,
    OSLO,
    PLAIN,
    SUNNY,
    WEATHER,
    events_of,
    reading_of,
    refusal_of,
    reply,
)
from tests.support.server import Server


def _again(sdk: OpenAI, id_: str, **options: Any) -> list[dict[str, Any]]:
    with sdk.responses.retrieve(id_, stream=True, **options) as stream:
        return [event.to_dict(mode="json") for event in stream]


# Streams again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (PLAIN, {}),
        (PLAIN, {"top_logprobs": 2}),
        (PLAIN, {"max_output_tokens": 2}),
        (BOTH, {"tools": [WEATHER]}),
        (BOTH, {"tools": [WEATHER], "reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}),
    ],
)
def test_a_stored_stream_comes_again_with_the_same_events(sdk: OpenAI, model: str, options: Any) -> None:
    before = events_of(sdk, model, **options)
    after = _again(sdk, before[-1]["response"]["id"])
    assert [event.pop("sequence_number") for event in after] == list(range(len(before)))
    assert after == before
    assert sum(event["type"].endswith(".delta") for event in before) > 0


def test_a_stream_goes_on_after_the_event_that_its_client_had_last(sdk: OpenAI) -> None:
    id_ = events_of(sdk, PLAIN)[-1]["response"]["id"]
    whole = _again(sdk, id_)
    assert _again(sdk, id_, starting_after=3) == whole[4:]
    assert _again(sdk, id_, starting_after=len(whole)) == []


def test_an_answer_that_was_not_streamed_has_a_stream_too(sdk: OpenAI) -> None:
    events = _again(sdk, reply(sdk, PLAIN).id)
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == HELLO
    assert events[-1]["type"] == "response.completed"


# What a response answers ------------------------------------------------------------------------------------------


def test_input_items_are_what_was_sent_with_the_conversation_before_it(sdk: OpenAI) -> None:
    first = reply(sdk, CALLS, "What now?", tools=[WEATHER])
    call = next(item for item in first.output if item.type == "function_call")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    second = reply(sdk, CALLS, result, tools=[WEATHER], previous_response_id=first.id)
    assert second.output_text == SUNNY
    items = sdk.responses.input_items.list(second.id, order="asc").data
    kinds = [(item.type, getattr(item, "role", None)) for item in items]
    assert kinds == [
        ("message", "user"),
        ("message", "assistant"),
        ("function_call", None),
        ("function_call_output", None),
    ]
    called: Any = items[2]
    assert (called.arguments, called.id) == (OSLO, call.id)
    assert list(reversed(items)) == sdk.responses.input_items.list(second.id).data
    pages = [page.id for page in sdk.responses.input_items.list(second.id, order="asc", limit=1)]
    assert pages == [item.id for item in items]


def test_every_kind_of_item_is_listed(sdk: OpenAI) -> None:
    image = {"type": "input_text", "text": "b"}
    sent: list[Any] = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [image]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "y"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    items = sdk.responses.input_items.list(reply(sdk, PLAIN, sent).id, order="asc").data
    assert [item.type for item in items] == [item.get("type", "message") for item in sent]
    assert len({item.id for item in items}) == len(sent)


@pytest.mark.parametrize(
    ("query", "param"), [({"after": "msg_none"}, "after"), ({"limit": 0}, "limit"), ({"order": "up"}, "order")]
)
def test_a_list_that_there_is_not_is_refused(sdk: OpenAI, query: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.responses.input_items.list(reply(sdk, PLAIN).id, **query)
    assert refused.value.param == param


# Counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"instructions": "Be kind."}, {"tools": [WEATHER], "tool_choice": "auto"}])
def test_input_tokens_are_those_that_the_answer_reads(sdk: OpenAI, options: Any) -> None:
    counted = sdk.responses.input_tokens.count(model=CALLS, input="So?", **options)
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == reading_of(reply(sdk, CALLS, "So?", max_output_tokens=1, **options)).tokens


def test_input_tokens_include_the_conversation_that_goes_on(sdk: OpenAI) -> None:
    first = reply(sdk, PLAIN, "So?")
    counted = sdk.responses.input_tokens.count(model=PLAIN, input="And?", previous_response_id=first.id)
    second = reply(sdk, PLAIN, "And?", previous_response_id=first.id)
    assert counted.input_tokens == reading_of(second).tokens


# Compaction -------------------------------------------------------------------------------------------------------


def test_a_compacted_conversation_is_its_questions_and_a_summary(server: Server, sdk: OpenAI) -> None:
    first = reply(sdk, PLAIN, "What about Oslo?")
    client = server.unchecked_openai  # whose type has no messages of a user's among what comes back, as OpenAI's has
    told = client.responses.with_raw_response.compact(model=PLAIN, input="And Rome?", previous_response_id=first.id)
    assert told.parse().object == "response.compaction"
    assert told.parse().usage.output_tokens == 4
    *users, summary = json.loads(told.text)["output"]
    assert [user["content"] for user in users] == [
        [{"type": "input_text", "text": text}] for text in ("What about Oslo?", "And Rome?")
    ]
    assert (summary["type"], HELLO in str(summary)) == ("compaction", False)
    said: Any = [*users, summary, {"role": "user", "content": "Go on."}]
    written = f"The conversation until now, in short:\n\n{HELLO}"
    plain: Any = [*users, {"role": "user", "content": written}, {"role": "user", "content": "Go on."}]
    assert sdk.responses.input_tokens.count(model=PLAIN, input=said) == sdk.responses.input_tokens.count(
        model=PLAIN, input=plain
    )
    assert reply(sdk, PLAIN, said).output_text == HELLO


def test_references_to_stored_items_are_those_items(sdk: OpenAI) -> None:
    first = reply(sdk, BOTH, "What now?", tools=[WEATHER], reasoning={"summary": "auto"})
    items: list[Any] = [item.to_dict(mode="json") for item in first.output]
    references: list[Any] = [{"type": "item_reference", "id": item["id"]} for item in items]
    calls = [item for item in items if item["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": SUNNY} for call in calls]
    whole = reply(sdk, BOTH, [*items, *results], tools=[WEATHER])
    referred = reply(sdk, BOTH, [*references, *results], tools=[WEATHER])
    assert reading_of(whole).tokens == reading_of(referred).tokens
    listed = [item.to_dict() for item in sdk.responses.input_items.list(referred.id, order="asc")]
    assert [item["type"] for item in listed] == [item["type"] for item in [*items, *results]]
    refused = refusal_of(sdk, "input[0]", input_=[{"type": "item_reference", "id": "msg_of_another_server"}])
    assert "send the item itself" in refused.message


def test_another_server_s_compaction_is_refused(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        reply(sdk, PLAIN, [{"type": "compaction", "encrypted_content": "gAAAA"}, {"role": "user", "content": "hi"}])
    assert refused.value.param == "input[0].encrypted_content"


@pytest.mark.parametrize(
    ("options", "param"), [({}, "input"), ({"image": {"context_compression": "enabled"}}, "image")]
)
def test_what_cannot_be_compacted_is_refused(sdk: OpenAI, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.responses.compact(model=PLAIN, **options)
    assert refused.value.param == param


# Cancellation, and what is not there -------------------------------------------------------------------------------


def test_a_response_that_is_over_cannot_be_cancelled(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="background"):
        sdk.responses.cancel(reply(sdk, PLAIN).id)


def test_a_response_that_is_not_stored_is_not_found(sdk: OpenAI) -> None:
    for ask in (sdk.responses.cancel, sdk.responses.input_items.list, sdk.responses.retrieve):
        with pytest.raises(openai.NotFoundError):
            ask("resp_none")


def test_a_long_conversation_is_answered_where_its_oldest_turns_may_be_left_out(sdk: OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": word * 1500} for word in "abcd"]
    with pytest.raises(openai.BadRequestError):
        reply(sdk, PLAIN, turns)
    made = reply(sdk, PLAIN, turns, truncation="auto")
    assert (made.output_text, made.truncation) == (HELLO, "auto")
    assert 1500 < reading_of(made).tokens < 4096 * 3 // 4
