"""Tools of the Messages API."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.e2e.anthropic.asking import (
    BOTH,
    CALLS,
    CLOCK,
    EPHEMERAL,
    HI,
    PLAIN,
    RANDOM,
    SCHEMA,
    WEATHER,
    is_read_as,
    outcome,
    reading_of,
    reply,
)
from tests.support.dialects import is_same, read_by_chat
from tests.support.server import Server


def test_any_json_schema_reaches_the_model_whole(server: Server, sdk: Anthropic) -> None:
    function = {"name": "weather", "description": "Now.", "parameters": SCHEMA}
    read = read_by_chat(server, CALLS, HI, tools=[{"type": "function", "function": function}])
    for tool in (WEATHER, {**WEATHER, **EPHEMERAL}, {"type": "custom", **WEATHER}):
        assert is_same(read, reading_of(reply(sdk, CALLS, tools=[tool])))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "auto"}, None])
def test_the_model_decides_by_itself(sdk: Anthropic, choice: Any, stream: bool) -> None:
    message = outcome(sdk, BOTH, stream=stream, tools=[WEATHER], **({"tool_choice": choice} if choice else {}))
    assert [(block["type"], block.get("input")) for block in message["content"]] == [
        ("text", None),
        ("tool_use", {"city": "Oslo"}),
        ("tool_use", {"city": "Rome"}),
    ]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_where_parallel_use_is_disabled(sdk: Anthropic, stream: bool) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = outcome(sdk, BOTH, stream=stream, tools=[WEATHER], tool_choice=choice)
    assert [block["input"] for block in message["content"] if block["type"] == "tool_use"] == [{"city": "Oslo"}]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [PLAIN, RANDOM, CALLS])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_that_is_demanded_is_made_and_fits_its_schema(
    sdk: Anthropic, choice: Any, model: str, stream: bool
) -> None:
    message = outcome(sdk, model, stream=stream, tools=[WEATHER, {**WEATHER, "name": "climate"}], tool_choice=choice)
    (use,) = message["content"]
    assert (use["type"], message["stop_reason"]) == ("tool_use", "tool_use")
    assert use["name"] in ({"weather"} if "name" in choice else {"weather", "climate"})
    assert use["input"] in ({"city": "Oslo"}, {"city": "Rome"})


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_the_tool_that_is_named_is_called(sdk: Anthropic, name: str) -> None:
    message = reply(sdk, PLAIN, tools=[WEATHER, CLOCK], tool_choice={"type": "tool", "name": name})
    assert [block.name for block in message.content if block.type == "tool_use"] == [name]


def test_without_a_choice_of_tools_the_model_is_shown_none(server: Server, sdk: Anthropic) -> None:
    assert is_read_as(server, sdk, CALLS, HI, tools=[WEATHER], tool_choice={"type": "none"})
    message = reply(sdk, CALLS, tools=[WEATHER], tool_choice={"type": "none"})
    assert {block.type for block in message.content} == {"text"}
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "none"}}, "no tool 'none'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
    ],
)
def test_tools_that_cannot_be_are_refused_by_name(sdk: Anthropic, options: Any, said: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=said):
        reply(sdk, CALLS, **options)
