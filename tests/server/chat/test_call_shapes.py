"""Calls are read as models really write them; no mark shows in text, and no tool is called that was not declared."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

import pytest
from mlx_lm.generate import make_text_state_machine
from mlx_overlay_server.chat.calls import unmarked
from mlx_overlay_server.chat.events import Event, FinishReason, Reasoning, Text, ToolCall
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.opening import Opening
from mlx_overlay_server.chat.reader import Reader, Token
from mlx_overlay_server.chat.requests import Tool

from tests.server.chat.call_shapes import OF_OTHERS, OF_PARSERS, OSLO, SHAPES, TOOLS, Shape

MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_all = pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
_others = [(parser, shape) for parser, shapes in OF_PARSERS.items() for shape in shapes]


def _joined(events: Sequence[Event], kind: type[Text | Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def _calls(events: Sequence[Event]) -> list[tuple[str, object]]:
    return [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ToolCall)]


@_all
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_call_is_read_as_models_write_it(shape: Shape, is_streamed: bool, model: Loaded) -> None:
    reader, tokens = Reader(model, tools=TOOLS), [Token(byte) for byte in shape.says.encode()]
    events = [event for token in tokens for event in reader.feed([token])] if is_streamed else reader.feed(tokens)
    events += reader.feed([], "stop")
    found = _calls(events), _joined(events, Text).strip(), _joined(events, Reasoning)
    assert found == (shape.calls, shape.text.strip(), shape.reasoning)
    assert reader.reason == ("tool_calls" if shape.calls else "stop")


@pytest.mark.parametrize(("parser", "shape"), _others, ids=[f"{parser}: {shape.name}" for parser, shape in _others])
def test_a_call_is_read_where_mlx_lm_s_own_parser_loses_some_of_it(parser: str, shape: Shape, model: Loaded) -> None:
    module = import_module(f"mlx_lm.tool_parsers.{parser}")
    tokenizer = copy.copy(model.tokenizer)
    tokenizer._tool_parser = module.parse_tool_call  # type: ignore[attr-defined]
    tokenizer._tool_call_start = module.tool_call_start  # type: ignore[attr-defined]
    tokenizer._tool_call_end = module.tool_call_end  # type: ignore[attr-defined]
    own = replace(model, tokenizer=tokenizer, marks=make_text_state_machine(tokenizer))
    reader = Reader(own, tools=TOOLS)
    events = [event for byte in shape.says.encode() for event in reader.feed([Token(byte)])] + reader.feed([], "stop")
    assert (_calls(events), _joined(events, Text).strip()) == (shape.calls, shape.text)
    marks = [mark for mark in (module.tool_call_start, module.tool_call_end) if mark]
    _cut_anywhere(shape, own, marks, "length")


@_all
def test_an_answer_cut_anywhere_shows_no_mark_and_calls_no_other_tool(shape: Shape, model: Loaded) -> None:
    finishes: Sequence[FinishReason] = ("length", "stop")
    for finish in finishes:
        _cut_anywhere(shape, model, MARKS, finish)


def _cut_anywhere(shape: Shape, model: Loaded, marks: Sequence[str], finish: FinishReason) -> None:
    declared = {tool.name for tool in TOOLS}
    marks = [mark for mark in marks if mark not in json.dumps(shape.calls)]  # there, it is an argument
    for size in range(len(shape.says) + 1):
        reader = Reader(model, tools=TOOLS)
        events = [event for byte in shape.says[:size].encode() for event in reader.feed([Token(byte)])]
        events += reader.feed([], finish)
        said = _joined(events, Text) + _joined(events, Reasoning)
        where = f"{shape.says[:size]!r}, {finish}"
        assert not [mark for mark in marks if mark in said], where
        assert {name for name, _ in _calls(events)} <= declared, where
        names = [name for name, _ in _calls(events)]
        assert not shape.calls or names == [name for name, _ in shape.calls][: len(names)], where


@pytest.mark.parametrize("shape", OF_OTHERS, ids=[shape.name for shape in OF_OTHERS])
def test_a_call_in_another_model_s_form_is_read_and_shows_none_of_its_marks(shape: Shape, model: Loaded) -> None:
    for size in (*range(1, len(shape.says), 3), len(shape.says)):
        reader, is_whole = Reader(model, tools=TOOLS), size == len(shape.says)
        events = [event for byte in shape.says[:size].encode() for event in reader.feed([Token(byte)])]
        events += reader.feed([], "stop" if is_whole else "length")
        calls, text = _calls(events), _joined(events, Text)
        if is_whole:
            assert (calls, text) == (shape.calls, shape.text)
        elif shape.calls:
            text = text.rstrip("<`")  # one letter is no mark yet
            assert (calls, shape.text.startswith(text)) == (shape.calls[: len(calls)], True), shape.says[:size]


@_all
def test_text_is_held_back_only_while_it_may_be_a_call(shape: Shape) -> None:
    if unmarked(shape.says, TOOLS):
        opening = Opening(TOOLS)
        assert (
            all(opening.may_follow(shape.says[:size]) for size in range(len(shape.says))) or "arguments" in shape.name
        )


def test_an_answer_that_only_looks_like_json_is_streamed_from_its_first_key(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    assert reader.feed(map(Token, b'{"ci')) == [Text('{"ci')]
    assert reader.feed(map(Token, b'ty": 1')) == [Text('ty": 1')]


def test_an_answer_in_a_form_that_was_asked_for_is_no_call(model: Loaded) -> None:
    says = json.dumps({"name": OSLO[0], "arguments": OSLO[1]})
    reader = Reader(model, tools=TOOLS, is_formatted=True)
    assert reader.feed(map(Token, says.encode()), "stop") == [Text(says)]


def test_an_answer_without_tools_is_never_held_back(model: Loaded) -> None:
    assert Reader(model).feed(map(Token, b'{"name": "weather"')) == [Text('{"name": "weather"')]


def test_too_many_names_are_not_looked_for(model: Loaded) -> None:
    tools = [Tool(f"{number:0200d}", None, None) for number in range(1000)]
    assert Reader(model, tools=tools).feed(map(Token, b'{"name"')) == [Text('{"name"')]


def test_only_one_call_without_marks_is_made_where_calls_may_not_be_parallel(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS, is_parallel=False)
    events = reader.feed(map(Token, b'weather(city="Oslo")\nclock()'), "stop")
    assert (_calls(events), reader.reason) == ([OSLO], "tool_calls")


@pytest.mark.parametrize(
    "text", ["{" * 100_000, "[" * 100_000, "-" * 100_000, "weather(" * 50_000, '{"name":' * 50_000]
)
def test_no_text_is_too_deep(text: str) -> None:
    assert unmarked(text, TOOLS) == []
