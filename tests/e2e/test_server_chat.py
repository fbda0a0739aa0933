"""Chat completions that OpenAI's SDK gets from a real server: text, usage, ends, roles, reasoning, probabilities."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionTokenLogprob

from tests.support.models import make_model, make_random_model
from tests.support.server import ChatAnswer, Server, joined, serving

PLAIN = "acme/plain"
HELLO = "Hello there, general Kenobi."
PIECES = ["One, tw", "o E", "ND thr", "ee ST", "OP four"]
EMOJI = "Hi 👋🌍 bye"
EMOJI_PIECES = [b"Hi \xf0\x9f", b"\x91\x8b\xf0", b"\x9f\x8c", b"\x8d b", b"ye"]
THINKS = "<think>Hm. Well.</think>Yes, of course."
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("chat")
    models = top / "models"
    make_model(models / "acme" / "plain", HELLO)
    make_model(models / "acme" / "once", HELLO)
    make_model(models / "acme" / "pieces", "".join(PIECES), pieces=PIECES)
    make_model(models / "acme" / "emoji", EMOJI, pieces=EMOJI_PIECES)
    make_model(models / "acme" / "thinks", THINKS, thinks=True)
    _open_thought(make_model(models / "acme" / "opened", THINKS, thinks=True))
    make_random_model(models / "acme" / "random")
    with serving(top / "home", models) as server:
        yield server


def _open_thought(model: Path) -> None:
    """Let the template begin the reasoning, as DeepSeek's does."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["chat_template"] += "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    path.write_text(json.dumps(config), "utf-8")


def _tokens(text: str) -> int:
    """How many tokens a prompt of these models has: its markers, and the bytes between."""
    return len(re.sub(r"<\|\w+\|>|</?think>", "x", text).encode())


def _prompt(*turns: tuple[str, str]) -> int:
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return _tokens(f"<|begin_of_text|>{written}<|im_start|>assistant\n")


# Text ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_exactly_what_the_model_says(server: Server) -> None:
    completion = server.chat(PLAIN, "hi")
    (choice,) = completion.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", HELLO)
    assert (choice.finish_reason, choice.logprobs, choice.message.tool_calls) == ("stop", None, None)
    assert (completion.object, completion.model) == ("chat.completion", PLAIN)
    assert completion.id.startswith("chatcmpl-")


def test_a_stream_is_the_same_answer_in_chunks_of_one_id(server: Server) -> None:
    chunks = server.chat_stream(PLAIN, "hi")
    assert joined(chunks) == [ChatAnswer(HELLO, finish="stop")]
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", PLAIN)}
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_comes_while_it_is_made(server: Server) -> None:
    with server.openai.chat.completions.create(
        model="acme/random", messages=[{"role": "user", "content": "hi"}], max_tokens=2000, stream=True
    ) as chunks:
        first = next(text for chunk in chunks if (text := chunk.choices[0].delta.content))
    assert len(first.split()) < 1000


def test_a_stream_ends_with_done_on_the_wire(server: Server) -> None:
    body = {"model": PLAIN, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")


# Usage ---------------------------------------------------------------------------------------------------------


def test_usage_counts_the_prompts_tokens_and_the_answers(server: Server) -> None:
    usage = server.chat(PLAIN, "hi").usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (22, 4, 26)
    assert usage.prompt_tokens == _prompt(("user", "hi"))
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.parametrize("answers", [1, 3])
def test_a_streams_usage_comes_last_in_a_chunk_without_choices(server: Server, answers: int) -> None:
    *chunks, last = server.chat_stream(PLAIN, "hi", n=answers, stream_options={"include_usage": True})
    assert (last.choices, last.object, last.id) == ([], "chat.completion.chunk", chunks[0].id)
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (22, 4 * answers)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)


def test_cached_tokens_say_what_was_read_before(server: Server) -> None:
    def cached(*messages: dict[str, str]) -> int | None:
        usage = server.chat("acme/once", messages).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    question, answer = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Well."}
    size = _prompt(("user", "What is it?"))
    assert [cached(question), cached(question), cached(question, answer, question)] == [0, size - 1, size]


# Ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_its_limit(server: Server, name: str, stream: bool) -> None:
    assert server.chat_answer(PLAIN, "hi", stream=stream, **{name: 2}) == ChatAnswer("Hello there,", finish="length")
    assert server.chat_answer(PLAIN, "hi", stream=stream, **{name: 5}) == ChatAnswer(HELLO, finish="stop")


def test_an_answer_ends_where_the_context_does(server: Server) -> None:
    question = "x" * (4095 - _prompt(("user", "")))
    (choice,) = server.chat("acme/random", question).choices
    assert choice.finish_reason == "length"
    assert len((choice.message.content or "").split()) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("END", "One, two "),  # cut by the tokens "o E" and "ND thr"
        ("two END three", "One, "),
        (["STOP", "END"], "One, two "),
        (["four", "nowhere"], "One, two END three STOP "),
        ("One", ""),
        (["One, two", "One"], ""),
        (" ", "One,"),
        ("four", "One, two END three STOP "),
    ],
)
def test_a_stop_string_never_leaks_and_ends_the_answer(
    server: Server, stop: str | list[str], text: str, stream: bool
) -> None:
    assert server.chat_answer("acme/pieces", "hi", stream=stream, stop=stop) == ChatAnswer(text, finish="stop")


@pytest.mark.parametrize("stream", [False, True])
def test_what_only_began_like_a_stop_string_is_said_in_the_end(server: Server, stream: bool) -> None:
    whole = "".join(PIECES)
    assert server.chat_answer("acme/pieces", "hi", stream=stream, stop="four more") == ChatAnswer(whole, finish="stop")
    cut = server.chat_answer("acme/pieces", "hi", stream=stream, stop="END of it", max_tokens=3)
    assert cut == ChatAnswer("One, two END thr", finish="length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"), [("👋", "Hi "), ("🌍", "Hi 👋"), (" b", "Hi 👋🌍"), ("👋🌍!", EMOJI), ("🌎", EMOJI)]
)
def test_stop_strings_are_found_among_characters_cut_by_tokens(
    server: Server, stop: str, text: str, stream: bool
) -> None:
    assert server.chat_answer("acme/emoji", "hi", stream=stream, stop=stop) == ChatAnswer(text, finish="stop")


@pytest.mark.parametrize("stream", [False, True])
def test_characters_cut_by_tokens_arrive_whole(server: Server, stream: bool) -> None:
    assert server.chat_answer("acme/emoji", "hi", stream=stream) == ChatAnswer(EMOJI, finish="stop")


def test_the_tokens_after_a_stop_string_are_not_counted(server: Server) -> None:
    usage = server.chat("acme/pieces", "hi", stop="END").usage
    assert usage is not None
    assert usage.completion_tokens == 3


# Roles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "size"),
    [
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], ("system", "Be brief.")),
        ([{"role": "developer", "content": "Be short"}, {"role": "user", "content": "hi"}], ("system", "Be short")),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind"}]},
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
            ],
            ("system", "Be kind"),
        ),
    ],
)
def test_system_and_developer_messages_and_text_parts_are_read(
    server: Server, messages: list[Any], size: tuple[str, str]
) -> None:
    completion = server.chat(PLAIN, messages)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == _prompt(size, ("user", "hi"))
    assert completion.choices[0].message.content == HELLO


def test_text_parts_are_the_text_they_make(server: Server) -> None:
    server.chat("acme/pieces", "Which one of these?")
    parts = [{"type": "text", "text": "Which one "}, {"type": "text", "text": "of these?"}]
    usage = server.chat("acme/pieces", [{"role": "user", "content": parts}]).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_conversations_turns_are_read_in_their_order(server: Server) -> None:
    turns = [("user", "a"), ("assistant", "bb"), ("user", "ccc")]
    usage = server.chat(PLAIN, [{"role": role, "content": content} for role, content in turns]).usage
    assert usage is not None
    assert usage.prompt_tokens == _prompt(*turns)


# Reasoning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["acme/thinks", "acme/opened"])
def test_reasoning_is_told_apart_from_the_answer(server: Server, model: str, stream: bool) -> None:
    answer = server.chat_answer(model, "hi", stream=stream)
    assert answer == ChatAnswer("Yes, of course.", "Hm. Well.", finish="stop")


