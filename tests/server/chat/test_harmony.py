"""Answers of gpt-oss are read by their headers: reasoning, text before a call, calls, and the answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from mlx_lm.generate import make_text_state_machine
from mlx_overlay_server.chat import harmony
from mlx_overlay_server.chat.events import FinishReason, Reasoning, Text, ToolCall
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader, Token
from mlx_overlay_server.chat.requests import Tool
from mlx_overlay_server.engine import mlx_tokenizers

from tests.server.chat.call_shapes import OSLO, THREE, TOOLS

ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|>"
NEXT = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>Yes."
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}'

NEARLY = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{'city': 'Oslo', 'days': 3,}"

SHAPES = [
    (FINAL, "", "Yes.", []),
    (f"{ANALYSIS}{NEXT}{FINAL}", "Hm.", "Yes.", []),
    (f"{ANALYSIS}{NEXT}<|channel|>analysis<|message|>So.<|end|>{NEXT}{FINAL}", "Hm.So.", "Yes.", []),
    (f"{ANALYSIS}{NEXT}{CALL}", "Hm.", "", [OSLO]),
    (f"{ANALYSIS}{NEXT}<|channel|>commentary<|message|>I look.<|end|>{NEXT}{CALL}", "Hm.", "I look.", [OSLO]),
    (f"{CALL}<|call|>{NEXT}{CALL}", "", "", [OSLO, OSLO]),
    # The name in the role's place, no type, another type, the wrong channel, no prefix, nearly JSON.
    (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}', "", "", [OSLO]),
    ('<|channel|>commentary to=functions.weather<|message|>{"city": "Oslo"}', "", "", [OSLO]),
    ('<|channel|>commentary to=functions.weather code<|message|>{"city": "Oslo"}', "", "", [OSLO]),
    ('<|channel|>analysis to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}', "", "", [OSLO]),
    ('<|channel|>commentary to=weather <|constrain|>json<|message|>{"city": "Oslo"}', "", "", [OSLO]),
    (NEARLY, "", "", [THREE]),
    # No calls, and no form at all.
    ('<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{"a": 1}', "", 'functions.rm json{"a": 1}', []),
    ("<|channel|>final<|message|>Write to=functions.weather there.", "", "Write to=functions.weather there.", []),
    ('{"a": 1}', "", '{"a": 1}', []),
]  # fmt: skip


@pytest.fixture(scope="module")
def speaking(model: Loaded) -> Loaded:
    """A model whose vocabulary is one of Harmony's."""
    tokenizer = copy.deepcopy(model.tokenizer)
    known: set[str] = set(tokenizer.get_vocab())  # type: ignore[attr-defined]
    tokenizer.add_tokens(sorted(harmony.TOKENS - known), special_tokens=True)  # type: ignore[attr-defined]
    assert mlx_tokenizers.prepare_tokenizer(tokenizer)
    return replace(model, tokenizer=tokenizer, marks=make_text_state_machine(tokenizer))


def _read(model: Loaded, says: str, finish: FinishReason = "stop") -> tuple[str, str, list[tuple[str, object]]]:
    reader = Reader(model, tools=TOOLS)
    events = [event for byte in says.encode() for event in reader.feed([Token(byte)])] + reader.feed([], finish)
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    text = "".join(event.text for event in events if isinstance(event, Text))
    return reasoning, text, [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, ToolCall)]


@pytest.mark.parametrize(("says", "reasoning", "text", "calls"), SHAPES)
def test_an_answer_is_read_by_its_headers(
    says: str, reasoning: str, text: str, calls: list[tuple[str, object]], speaking: Loaded
) -> None:
    assert _read(speaking, says) == (reasoning, text, calls)
    for size in range(len(says)):
        begun, said, called = _read(speaking, says[:size], "length")
        assert not [mark for mark in harmony.TOKENS if mark in begun + said], says[:size]
        assert called == calls[: len(called)], says[:size]


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_json_that_a_grammar_enforces_has_no_header(tools: Sequence[Tool], speaking: Loaded) -> None:
    says = '{"url": "/mail?to=ann<b"}'
    reader = Reader(speaking, tools=tools, is_formatted=True)
    assert reader.feed(map(Token, says.encode()), "stop") == [Text(says)]


def test_text_that_goes_on_has_its_header_already(speaking: Loaded) -> None:
    assert Reader(speaking, continues_text=True).feed(map(Token, b" and so on")) == [Text(" and so on")]


def test_a_call_ends_the_turn(speaking: Loaded) -> None:
    ends = {speaking.tokenizer.convert_ids_to_tokens([each])[0] for each in speaking.tokenizer.eos_token_ids}
    assert set(harmony.ENDS) <= ends


def test_another_vocabulary_is_left_alone(model: Loaded) -> None:
    assert model.tokenizer.response_initial_state is None
