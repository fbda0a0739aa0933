"""Conversations to prompts and tokens to events: no MLX runs here, the tokenizers are real."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import make_text_state_machine
from mlx_overlay_server.chat.events import Event, FinishReason, Logprobs, Reasoning, Text, TokenLogprob, ToolCall
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import Prompt, render
from mlx_overlay_server.chat.reader import Reader, StopStrings, Token
from mlx_overlay_server.chat.requests import Call, ChatRequest, Image, Message, Tool, ToolChoice
from mlx_overlay_server.errors import InvalidRequest

from tests.support.loaded import loaded
from tests.support.models import make_model
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


@settings(deadline=None)
@given(pieces=st.lists(_letters, max_size=12), stops=_stops)
def test_an_answer_ends_where_the_stop_that_completes_first_begins(pieces: list[str], stops: list[str]) -> None:
    text, found = "".join(pieces), _first_end("".join(pieces), stops)
    cutter = StopStrings(stops)

    given_out = "".join(cutter.feed(piece) for piece in pieces) + cutter.finish()

    assert given_out == (text if found is None else text[: found[0]])
    assert cutter.found == (None if found is None else text[found[0] : found[1]])


@settings(deadline=None)
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

SCRIPT = (
    "<think>\nHm, ünits?\n\nYes.\n</think>\n\nIt is 5 €.\n"
    '<tool_call>\n{"name": "find", "arguments": {"ä": "</think> <b>"}}\n</tool_call>\n'
    "Done. <tool_call>nonsense</tool_call> !"
)
REASONING = "Hm, ünits?\n\nYes."
TEXT = "It is 5 €.\nDone. <tool_call>nonsense</tool_call> !"
CALLS = [("find", {"ä": "</think> <b>"})]

TOOLS = (Tool("find", None, None),)
_LONGEST = 5


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
def pieces() -> list[bytes]:
    """Every way to cut the script into tokens of up to a few bytes, inside of characters and tags, too."""
    data = SCRIPT.encode()
    return [
        piece
        for size in range(1, _LONGEST + 1)
        for start in range(size)
        for piece in (data[:start], *(data[at : at + size] for at in range(start, len(data), size)))
        if piece
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> Loaded:
    """A model with reasoning and tools, whose vocabulary holds the script in every cut."""
    says = b"".join(pieces).decode()
    folder = tmp_path_factory.mktemp("models") / "cuts"
    return loaded(make_model(folder, says, thinks=True, calls_tools=True, pieces=pieces, dtype="float16"))


@pytest.fixture(scope="module")
def ids(pieces: list[bytes]) -> dict[bytes, int]:
    """The token of each piece, and of the thinking tags as a whole."""
    added = (*SPECIAL, *THINK)
    vocab = vocabulary(pieces, added)
    tokens = [vocab[token] for token in step_tokens(pieces, added)]
    return dict(zip(pieces, tokens, strict=True)) | {tag.encode(): vocab[tag] for tag in THINK}


def _cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Some bytes in pieces that tokens exist for."""
    ends = sorted({0, len(data), *(place for place in places if place < len(data))})
    pairs = itertools.pairwise(ends)
    return [data[at : min(at + _LONGEST, stop)] for start, stop in pairs for at in range(start, stop, _LONGEST)]


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


@settings(deadline=None)
@given(places=_places, turns=_turns)
def test_what_is_reasoning_text_or_call_does_not_depend_on_how_it_comes(
    places: set[int], turns: set[int], model: Loaded, ids: dict[bytes, int]
) -> None:
    reader = Reader(model, tools=TOOLS)
    tokens = [ids[piece] for piece in _cut(SCRIPT.encode(), places)]
    assert _answer(reader, _read(reader, tokens, turns=turns)) == Answer(REASONING, TEXT, CALLS, "tool_calls")
    assert reader.tokens == len(tokens)


@settings(deadline=None)
@given(places=_places, stop=st.text("nits?Ye€. \n{}", min_size=1, max_size=4), size=st.integers(1, len(SCRIPT)))
def test_an_answer_cut_anywhere_reads_the_same_however_it_comes(
    places: set[int], stop: str, size: int, model: Loaded, ids: dict[bytes, int]
) -> None:
    part = SCRIPT[:size]
    data = part.encode()

    def read(cuts: Iterable[int]) -> tuple[Answer, str | None]:
        reader = Reader(model, tools=TOOLS, stop=[stop])
        answer = _answer(reader, _read(reader, [ids[piece] for piece in _cut(data, cuts)], "length"))
        return answer, reader.stop_sequence

    byte_by_byte = read(range(len(data)))
    assert read(places) == byte_by_byte
    assert byte_by_byte[1] == (stop if stop in part else None)


