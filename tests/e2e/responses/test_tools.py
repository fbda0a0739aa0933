"""Tools of the Responses API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI
from openai.types.responses import Response

from tests.e2e.responses.asking import (
    BOTH,
    CALLS,
    CUSTOM,
    FUNCTION,
    OSLO,
    PLAIN,
    RANDOM,
    SEARCH,
    SUNNY,
    WEATHER,
    is_read_as,
    namespace,
    outcome,
    reading_of,
    reply,
)
from tests.support.dialects import is_same, read_by_chat
from tests.support.server import Server

CLIMATE: dict[str, Any] = {"type": "function", **FUNCTION, "name": "climate", "strict": False}


def _calls(response: Response) -> list[tuple[Any, ...]]:
    """(namespace, name, arguments) of each function call."""
    return [(item.namespace, item.name, item.arguments) for item in response.output if item.type == "function_call"]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items_of_their_own(sdk: OpenAI, stream: bool) -> None:
    response = outcome(sdk, BOTH, stream=stream, tools=[WEATHER])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert _calls(response) == [(None, "weather", OSLO), (None, "weather", '{"city": "Rome"}')]
    assert len({item.id for item in response.output}) == 4
    assert len({item.call_id for item in response.output if item.type == "function_call"}) == 2
    assert response.tools[0].to_dict() == WEATHER


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_where_calls_may_not_be_parallel(sdk: OpenAI, stream: bool) -> None:
    response = outcome(sdk, BOTH, stream=stream, tools=[WEATHER], parallel_tool_calls=False)
    assert (_calls(response), response.parallel_tool_calls) == ([(None, "weather", OSLO)], False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [PLAIN, RANDOM, CALLS])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "climate"}])
def test_a_call_that_is_demanded_is_made_and_fits_its_schema(
    sdk: OpenAI, choice: Any, model: str, stream: bool
) -> None:
    response = outcome(sdk, model, stream=stream, tools=[WEATHER, CLIMATE], tool_choice=choice)
    ((_, name, arguments),) = _calls(response)
    assert name in ({"climate"} if isinstance(choice, dict) else {"weather", "climate"})
    assert json.loads(arguments) in ({"city": "Oslo"}, {"city": "Rome"})
    told = response.tool_choice
    assert (told if isinstance(told, str) else told.to_dict()) == choice


def test_without_a_choice_of_tools_the_model_is_shown_none(server: Server, sdk: OpenAI) -> None:
    assert is_read_as(server, CALLS, [{"role": "user", "content": "hi"}], tools=[WEATHER], tool_choice="none")
    assert _calls(reply(sdk, CALLS, tools=[WEATHER], tool_choice="none")) == []


def test_tools_that_others_run_are_left_out(server: Server, sdk: OpenAI) -> None:
    read = read_by_chat(
        server, CALLS, [{"role": "user", "content": "hi"}], tools=[{"type": "function", "function": FUNCTION}]
    )
    response = reply(sdk, CALLS, tools=[SEARCH, WEATHER])
    assert is_same(read, reading_of(response))
    assert [tool.type for tool in response.tools] == ["web_search", "function"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tool_is_called_with_plain_text(sdk: OpenAI, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "hi"}]
    response = outcome(sdk, "acme/applies", items, stream=stream, tools=[CUSTOM])
    (call,) = response.output
    assert call.type == "custom_tool_call"
    assert (call.name, call.input, call.namespace) == ("apply", "*** Begin é\n", None)
    items += [call.to_dict(), {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}]
    assert outcome(sdk, "acme/applies", items, stream=stream, tools=[CUSTOM]).output_text == SUNNY


def test_a_custom_call_in_the_history_is_read_as_what_the_model_said(server: Server, sdk: OpenAI) -> None:
    question = {"role": "user", "content": "Go"}
    (call,) = reply(sdk, "acme/applies", [question], tools=[CUSTOM]).output
    assert call.type == "custom_tool_call"
    function = {"name": "apply", "arguments": json.dumps({"input": "*** Begin é\n"})}
    chat = [
        question,
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "done"},
    ]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    assert is_read_as(server, "acme/applies", chat, [question, call.to_dict(), output])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_in_a_namespace_names_it(server: Server, sdk: OpenAI, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "Where?"}]
    response = outcome(sdk, CALLS, items, stream=stream, tools=[namespace(WEATHER), SEARCH])
    assert _calls(response) == [("sky", "weather", OSLO)]
    items += [item.to_dict() for item in response.output]
    call = response.output[-1]
    assert call.type == "function_call"
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    answered = outcome(sdk, CALLS, items, stream=stream, tools=[namespace(WEATHER), SEARCH])
    assert answered.output_text == SUNNY
    assert reading_of(answered).cached >= reading_of(response).tokens


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER, namespace(CLIMATE, WEATHER)],
        [namespace(WEATHER), WEATHER],
        [namespace(WEATHER), namespace(WEATHER, name="sea"), WEATHER],
    ],
)
def test_tools_of_one_name_are_told_apart_whatever_their_order(sdk: OpenAI, tools: Any) -> None:
    """The model says "weather" or "sky__weather": the tool without a namespace keeps its name."""
    assert _calls(reply(sdk, CALLS, tools=tools)) == [(None, "weather", OSLO)]
    assert _calls(reply(sdk, "acme/apart", tools=tools)) == [("sky", "weather", '{"city": "Rome"}')]


@pytest.mark.parametrize(
    ("kind", "more"), [("function_call", {"arguments": "{}"}), ("custom_tool_call", {"input": "x"})]
)
def test_a_call_in_the_history_has_the_name_that_the_model_gave_it(server: Server, kind: str, more: Any) -> None:
    tool = {"type": "custom", "name": "weather"} if kind == "custom_tool_call" else WEATHER
    question = {"role": "user", "content": f"A {kind}"}
    call = {"type": kind, "call_id": "call_1", "name": "weather", "namespace": "sky", **more}
    output = {"type": f"{kind}_output", "call_id": "call_1", "output": "21"}
    arguments = json.dumps({"input": "x"} if kind == "custom_tool_call" else {})
    function = {"name": "sky__weather", "arguments": arguments}
    chat = [
        question,
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
    ]
    offered = [WEATHER, namespace(tool)]
    assert is_read_as(server, CALLS, chat, [question, call, output], tools=offered, tool_choice="none")
