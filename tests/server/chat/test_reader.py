"""Tokens become text, reasoning, tool calls and log probabilities, wherever the model or a stop cuts them."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import make_text_state_machine
from mlx_overlay_server.chat.events import Event, FinishReason, Logprobs, Reasoning, Text, TokenLogprob, ToolCall
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader, StopStrings, Token

from tests.server.chat.answers import LONGEST, SCRIPT, TOOLS, cut
from tests.support.tokens import SPECIAL, THINK, step_tokens, vocabulary

# Stop strings ---------------------------------------------------------------------------------------------------


# Few letters, so that stops are found, overlap, and begin without going on.
_letters = st.text("ab€", max_size=30)
_stops = st.lists(st.text("ab€", min_size=1, max_size=5), max_size=4)


def _first_end(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Where the stop that completes first begins and ends, as a person would look for it: character by character."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins), end
    return None


@given(pieces=st.lists(_letters, max_size=12), stops=_stops)
def test_an_answer_ends_where_the_stop_that_completes_first_begins(pieces: list[str], stops: list[str]) -> None:
    text, found = "".join(pieces), _first_end("".join(pieces), stops)
    cutter = StopStrings(stops)

    given_out = "".join(cutter.feed(piece) for piece in pieces) + cutter.finish()

    assert given_out == (text if found is None else text[: found[0]])
    assert cutter.found == (None if found is None else text[found[0] : found[1]])


@given(text=_letters, stops=_stops)
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stops: list[str]) -> None:
    cutter = StopStrings(stops)
    given_out = "".join(map(cutter.feed, text))
    held = "" if cutter.found else text[len(given_out) :]
    assert not held or any(stop.startswith(held) for stop in stops)


def test_after_a_stop_nothing_is_given_out() -> None:
    cutter = StopStrings(["END"])
    assert [cutter.feed("on EN"), cutter.feed("D and on"), cutter.feed("more"), cutter.finish()] == ["on ", "", "", ""]


# Reading answers ------------------------------------------------------------------------------------------------


REASONING = "Hm, ünits?\n\nYes."
TEXT = "It is 5 €.\nDone. nonsense !"
CALLS = [("find", {"ä": "</think> <b>"})]


class Answer(NamedTuple):
    """Events, put together as a client puts them together."""

    reasoning: str
    text: str
    calls: list[tuple[str, Any]]
    reason: FinishReason | None


def _answer(reader: Reader, events: Iterable[Event]) -> Answer:
    events = list(events)
    return Answer(
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        "".join(event.text for event in events if isinstance(event, Text)),
        [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ToolCall)],
        reader.reason,
    )


@pytest.fixture(scope="module")
def ids(pieces: list[bytes]) -> dict[bytes, int]:
    """The token of each piece, and of the thinking tags as a whole."""
    added = (*SPECIAL, *THINK)
    vocab = vocabulary(pieces, added)
    tokens = [vocab[token] for token in step_tokens(pieces, added)]
    return dict(zip(pieces, tokens, strict=True)) | {tag.encode(): vocab[tag] for tag in THINK}


_places = st.sets(st.integers(1, len(SCRIPT.encode()) - 1))
_turns = st.sets(st.integers(1, len(SCRIPT.encode()) - 1), max_size=20)


def _read(
    reader: Reader, tokens: Sequence[int], finish: FinishReason | None = "stop", turns: Iterable[int] = ()
) -> list[Event]:
    """Feed tokens, in one turn or cut into several."""
    ends = sorted({0, len(tokens), *(turn for turn in turns if turn < len(tokens))})
    events: list[Event] = []
    for start, stop in itertools.pairwise(ends):
        events += reader.feed([Token(each) for each in tokens[start:stop]], finish if stop == len(tokens) else None)
    return events


@given(places=_places, turns=_turns)
def test_what_is_reasoning_text_or_call_does_not_depend_on_how_it_comes(
    places: set[int], turns: set[int], model: Loaded, ids: dict[bytes, int]
) -> None:
    reader = Reader(model, tools=TOOLS)
    tokens = [ids[piece] for piece in cut(SCRIPT.encode(), places)]
    assert _answer(reader, _read(reader, tokens, turns=turns)) == Answer(REASONING, TEXT, CALLS, "tool_calls")
    assert reader.tokens == len(tokens)


@given(places=_places, stop=st.text("nits?Ye€. \n{}", min_size=1, max_size=4), size=st.integers(1, len(SCRIPT)))
def test_an_answer_cut_anywhere_reads_the_same_however_it_comes(
    places: set[int], stop: str, size: int, model: Loaded, ids: dict[bytes, int]
) -> None:
    part = SCRIPT[:size]
    data = part.encode()

    def read(cuts: Iterable[int]) -> tuple[Answer, str | None]:
        reader = Reader(model, tools=TOOLS, stop=[stop])
        answer = _answer(reader, _read(reader, [ids[piece] for piece in cut(data, cuts)], "length"))
        return answer, reader.stop_sequence

    byte_by_byte = read(range(len(data)))
    assert read(places) == byte_by_byte
    assert byte_by_byte[1] == (stop if stop in part else None)


@given(size=st.integers(1, len(SCRIPT)))
def test_an_answer_cut_by_length_loses_nothing_but_the_call_it_was_cut_in(
    size: int, model: Loaded, ids: dict[bytes, int]
) -> None:
    part = SCRIPT[:size]
    reader = Reader(model, tools=TOOLS)
    events = _read(reader, [ids[piece] for piece in cut(part.encode(), ())], "length")

    said = "".join(
        event.text if isinstance(event, Text | Reasoning) else f"{event.name}{json.loads(event.arguments)}"
        for event in events
        if isinstance(event, Text | Reasoning | ToolCall)
    )
    in_calls = SCRIPT[SCRIPT.index("<tool_call>") : SCRIPT.index("</tool_call>") + len("</tool_call>")]
    written = part.replace(in_calls, f"find{CALLS[0][1]}").replace("<think>", "").replace("</think>", "", 1)
    written = re.sub(r"<tool_call>(?!.*</tool_call>).*", "", written, flags=re.DOTALL)
    written = re.sub(r"</?tool_call>|<(?:/?t[a-z_]*|/)$", "", written)
    assert "".join(said.split()) == "".join(written.split())
    assert reader.reason == "length"


@pytest.mark.parametrize(
    ("written", "is_reasoning", "expected"),
    [
        ("Hm", True, ("Hm", "")),
        ("\n\nHm\n</think>\n\nYes", True, ("Hm", "Yes")),
        ("<think>\n\n</think>\n\nYes", False, ("", "Yes")),
        ("<think>Hm\n\nHm</think>Yes\n", False, ("Hm\n\nHm", "Yes\n")),
        ("  Yes", False, ("", "  Yes")),
        ("Yes.\n\n<think>Hm</think> No.", False, ("Hm", "Yes.\n\nNo.")),
    ],
)
def test_white_space_around_marks_is_the_template_s_and_all_other_is_the_model_s(
    written: str, is_reasoning: bool, expected: tuple[str, str], model: Loaded
) -> None:
    reader = Reader(model, is_reasoning=is_reasoning)
    answer = _answer(reader, _read(reader, list(written.encode())))
    assert answer == Answer(*expected, [], "stop")


def test_the_model_s_own_marks_are_plain_text_in_a_plain_completion(model: Loaded) -> None:
    reader = Reader(model, has_marks=False)
    assert _answer(reader, _read(reader, list(SCRIPT.encode()))) == Answer("", SCRIPT, [], "stop")


@pytest.mark.parametrize(
    "written",
    [
        "<tool_call>{</tool_call>",
        "<tool_call>[1, 2]</tool_call>",
        '<tool_call>{"name": "lose"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "find", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "find", "arguments": "no JSON"}</tool_call>',
        "<tool_call></tool_call>",
    ],
)
def test_a_call_that_cannot_be_parsed_is_given_as_text(written: str, model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    answer = _answer(reader, _read(reader, list(f"Well. {written} So.".encode())))
    inside = written.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert answer == Answer("", f"Well. {inside} So." if inside else "Well. So.", [], "stop")


def test_calls_are_text_where_no_tools_were_given(model: Loaded) -> None:
    reader = Reader(model)
    written = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'
    assert _answer(reader, _read(reader, list(written.encode()))) == Answer("", written, [], "stop")


@pytest.mark.parametrize("finish", ["length", "stop_sequence"])
def test_a_call_cut_short_is_left_out(finish: FinishReason, model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    written = 'Well. <tool_call>{"name": "find", "arguments": {}}</tool'
    assert _answer(reader, _read(reader, list(written.encode()), finish)) == Answer("", "Well. ", [], finish)


def test_a_call_that_the_end_of_the_turn_closes_is_a_call(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    written = '<tool_call>{"name": "find", "arguments": "{\\"a\\": 1}"}'
    assert _answer(reader, _read(reader, list(written.encode()))) == Answer("", "", [("find", {"a": 1})], "tool_calls")


def test_an_unparseable_call_that_the_end_of_the_turn_closes_is_given_without_its_mark(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    answer = _answer(reader, _read(reader, list(b"Well. <tool_call>{")))
    assert answer == Answer("", "Well. {", [], "stop")


def test_without_parallel_calls_the_answer_ends_with_the_first(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS, is_parallel=False)
    one = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'
    answer = _answer(reader, _read(reader, list(f"{one}{one} more".encode())))
    assert answer == Answer("", "", [("find", {})], "tool_calls")
    assert reader.tokens == len(one)


def test_calls_of_one_answer_have_ids_of_their_own(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    one = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'
    events = _read(reader, list(f"{one}\n{one}".encode()))
    ids = [event.id for event in events if isinstance(event, ToolCall)]
    assert len(set(ids)) == 2


def test_a_stop_string_in_a_call_or_in_reasoning_ends_the_answer(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS, stop=["units"])
    answer = _answer(reader, _read(reader, list(b"<think>Hm, units?</think>Yes")))
    assert (answer, reader.stop_sequence) == (Answer("Hm, ", "", [], "stop_sequence"), "units")


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_what_only_begins_as_a_stop_string_is_given_out_at_the_end(finish: FinishReason, model: Loaded) -> None:
    reader = Reader(model, stop=["END", "THE LAST"], tools=TOOLS)
    events = reader.feed([Token(each, TokenLogprob("", bytes([each]), -1.0)) for each in b"This is THE"])
    assert _answer(reader, events).text == "This is "
    events += reader.feed([], finish)
    assert _answer(reader, events) == Answer("", "This is THE", [], finish)
    assert _data(events) == b"This is THE", "log probabilities of what was held back"


def test_a_turn_gives_one_event_of_a_kind(model: Loaded) -> None:
    reader = Reader(model)
    assert _read(reader, list(b"<think>Hm, well</think>It is so.")) == [Reasoning("Hm, well"), Text("It is so.")]


def test_reasoning_tokens_are_counted(model: Loaded, ids: dict[bytes, int]) -> None:
    reader = Reader(model, is_reasoning=True)
    _read(reader, [*b"ab", ids[b"</think>"], *b"c"])
    assert (reader.tokens, reader.reasoning_tokens) == (4, 3)


# Log probabilities ----------------------------------------------------------------------------------------------


def _weighed(pieces: Iterable[bytes], ids: dict[bytes, int]) -> list[Token]:
    return [Token(ids[piece], TokenLogprob("", piece, -1.0)) for piece in pieces]


def _data(events: Iterable[Event]) -> bytes:
    return b"".join(token.data for event in events if isinstance(event, Logprobs) for token in event.tokens)


@given(places=_places, stop=st.text("nits?Ye€. \n{}", min_size=1, max_size=6))
def test_log_probabilities_come_with_their_text_and_not_before(
    places: set[int], stop: str, model: Loaded, ids: dict[bytes, int]
) -> None:
    reader = Reader(model, stop=[stop], has_marks=False)
    events: list[Event] = []
    for token in _weighed(cut(SCRIPT.encode(), places), ids):
        events += reader.feed([token])
        text = "".join(event.text for event in events if isinstance(event, Text)).encode()
        assert text.startswith(_data(events))
    events += reader.feed([], "stop")
    text = "".join(event.text for event in events if isinstance(event, Text)).encode()
    if reader.stop_sequence is None:
        assert _data(events) == SCRIPT.encode()
    else:  # a token that is part text, part stop string is left out, and one before whose last character it ends
        assert len(text) - 2 * LONGEST < len(_data(events)) <= len(text)


# Formats whose answers begin with whom they are spoken to -------------------------------------------------------


@pytest.fixture(scope="module")
def addressing(model: Loaded) -> Loaded:
    """A model whose format is Muse Spark's (mlx_lm/chat_templates/muse_spark.py)."""
    transitions = {
        "header": [("to=self<|message|>", "reasoning"), ("to=user<|message|>", "normal")],
        "reasoning": [("<|eom|>", "header")],
        "normal": [("<|eom|>", "header"), ("<|eot|>", "normal")],
    }
    tokenizer = copy.copy(model.tokenizer)
    tokenizer._response_format = {"initial_state": "header", "transitions": transitions}  # type: ignore[attr-defined]
    return replace(model, tokenizer=tokenizer, marks=make_text_state_machine(tokenizer))


def test_whom_a_text_is_spoken_to_is_not_part_of_it(addressing: Loaded) -> None:
    said = b" to=self<|message|>I think.<|eom|><|start|>assistant to=user<|message|>Hello.<|eot|>"
    assert _read(Reader(addressing), list(said)) == [Reasoning("I think."), Text("Hello.")]


def test_an_answer_without_any_header_is_said_all_the_same(addressing: Loaded) -> None:
    assert _read(Reader(addressing), list(b'{"a": 1}')) == [Text('{"a": 1}')]
