"""Input of the Responses API, and responses that are stored to be continued."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from tests.e2e.responses.asking import (
    BOTH,
    CALLS,
    HELLO,
    OSLO,
    PLAIN,
    SUNNY,
    THINKS,
    WEATHER,
    is_read_as,
    namespace,
    outcome,
    reading_of,
    refusal_of,
    reply,
)
from tests.support.server import Server

# Input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "input_",
    [
        "Which one?",
        [{"role": "user", "content": "Which one?"}],
        [{"type": "message", "role": "user", "content": "Which one?"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Which one?"}]}],
        [{"role": "user", "content": [{"type": "input_text", "text": t} for t in ("Which ", "one?")]}],
    ],
)
def test_input_is_a_string_or_items(server: Server, input_: Any) -> None:
    assert is_read_as(server, PLAIN, [{"role": "user", "content": "Which one?"}], input_)


@pytest.mark.parametrize(
    ("input_", "options"),
    [
        ("hi", {"instructions": "Be kind."}),
        ([{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}], {}),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}], {}),
        ([{"role": "developer", "content": "kind."}, {"role": "user", "content": "hi"}], {"instructions": "Be"}),
    ],
)
def test_instructions_and_developer_items_are_the_system_prompt(server: Server, input_: Any, options: Any) -> None:
    text = "Be\n\nkind." if len(options) and not isinstance(input_, str) else "Be kind."
    chat = [{"role": "system", "content": text}, {"role": "user", "content": "hi"}]
    assert is_read_as(server, PLAIN, chat, input_, **options)


def test_turns_of_all_roles_are_read_in_their_order(server: Server) -> None:
    said = {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [said]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "e"}]},
        {"role": "user", "content": "f"},
    ]
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "de"), ("user", "f"))
    ]
    assert is_read_as(server, PLAIN, chat, turns)


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_calls_and_their_outputs_goes_from_question_to_answer(
    server: Server, sdk: OpenAI, stream: bool
) -> None:
    items: list[Any] = [{"role": "user", "content": "What now?"}]
    asked = outcome(sdk, CALLS, items, stream=stream, tools=[WEATHER])
    message, call = asked.output
    assert (message.type, call.type, asked.output_text) == ("message", "function_call", "Let me see. ")
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("weather", OSLO, "completed")
    items += [item.to_dict() for item in asked.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    answered = outcome(sdk, CALLS, items, stream=stream, tools=[WEATHER])
    assert (answered.output_text, answered.status) == (SUNNY, "completed")
    assert reading_of(answered).cached >= reading_of(asked).tokens


@pytest.mark.parametrize("output", ["21", [{"type": "input_text", "text": "2"}, {"type": "input_text", "text": "1"}]])
def test_what_one_answer_was_made_of_is_one_turn_again(server: Server, output: Any) -> None:
    items: list[Any] = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"role": "assistant", "content": "Well."},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": OSLO},
        {"type": "function_call", "call_id": "call_2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": output},
        {"type": "function_call_output", "call_id": "call_2", "output": "22"},
    ]
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for at, arguments in ((1, OSLO), (2, "{}"))
    ]
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Well.", "reasoning_content": "So.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
        {"role": "tool", "tool_call_id": "call_2", "content": "22"},
    ]
    assert is_read_as(server, BOTH, chat, items)


def test_what_was_said_after_a_call_is_a_turn_of_its_own(server: Server) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": OSLO}
    items = [{"role": "user", "content": "hi"}, call, {"role": "assistant", "content": "Wait."}]
    function = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": OSLO}}
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [function]},
        {"role": "assistant", "content": "Wait."},
        {"role": "user", "content": "And?"},
    ]
    assert is_read_as(server, CALLS, chat, [*items, {"role": "user", "content": "And?"}])


# Stored responses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_can_be_had_again_until_it_is_deleted(sdk: OpenAI, stream: bool) -> None:
    response = outcome(sdk, BOTH, stream=stream, tools=[WEATHER], store=True)
    again = sdk.responses.retrieve(response.id)
    assert _without_parsed(again) == _without_parsed(response)
    sdk.responses.delete(response.id)
    for ask in (sdk.responses.retrieve, sdk.responses.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(response.id)
        assert (refused.value.code, refused.value.type) == ("response_not_found", "invalid_request_error")


def _without_parsed(response: Response) -> Any:
    told: dict[str, Any] = response.to_dict(mode="json", exclude_none=True)
    for item in told["output"]:
        item.pop("parsed_arguments", None)
    return told


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_not_stored_is_not_there(sdk: OpenAI, stream: bool) -> None:
    response = outcome(sdk, PLAIN, stream=stream, store=False)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    refused = refusal_of(sdk, "previous_response_id", previous_response_id=response.id)
    assert refused.code == "previous_response_not_found"


def test_deletion_says_what_is_gone(server: Server, sdk: OpenAI) -> None:
    response = reply(sdk, PLAIN)
    answer = server.http.delete(f"/v1/responses/{response.id}")
    assert answer.json() == {"id": response.id, "object": "response", "deleted": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_the_response_before(server: Server, sdk: OpenAI, stream: bool) -> None:
    first = outcome(sdk, THINKS, f"One {stream}", stream=stream, instructions="Be kind.")
    second = outcome(sdk, THINKS, "Two", stream=stream, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    said = {"role": "assistant", "content": "Yes, of course.", "reasoning_content": "Hm. Well."}
    turns = [{"role": "user", "content": f"One {stream}"}, said, {"role": "user", "content": "Two"}, said]
    chat = [*turns, {"role": "user", "content": "Three"}]  # the instructions were those of the first response alone
    assert is_read_as(server, THINKS, chat, "Three", previous_response_id=second.id)
    branch = [*turns[:2], {"role": "user", "content": "Else"}]
    assert is_read_as(server, THINKS, branch, "Else", previous_response_id=first.id)


def test_a_chain_outlives_the_deletion_of_its_beginning(server: Server, sdk: OpenAI) -> None:
    first = reply(sdk, PLAIN, "One")
    second = reply(sdk, PLAIN, "Two", previous_response_id=first.id)
    sdk.responses.delete(first.id)
    said = {"role": "assistant", "content": HELLO}
    chat = [{"role": "user", "content": "One"}, said, {"role": "user", "content": "Two"}, said]
    chat.append({"role": "user", "content": "Three"})
    assert is_read_as(server, PLAIN, chat, "Three", previous_response_id=second.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_calls_output_may_follow_the_response_that_made_it(sdk: OpenAI, stream: bool) -> None:
    asked = outcome(sdk, CALLS, stream=stream, tools=[namespace(WEATHER)])
    call = asked.output[-1]
    assert call.type == "function_call"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    answered = outcome(sdk, CALLS, [output], stream=stream, tools=[namespace(WEATHER)], previous_response_id=asked.id)
    assert answered.output_text == SUNNY
    assert reading_of(answered).cached >= reading_of(asked).tokens