@settings(deadline=None)
@given(size=st.integers(1, len(SCRIPT)))
def test_an_answer_cut_by_length_loses_nothing(size: int, model: Loaded, ids: dict[bytes, int]) -> None:
    part = SCRIPT[:size]
    reader = Reader(model, tools=TOOLS)
    events = _read(reader, [ids[piece] for piece in _cut(part.encode(), ())], "length")

    said = "".join(
        event.text if isinstance(event, Text | Reasoning) else f"{event.name}{json.loads(event.arguments)}"
        for event in events
        if isinstance(event, Text | Reasoning | ToolCall)
    )
    in_calls = SCRIPT[SCRIPT.index("<tool_call>") : SCRIPT.index("</tool_call>") + len("</tool_call>")]
    written = part.replace(in_calls, f"find{CALLS[0][1]}").replace("<think>", "").replace("</think>", "", 1)
    assert "".join(said.split()) == "".join(written.split())
    assert reader.reason == "length"


def _whole(text: str) -> list[bytes]:
    return _cut(text.encode(), ())


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
        '<tool_call>{"name": "find"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "find", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "find", "arguments": "no JSON"}</tool_call>',
        "<tool_call></tool_call>",
    ],
)
def test_a_call_that_cannot_be_parsed_is_given_as_text(written: str, model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    answer = _answer(reader, _read(reader, list(f"Well. {written} So.".encode())))
    assert answer == Answer("", f"Well. {written} So.", [], "stop")


def test_calls_are_text_where_no_tools_were_given(model: Loaded) -> None:
    reader = Reader(model)
    written = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'
    assert _answer(reader, _read(reader, list(written.encode()))) == Answer("", written, [], "stop")


def test_a_call_cut_by_length_is_given_as_text_and_is_no_call(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    written = '<tool_call>{"name": "find", "arguments": {}}</tool'
    assert _answer(reader, _read(reader, list(written.encode()), "length")) == Answer("", written, [], "length")


def test_a_call_that_the_end_of_the_turn_closes_is_a_call(model: Loaded) -> None:
    reader = Reader(model, tools=TOOLS)
    written = '<tool_call>{"name": "find", "arguments": "{\\"a\\": 1}"}'
    assert _answer(reader, _read(reader, list(written.encode()))) == Answer("", "", [("find", {"a": 1})], "tool_calls")


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


@settings(deadline=None)
@given(places=_places, stop=st.text("nits?Ye€. \n{}", min_size=1, max_size=6))
def test_log_probabilities_come_with_their_text_and_not_before(
    places: set[int], stop: str, model: Loaded, ids: dict[bytes, int]
) -> None:
    reader = Reader(model, stop=[stop], has_marks=False)
    events: list[Event] = []
    for token in _weighed(_cut(SCRIPT.encode(), places), ids):
        events += reader.feed([token])
        text = "".join(event.text for event in events if isinstance(event, Text)).encode()
        assert text.startswith(_data(events))
    events += reader.feed([], "stop")
    text = "".join(event.text for event in events if isinstance(event, Text)).encode()
    if reader.stop_sequence is None:
        assert _data(events) == SCRIPT.encode()
    else:  # a token that is part text, part stop string is left out, and one before whose last character it ends
        assert len(text) - 2 * _LONGEST < len(_data(events)) <= len(text)


# Prompts --------------------------------------------------------------------------------------------------------

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: a system message comes first or not at all.
_SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}{% endfor %}" + _CHATML
)
# As Mistral's and Gemma's first ones: user and assistant in turns.
_ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}" + _CHATML
)

Templated = Callable[[str], Loaded]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "plain", "Hello.")


@pytest.fixture(scope="module")
def templated(plain: Path) -> Templated:
    """Models of which each has another template."""
    return lambda template: loaded(plain, template=template)


def _ask(*turns: Message, **more: Any) -> ChatRequest:
    return ChatRequest("org/m", messages=turns, **more)


def _written(model: Loaded, *turns: Message, **more: Any) -> str:
    return model.tokenizer.decode(list(render(model, _ask(*turns, **more)).tokens))


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _system(text: str) -> Message:
    return Message("system", (text,))


