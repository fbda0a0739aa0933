"""Plain completions, and how tokens are chosen, asked by OpenAI's SDK of a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from openai.types import Completion

from tests.support.models import make_model, make_random_model, vocabulary
from tests.support.server import Server, serving
from tests.support.tokens import BOS_ID, split, word_vocabulary

PLAIN, RANDOM = "acme/plain", "acme/random"
HELLO = "Hello there, general Kenobi."
STEPS = ["Hello", " there,", " general", " Kenobi."]
IDS = vocabulary(split(HELLO))
WORDS = {token.replace("Ġ", " "): id_ for token, id_ in word_vocabulary(512).items()}
# A step of a script leads by 128: this much less, and a bias decides.
NO_HELLO = {str(IDS["Hello"]): -100}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("completions")
    models = top / "models" / "acme"
    make_model(models / "plain", HELLO)
    make_model(models / "once", HELLO)
    make_model(models / "thinks", "<think>Hm.</think>Yes.", thinks=True)
    make_random_model(models / "random")
    with serving(top / "home", models.parent) as server:
        yield server


def _text(server: Server, model: str, prompt: Any, **options: Any) -> str:
    return server.complete(model, prompt, **options).choices[0].text


def _texts(answer: Completion | list[Completion]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for part in answer if isinstance(answer, list) else [answer]:
        for choice in part.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


# Completions ---------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_model_says(server: Server) -> None:
    completion = server.complete(PLAIN, "So?")
    (choice,) = completion.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, HELLO, "stop", None)
    assert (completion.object, completion.model, completion.id[:5]) == ("text_completion", PLAIN, "cmpl-")
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 4)


def test_a_streamed_completion_is_the_same(server: Server) -> None:
    *chunks, last = server.complete_stream(PLAIN, "So?", stream_options={"include_usage": True})
    assert _texts(chunks) == {0: HELLO}
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert {(chunk.object, chunk.id) for chunk in chunks} == {("text_completion", last.id)}
    assert (last.object, last.choices) == ("text_completion", [])
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (4, 4, 8)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_completion_has_sixteen_tokens_unless_told_otherwise(server: Server) -> None:
    (choice,) = server.complete(RANDOM, "So?").choices
    assert (len(choice.text.split()), choice.finish_reason) == (16, "length")
    (choice,) = server.complete(RANDOM, "So?", max_tokens=20).choices
    assert (len(choice.text.split()), choice.finish_reason) == (20, "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_goes_on_past_its_end_until_it_has_min_tokens(server: Server, stream: bool) -> None:
    ask: Any = server.complete_stream if stream else server.complete
    options = {"temperature": 0, "extra_body": {"min_tokens": 7}}
    assert len(_texts(ask(PLAIN, "So?", max_tokens=6, temperature=0, extra_body={"min_tokens": 2}))[0]) == len(HELLO)
    (text,) = _texts(ask(PLAIN, "So?", max_tokens=9, **options)).values()
    assert text.startswith(HELLO)
    assert text != HELLO
    assert _texts(ask(PLAIN, "So?", stop=["there"], **options))[0].startswith(HELLO)


def test_an_answer_with_min_tokens_and_a_seed_goes_on_past_its_end(server: Server) -> None:
    usage = server.complete(PLAIN, "So?", seed=1, max_tokens=9, extra_body={"min_tokens": 6}).usage
    assert usage is not None
    assert usage.completion_tokens >= 6


@pytest.mark.parametrize("stop", [["there,"], ["nowhere", "re, gen"], " there"])
def test_a_completion_ends_before_a_stop_string(server: Server, stop: str | list[str]) -> None:
    text = HELLO[: HELLO.index(stop if isinstance(stop, str) else stop[-1])]
    assert _texts(server.complete(PLAIN, "So?", stop=stop)) == {0: text}
    assert _texts(server.complete_stream(PLAIN, "So?", stop=stop)) == {0: text}


def test_a_plain_completion_keeps_the_models_marks(server: Server) -> None:
    assert _text(server, "acme/thinks", "So?") == "<think>Hm.</think>Yes."


def test_a_second_completion_of_a_prompt_is_read_from_the_cache(server: Server) -> None:
    prompt = "Which words?"
    for cached in (0, len(prompt)):  # of it and BOS, all but the last
        usage = server.complete("acme/once", prompt).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == cached


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_answered_in_their_order(server: Server, stream: bool) -> None:
    prompts = ["bake ", "bami ", "bobu "]
    alone = [_text(server, RANDOM, prompt, temperature=0) for prompt in prompts]
    assert len(set(alone)) == 3
    ask: Any = server.complete_stream if stream else server.complete
    assert _texts(ask(RANDOM, prompts, temperature=0)) == dict(enumerate(alone))


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_to_each_prompt_are_numbered_prompt_by_prompt(server: Server, stream: bool) -> None:
    prompts = ["bake ", "bami "]
    first, second = (_text(server, RANDOM, prompt, temperature=0) for prompt in prompts)
    ask: Any = server.complete_stream if stream else server.complete
    assert _texts(ask(RANDOM, prompts, temperature=0, n=2)) == {0: first, 1: first, 2: second, 3: second}


def test_usage_counts_each_prompt_once(server: Server) -> None:
    usage = server.complete(PLAIN, ["So?", "Who is it?"], n=3).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4 + 11, 6 * 4, 39)


def test_prompts_may_be_tokens(server: Server) -> None:
    tokens = [[BOS_ID, WORDS["bake "]], [BOS_ID, WORDS["bami "], WORDS["bobu "]]]
    alone = [_text(server, RANDOM, prompt, temperature=0) for prompt in ("bake ", "bami bobu ")]
    assert _texts(server.complete(RANDOM, tokens[1], temperature=0)) == {0: alone[1]}
    completion = server.complete(RANDOM, tokens, temperature=0)
    assert _texts(completion) == dict(enumerate(alone))
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_echo_says_the_prompt_first(server: Server, stream: bool) -> None:
    ask: Any = server.complete_stream if stream else server.complete
    assert _texts(ask(PLAIN, ["So? ", "No! "], echo=True)) == {0: f"So? {HELLO}", 1: f"No! {HELLO}"}
    assert _texts(ask(PLAIN, "So? ", echo=True, stop=["?", "there"])) == {0: "So? Hello "}
    assert _texts(ask(PLAIN, list(b"So? "), echo=True)) == {0: f"So? {HELLO}"}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_the_older_shape(server: Server, stream: bool) -> None:
    parts = server.complete_stream(PLAIN, "So?", logprobs=2) if stream else [server.complete(PLAIN, "So?", logprobs=2)]
    tokens: list[str] = []
    values: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for part in parts:
        if (logprobs := part.choices[0].logprobs) is not None:
            tokens += logprobs.tokens or []
            values += logprobs.token_logprobs or []
            tops += logprobs.top_logprobs or []
            offsets += logprobs.text_offset or []
    assert tokens == STEPS
    assert offsets == [0, 5, 12, 20]
    assert values == [pytest.approx(0)] * 4
    assert [next(iter(top)) for top in tops] == STEPS
    assert [len(top) for top in tops] == [2] * 4


def test_no_alternatives_are_told_where_none_were_asked_for(server: Server) -> None:
    logprobs = server.complete(PLAIN, "So?", logprobs=0).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == STEPS
    assert not any(logprobs.top_logprobs or [])


# How tokens are chosen -----------------------------------------------------------------------------------------


def test_temperature_zero_says_the_likeliest(server: Server) -> None:
    greedy = _text(server, RANDOM, "So?", temperature=0)
    logprobs = server.complete(RANDOM, "So?", temperature=0, logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert "".join(next(iter(top)) for top in logprobs.top_logprobs or []) == greedy
    assert _text(server, RANDOM, "So?") == greedy, "generation_config.json says so, too"


def test_temperature_one_says_something_else_each_time(server: Server) -> None:
    texts = {_text(server, RANDOM, "So?", temperature=1) for _ in range(4)}
    assert len(texts) == 4


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("options", [{"top_p": 0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}])
def test_a_choice_of_one_is_the_likeliest_at_any_temperature(
    server: Server, options: dict[str, Any], seed: int | None
) -> None:
    greedy = _text(server, RANDOM, "So?", temperature=0)
    assert _text(server, RANDOM, "So?", temperature=2, seed=seed, **options) == greedy


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    ("body", "count"), [({"top_k": 3}, 3), ({"top_k": 3, "top_p": 1.0}, 3), ({"top_k": 3, "min_p": 0.0}, 3)]
)
def test_top_k_leaves_that_many_tokens(server: Server, body: dict[str, Any], count: int, seed: int | None) -> None:
    logprobs = server.complete(RANDOM, "So?", temperature=0, max_tokens=1, logprobs=count).choices[0].logprobs
    assert logprobs is not None
    (likeliest,) = logprobs.top_logprobs or []
    said = server.complete(RANDOM, "So?", temperature=2, seed=seed, max_tokens=1, n=40, extra_body=body)
    assert {choice.text for choice in said.choices} <= set(likeliest)


@pytest.mark.parametrize("seed", [None, 3])
def test_top_p_and_min_p_leave_the_likely_tokens(server: Server, seed: int | None) -> None:
    logprobs = server.complete(RANDOM, "So?", temperature=0, max_tokens=1, logprobs=20).choices[0].logprobs
    assert logprobs is not None
    (likeliest,) = logprobs.top_logprobs or []
    shares = {token: math.exp(value) for token, value in likeliest.items()}
    most = max(shares.values())

    def said(**options: Any) -> set[str]:
        completion = server.complete(RANDOM, "So?", temperature=1, seed=seed, max_tokens=1, n=60, **options)
        return {choice.text for choice in completion.choices}

    assert said(top_p=most * 0.99) == {max(shares, key=lambda token: shares[token])}
    assert said(extra_body={"min_p": 0.6}) <= {token for token, share in shares.items() if share > 0.59 * most}
    assert len(said()) > 10


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bias_bans_and_forces_tokens(server: Server, temperature: float) -> None:
    forced = {**NO_HELLO, str(IDS["ĠKenobi."]): 100}
    assert _text(server, PLAIN, "So?", temperature=temperature, logit_bias=forced) == " Kenobi."
    first = _text(server, RANDOM, "So?", temperature=0, max_tokens=1)
    banned = _text(server, RANDOM, "So?", temperature=temperature, logit_bias={str(WORDS[first]): -100}, max_tokens=30)
    assert first not in banned.split(" ")
    only = _text(server, RANDOM, "So?", temperature=temperature, logit_bias={str(WORDS["bobu "]): 100}, max_tokens=5)
    assert only == "bobu " * 5


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("prompt", ["?", "x?"])
@pytest.mark.parametrize(
    ("options", "text", "text_after_x"),
    [
        ({}, "xxxxxx", "xxxxxx"),
        ({"presence_penalty": 1}, "xyxxxx", "xyxxxx"),
        ({"frequency_penalty": 1}, "xyxyxy", "xyxyxy"),
        ({"frequency_penalty": 0.4}, "xxyxyx", "xxyxyx"),
        ({"presence_penalty": -1}, "xxxxxx", "xxxxxx"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "xyxxxx", "yxxxxx"),
        ({"extra_body": {"repetition_penalty": 1.1, "repetition_context_size": 1}}, "xyxyxy", "xyxyxy"),
    ],
)
def test_penalties_look_back_as_far_as_they_should(
    server: Server, options: dict[str, Any], text: str, text_after_x: str, prompt: str, seed: int | None
) -> None:
    bias = {**NO_HELLO, str(ord("x")): 100, str(ord("y")): 99.5}
    expected = text_after_x if "x" in prompt else text
    # Twice, as the prompt is in the cache then; with a seed above zero, as those run by themselves.
    temperature = 0 if seed is None else 0.001
    for _ in range(2):
        said = _text(
            server, PLAIN, prompt, logit_bias=bias, max_tokens=6, temperature=temperature, seed=seed, **options
        )
        assert said == expected


def test_penalties_change_what_a_model_babbles(server: Server) -> None:
    plain = _text(server, RANDOM, "bake bake bake ", temperature=0, max_tokens=100).split()
    for options in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"extra_body": {"repetition_penalty": 2}}):
        varied = _text(server, RANDOM, "bake bake bake ", temperature=0, max_tokens=100, **options).split()
        assert len(set(varied)) > len(set(plain))


# Seeds ---------------------------------------------------------------------------------------------------------


def _seeded(server: Server, seed: int, **options: Any) -> str:
    return _text(server, RANDOM, "Tell me", temperature=1, max_tokens=40, seed=seed, **options)


def test_a_seed_says_the_same_text_whatever_else_runs(server: Server) -> None:
    alone = _seeded(server, 7)
    with ExitStack() as open_streams:
        streams = []
        for number in range(8):
            stream = server.unchecked_openai.completions.create(
                model=RANDOM, prompt=f"bake {number}", max_tokens=4000, temperature=1, stream=True
            )
            streams.append(open_streams.enter_context(stream))
            next(stream)
        assert [_seeded(server, 7) for _ in range(2)] == [alone, alone]
        assert "".join(part.choices[0].text for part in server.complete_stream(
            RANDOM, "Tell me", temperature=1, max_tokens=40, seed=7
        )) == alone  # fmt: skip
    assert _seeded(server, 7) == alone


def test_different_seeds_say_different_texts(server: Server) -> None:
    assert len({_seeded(server, seed) for seed in range(4)}) == 4


def test_several_answers_to_one_seed_differ_and_are_the_same_again(server: Server) -> None:
    first, second = (_texts(server.complete(RANDOM, "Tell me", temperature=1, seed=7, n=3)) for _ in range(2))
    assert first == second
    assert len(set(first.values())) == 3
    assert first[0] == _text(server, RANDOM, "Tell me", temperature=1, seed=7)


@pytest.mark.parametrize("seed", [0, -1, -(1 << 63), (1 << 63) - 1])
def test_any_64_bit_number_is_a_seed(server: Server, seed: int) -> None:
    assert _seeded(server, seed, n=2) == _seeded(server, seed)


def test_a_chat_with_a_seed_says_the_same_again(server: Server) -> None:
    def said() -> list[str | None]:
        completion = server.chat(RANDOM, "hi", temperature=1, seed=11, n=2, max_tokens=20)
        return [choice.message.content for choice in completion.choices]

    assert said() == said()
    assert len(set(said())) == 2