def test_reasoning_streams_before_the_answer(server: Server) -> None:
    deltas = [chunk.choices[0].delta for chunk in server.chat_stream("acme/thinks", "hi")]
    reasoning = [at for at, delta in enumerate(deltas) if getattr(delta, "reasoning_content", None)]
    content = [at for at, delta in enumerate(deltas) if delta.content]
    assert max(reasoning) <= min(content)


def test_reasoning_cut_short_is_no_answer(server: Server) -> None:
    assert server.chat_answer("acme/opened", "hi", stream=False, max_tokens=1) == ChatAnswer("", "Hm.", finish="length")


def test_reasoning_tokens_are_counted_among_the_answers(server: Server) -> None:
    usage = server.chat("acme/thinks", "hi").usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    # <think>, Hm., Well., </think>, Yes,, of, course.
    assert (usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens) == (7, 3)


def test_reasoning_in_the_history_is_read(server: Server) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    expected = _prompt(("user", "hi"), ("assistant", "<think>So.</think>ho"), ("user", "?"))
    for name in ("reasoning_content", "reasoning"):
        turns[1] = {"role": "assistant", "content": "ho", name: "So."}
        usage = server.chat("acme/thinks", turns).usage
        assert usage is not None
        assert usage.prompt_tokens == expected


@pytest.mark.parametrize(
    ("options", "is_switched_off"),
    [
        ({}, False),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, False),
        ({"reasoning_effort": "none"}, True),
        ({"reasoning_effort": "minimal"}, True),
        ({"reasoning_effort": "low"}, False),
        ({"reasoning_effort": "high"}, False),
    ],
)
def test_thinking_is_switched_off_by_the_template(
    server: Server, options: dict[str, Any], is_switched_off: bool
) -> None:
    usage = server.chat("acme/thinks", "hi", **options).usage
    assert usage is not None
    assert usage.prompt_tokens == _prompt(("user", "hi")) + (_tokens(EMPTY_THOUGHT) if is_switched_off else 0)


# Several answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_numbered(server: Server, stream: bool) -> None:
    assert server.chat_answers(PLAIN, "hi", stream=stream, n=3) == [ChatAnswer(HELLO, finish="stop")] * 3


def test_a_prompt_counts_once_whatever_n_is(server: Server) -> None:
    completion = server.chat(PLAIN, "hi", n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (22, 12)


# Log probabilities ---------------------------------------------------------------------------------------------


def _logprobs(server: Server, model: str, *, stream: bool, **options: Any) -> list[ChatCompletionTokenLogprob]:
    if not stream:
        choice = server.chat(model, "hi", logprobs=True, **options).choices[0]
        assert choice.logprobs is not None
        return choice.logprobs.content or []
    chunks = server.chat_stream(model, "hi", logprobs=True, **options)
    told = [chunk.choices[0].logprobs for chunk in chunks]
    return [token for logprobs in told if logprobs is not None for token in logprobs.content or []]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "text", "count"), [(PLAIN, HELLO, 4), ("acme/emoji", EMOJI, 5)])
def test_every_token_has_its_log_probability(server: Server, model: str, text: str, count: int, stream: bool) -> None:
    tokens = _logprobs(server, model, stream=stream)
    assert len(tokens) == count
    assert b"".join(bytes(token.bytes or []) for token in tokens) == text.encode()
    assert [token.logprob for token in tokens] == [pytest.approx(0)] * count
    assert all(token.top_logprobs == [] for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_written_as_text(server: Server, stream: bool) -> None:
    assert [token.token for token in _logprobs(server, PLAIN, stream=stream)] == [
        "Hello", " there,", " general", " Kenobi.",
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_the_likeliest_tokens_come_first_and_as_many_as_asked_for(server: Server, stream: bool) -> None:
    tokens = _logprobs(server, "acme/random", stream=stream, temperature=0, top_logprobs=20, max_tokens=12)
    assert len(tokens) == 12
    for token in tokens:
        values = [each.logprob for each in token.top_logprobs]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert 0.2 < sum(map(math.exp, values)) <= 1.0001
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        assert all(bytes(each.bytes or []).decode() == each.token for each in token.top_logprobs)


def test_log_probabilities_stop_with_the_text(server: Server) -> None:
    tokens = _logprobs(server, "acme/pieces", stream=False, stop="ND three")
    assert [token.token for token in tokens] == ["One, tw", "o E"]