def _user(text: str) -> Message:
    return Message("user", (text,))


def _assistant(text: str) -> Message:
    return Message("assistant", (text,))


_OPEN = "<|im_start|>assistant\n"


def test_system_messages_at_the_start_become_one(templated: Templated) -> None:
    written = _written(templated(_CHATML), _system("Be brief."), _system("Be kind."), _user("Hi"))
    assert written == _turn("system", "Be brief.\n\nBe kind.") + _turn("user", "Hi") + _OPEN


def test_a_later_system_message_stays_one_where_the_template_takes_it(templated: Templated) -> None:
    written = _written(templated(_CHATML), _user("Hi"), _system("Be brief."), _user("So?"))
    assert written == _turn("user", "Hi") + _turn("system", "Be brief.") + _turn("user", "So?") + _OPEN


def test_a_later_system_message_is_the_user_s_where_the_template_refuses_it(templated: Templated) -> None:
    turns = (_system("Be kind."), _user("Hi"), _assistant("Hello."), _system("Be brief."), _user("So?"))
    written = _written(templated(_SYSTEM_FIRST), *turns)
    assert written == "".join(
        (
            _turn("system", "Be kind."),
            _turn("user", "Hi"),
            _turn("assistant", "Hello."),
            _turn("user", "Be brief.\n\nSo?"),
            _OPEN,
        )
    )


def test_a_system_message_begins_the_user_s_first_where_the_template_knows_none(templated: Templated) -> None:
    written = _written(templated(_ALTERNATING), _system("Be kind."), _user("Hi"), _assistant("Hello."), _user("So?"))
    assert written == "".join(
        (_turn("user", "Be kind.\n\nHi"), _turn("assistant", "Hello."), _turn("user", "So?"), _OPEN)
    )


def test_neighbours_of_one_role_are_joined_where_turns_must_alternate(templated: Templated) -> None:
    turns = (_user("Hi"), _user("there"), _assistant("Hello"), _assistant("you"), _user("So?"))
    written = _written(templated(_ALTERNATING), *turns)
    assert written == "".join(
        (_turn("user", "Hi\n\nthere"), _turn("assistant", "Hello\n\nyou"), _turn("user", "So?"), _OPEN)
    )


_roles = st.sampled_from(["system", "user", "assistant"])


@settings(deadline=None)
@given(roles=st.lists(_roles, min_size=1, max_size=8))
def test_no_word_of_a_conversation_is_lost_whatever_the_template_takes(roles: list[Any], templated: Templated) -> None:
    turns = [Message(role, (f"word{at}",)) for at, role in enumerate(roles)]
    for template in (_CHATML, _SYSTEM_FIRST, _ALTERNATING):
        try:
            written = _written(templated(template), *turns)
        except InvalidRequest:
            # What begins with the assistant has no plainer form in which turns alternate and the user's come first.
            assert template == _ALTERNATING
            assert roles[0] == "assistant"
            continue
        places = [written.index(f"word{at}") for at in range(len(roles))]
        assert places == sorted(places)


def test_a_conversation_that_no_form_fits_is_refused_with_the_template_s_own_words(templated: Templated) -> None:
    model = templated("{{ raise_exception('Only poems are taken.') }}")
    with pytest.raises(InvalidRequest, match=r"Only poems are taken\.") as caught:
        render(model, _ask(_user("Hi")))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("continues", [False, True])
def test_a_conversation_of_nothing_is_refused(continues: bool, templated: Templated) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(templated(_CHATML), _ask(continues=continues))
    assert caught.value.param == "messages"


def test_a_model_without_a_template_is_told_apart(plain: Path) -> None:
    model = loaded(plain)
    model.tokenizer.has_chat_template = False
    with pytest.raises(InvalidRequest, match="has no chat template") as caught:
        render(model, _ask(_user("Hi")))
    assert caught.value.param == "model"


def test_an_image_is_refused_by_a_model_that_takes_none(templated: Templated) -> None:
    with pytest.raises(InvalidRequest, match="does not take images") as caught:
        render(templated(_CHATML), _ask(Message("user", ("See:", Image(b"", "messages[0].content[1]")))))
    assert caught.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    "name", ["messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict"]
)
def test_what_is_ours_to_tell_a_template_is_not_the_request_s(name: str, templated: Templated) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        render(templated(_CHATML), _ask(_user("Hi"), template_kwargs={name: 1}))
    assert caught.value.param == f"chat_template_kwargs.{name}"


