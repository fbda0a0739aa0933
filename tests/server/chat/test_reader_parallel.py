"""`parallel_tool_calls: false` holds for what one block says, too: some formats write several calls into it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from mlx_overlay_server.chat.events import Event, Text, ToolCall
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader, Token
from mlx_overlay_server.chat.requests import Tool

from tests.support.loaded import loaded
from tests.support.models import make_model

_TOOLS = (Tool("find", None, None), Tool("open", None, None))
_TWO = json.dumps([{"name": "find", "arguments": {"a": 1}}, {"name": "open", "arguments": {}}])
_BLOCK = f"<tool_call>{_TWO}</tool_call>"


def _parse(text: str, _tools: Any) -> Any:
    return json.loads(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model whose parser finds several calls in one block, as those of Mistral's and Llama 4's formats do."""
    made = loaded(make_model(tmp_path_factory.mktemp("models") / "m", "Hello.", thinks=True, calls_tools=True))
    tokenizer: Any = copy.copy(made.tokenizer)
    tokenizer._tool_parser = _parse
    return replace(made, tokenizer=tokenizer)


def _calls(events: Sequence[Event]) -> list[str]:
    return [event.name for event in events if isinstance(event, ToolCall)]


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "ended by the turn"])
@pytest.mark.parametrize(("is_parallel", "names"), [(True, ["find", "open"]), (False, ["find"])])
def test_a_block_of_several_calls_gives_one_where_parallel_calls_are_off(
    is_parallel: bool, names: list[str], is_closed: bool, model: Loaded
) -> None:
    reader = Reader(model, tools=_TOOLS, is_parallel=is_parallel)
    written = _BLOCK if is_closed else _BLOCK.removesuffix("</tool_call>")
    events = reader.feed(map(Token, written.encode()), "stop")
    assert (_calls(events), reader.reason) == (names, "tool_calls")


def test_after_the_one_call_nothing_is_said(model: Loaded) -> None:
    reader = Reader(model, tools=_TOOLS, is_parallel=False)
    events = reader.feed(map(Token, f"{_BLOCK} and {_BLOCK}".encode()), "length")
    assert _calls(events) == ["find"]
    assert not [event for event in events if isinstance(event, Text)]
    assert reader.reason == "tool_calls"
    assert reader.feed(map(Token, b"more"), "stop") == []


def test_a_forced_call_of_several_gives_one_where_parallel_calls_are_off(model: Loaded) -> None:
    reader = Reader(model, tools=_TOOLS, is_parallel=False, is_call=True)
    assert _calls(reader.feed(map(Token, _TWO.encode()), "stop")) == ["find"]


def test_one_bad_call_makes_the_whole_block_text(model: Loaded) -> None:
    """Nothing the model writes is lost, and nothing is called that it did not mean."""
    block = '<tool_call>[{"name": "find", "arguments": {}}, {"name": 3}]</tool_call>'
    events = Reader(model, tools=_TOOLS).feed(map(Token, block.encode()), "stop")
    assert events == [Text(block.removeprefix("<tool_call>").removesuffix("</tool_call>"))]