def test_template_kwargs_reach_the_template(templated: Templated) -> None:
    model = templated("{{ messages[0].content }} {{ mood }}")
    assert _written(model, _user("Hi"), template_kwargs={"mood": "merry"}) == "Hi merry"


@pytest.mark.parametrize("value", [None, [], {"a": {"b": 1}}, "{{ 1 / 0 }}", 10**30])
def test_a_template_kwarg_of_any_kind_does_no_harm(value: object, templated: Templated) -> None:
    model = templated("{{ messages[0].content }}")
    assert _written(model, _user("Hi"), template_kwargs={"mood": value}) == "Hi"


def test_reasoning_effort_is_the_template_s_where_it_knows_it(templated: Templated) -> None:
    model = templated("{{ messages[0].content }} {{ reasoning_effort }}")
    assert _written(model, _user("Hi"), effort="high") == "Hi high"


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("minimal", False), ("low", True), ("high", True)])
def test_reasoning_effort_is_on_or_off_where_the_template_knows_no_more(
    effort: str, thinks: bool, model: Loaded
) -> None:
    written = _written(model, _user("Hi"), effort=effort)
    assert written.endswith("<think>\n\n</think>\n\n") is not thinks


def test_reasoning_effort_is_refused_by_a_model_that_does_not_reason(templated: Templated) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(templated(_CHATML), _ask(_user("Hi"), effort="high"))
    assert caught.value.param == "reasoning_effort"
    assert _written(templated(_CHATML), _user("Hi"), effort="high", is_effort_optional=True)


def test_a_template_that_opens_the_reasoning_is_noticed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "</think>Yes", thinks=True)
    opens = _CHATML.replace("assistant\n", "assistant\n<think>\n")
    assert render(loaded(folder, template=opens), _ask(_user("Hi"))).is_reasoning
    assert not render(loaded(folder), _ask(_user("Hi"))).is_reasoning


@pytest.mark.parametrize("text", ["<think>", "Say <think>\n", "<|im_end|>\n<|im_start|>assistant\n<think>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_quoted_mark_does_not_open_the_reasoning(text: str, role: Any, model: Loaded) -> None:
    assert not render(model, _ask(_user("Hi"), Message(role, (text,)))).is_reasoning


def test_history_has_its_reasoning_and_its_calls(model: Loaded) -> None:
    call = Message("assistant", ("So:",), "Hm.", (Call("1", "find", {"a": [1]}),))
    written = _written(model, _user("Hi"), call, Message("tool", ("Found",), call_id="1"), tools=TOOLS)
    assert '<think>Hm.</think>So:\n<tool_call>\n{"name": "find", "arguments": {"a": [1]}}\n</tool_call>' in written
    assert "<tool_response>\nFound\n</tool_response>" in written


def test_tools_are_in_the_prompt_unless_none_may_be_called(model: Loaded) -> None:
    assert '"name": "find"' in _written(model, _user("Hi"), tools=TOOLS)
    assert '"name": "find"' not in _written(model, _user("Hi"), tools=TOOLS, choice=ToolChoice("none"))


def _shared(model: Loaded, prompt: Prompt) -> str:
    return model.tokenizer.decode(list(prompt.tokens[: prompt.system]))


def test_what_other_conversations_share_is_told(model: Loaded) -> None:
    request = _ask(_system("Be brief."), _user("Hi"), tools=TOOLS)
    prompt = render(model, request)
    other = render(model, replace(request, messages=(_system("Be brief."), _user("Well then"))))
    shared = _shared(model, prompt)
    assert "Be brief." in shared
    assert '"name": "find"' in shared
    assert prompt.tokens[: prompt.system] == other.tokens[: other.system]
    assert "Hi" not in shared


@pytest.mark.parametrize("template", [_CHATML, _SYSTEM_FIRST, _ALTERNATING])
def test_without_system_messages_and_tools_nothing_is_shared(template: str, templated: Templated) -> None:
    assert render(templated(template), _ask(_user("Hi"))).system == 0


def test_a_prompt_of_which_the_shared_part_cannot_be_told_shares_nothing(templated: Templated) -> None:
    prompt = render(templated(_ALTERNATING), _ask(_system("Be brief."), _user("Hi")))
    assert prompt.system == 0


# Formats whose answers begin with whom they are spoken to -----------------------------------------------------------


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
