"""How the next token is chosen: parameters, penalties, seeds, and what a grammar lets pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat.grammar import Budget, Constraint
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import ChatRequest, Format, Params, Tool, ToolChoice
from mlx_overlay_server.engine.sampling import (
    Guarded,
    Mask,
    Matcher,
    ReasoningBudget,
    Sampling,
    effective,
    processors,
    sampler,
)
from mlx_overlay_server.errors import InvalidRequest

from tests.support.loaded import loaded
from tests.support.models import make_model

_VOCAB = 8
_GREEDY = Sampling(0.0, 1.0, 0, 0.0, 1.0)
_FREE = Sampling(1.0, 1.0, 0, 0.0, 1.0)

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
"""What models compute in."""


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).rpartition(".")[2], scope="module")
def dtype(request: pytest.FixtureRequest) -> mx.Dtype:
    """The type of a model's logits."""
    chosen: mx.Dtype = request.param
    return chosen


# Parameters -----------------------------------------------------------------------------------------------------


def test_without_any_word_of_it_openai_s_defaults_hold() -> None:
    assert effective(Params(), {}, 100) == Sampling(
        temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
    )


def test_the_model_s_defaults_hold_where_the_request_says_nothing() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    assert effective(Params(), defaults, 100) == Sampling(0.6, 0.95, 20, 0.1, 1.1)


def test_the_request_outranks_the_model_even_with_zeros() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    given_params = Params(temperature=0.0, top_p=0.5, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert effective(given_params, defaults, 100) == Sampling(0.0, 0.5, 0, 0.0, 1.0)


def test_a_model_that_does_not_sample_is_greedy_unless_the_request_says_otherwise() -> None:
    assert effective(Params(), {"do_sample": False}, 100).temperature == 0
    assert effective(Params(temperature=0.5), {"do_sample": False}, 100).temperature == 0.5


def test_nulls_in_a_model_s_defaults_are_no_values() -> None:
    assert effective(Params(), {"temperature": None, "top_k": None}, 100) == effective(Params(), {}, 100)


@pytest.mark.parametrize(
    "params", [Params(temperature=1, top_p=0), Params(temperature=1, top_k=1), Params(temperature=0)]
)
def test_one_candidate_is_greedy(params: Params, dtype: mx.Dtype) -> None:
    sampling = effective(params, {}, 100)
    assert sampling.temperature == 0
    logits = mx.array([[0.0, 3.0, 2.9], [5.0, 3.0, 2.9]], dtype=dtype)
    assert sampler(sampling, 1)(logits).tolist() == sampler(sampling, None)(logits).tolist() == [1, 0]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    "params",
    [Params(temperature=least, top_p=1.0) for least in (5e-324, 1e-300, 1e-45, 1e-20, 1e-7)]
    + [Params(temperature=1.0, top_p=least) for least in (5e-324, 1e-300, 1e-45, 1e-20, 1e-7)]
    + [Params(temperature=1e-5, top_p=1e-5, min_p=5e-324)],
)
def test_the_least_numbers_that_a_request_can_hold_leave_the_likeliest_token(
    params: Params, seed: int | None, dtype: mx.Dtype
) -> None:
    sampling = effective(params, {}, 100)
    assert set(_draw(sampling, seed, _logprobs(0.15, 0.2, 0.25, 0.4, dtype=dtype), 50)) == {3}


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-4, 1e-3])
def test_a_low_temperature_leaves_the_likeliest_of_many(temperature: float, seed: int | None, dtype: mx.Dtype) -> None:
    """Log probabilities over such a temperature are beyond the largest number of float16."""
    sampling = effective(Params(temperature=temperature), {}, 30_000)
    weights = [1.0] * 30_000
    weights[17] = 2.0
    assert set(_draw(sampling, seed, _logprobs(*weights, dtype=dtype), 5)) == {17}


@pytest.mark.parametrize("top_k", [0, 100, 1000, 10**30])
def test_as_many_candidates_as_there_are_tokens_is_no_limit(top_k: int) -> None:
    assert effective(Params(top_k=top_k), {}, 100).top_k == 0


# Samplers -------------------------------------------------------------------------------------------------------


def _logprobs(*weights: float, dtype: mx.Dtype = mx.float32) -> mx.array:
    logits = mx.log(mx.array([weights])).astype(dtype)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _draw(sampling: Sampling, seed: int | None, logprobs: mx.array, count: int = 200) -> list[int]:
    draw = sampler(sampling, seed)
    return [_token(draw(logprobs)) for _ in range(count)]


def _token(drawn: mx.array) -> int:
    value: Any = drawn.item()
    return int(value)


@pytest.mark.parametrize("seed", [0, 7, -1, -(1 << 63), (1 << 63) - 1, (1 << 63) + 126])
def test_a_seed_repeats_its_draws_whatever_else_is_drawn(seed: int, dtype: mx.Dtype) -> None:
    even = mx.zeros((1, 100), dtype=dtype)
    first = _draw(_FREE, seed, even, 20)
    mx.random.uniform(shape=(3,))
    draw = sampler(_FREE, seed)
    again = []
    for _ in range(20):
        again.append(_token(draw(even)))
        sampler(_FREE, None)(even)
    assert first == again
    assert len(set(first)) > 1


def test_seeds_differ() -> None:
    even = mx.zeros((1, 100))
    drawn = [tuple(_draw(_FREE, seed, even, 10)) for seed in (-2, -1, 0, 1, 2, 3)]
    assert len(set(drawn)) == len(drawn)


def test_requests_that_ask_for_the_same_share_a_sampler_and_those_with_a_seed_do_not() -> None:
    assert sampler(_FREE, None) is sampler(Sampling(*_FREE), None)
    assert sampler(_FREE, 1) is not sampler(_FREE, 1)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0, 1.0, 0, 0.0, 1.0), {0, 1, 2, 3}),
        (Sampling(1.0, 1.0, 2, 0.0, 1.0), {2, 3}),
        (Sampling(1.0, 0.6, 0, 0.0, 1.0), {2, 3}),
        (Sampling(1.0, 1.0, 0, 0.6, 1.0), {2, 3}),
        (Sampling(0.01, 1.0, 0, 0.0, 1.0), {3}),
    ],
)
def test_only_candidates_are_drawn_and_each_of_them_is(
    sampling: Sampling, allowed: set[int], seed: int | None, dtype: mx.Dtype
) -> None:
    assert set(_draw(sampling, seed, _logprobs(0.15, 0.2, 0.25, 0.4, dtype=dtype))) == allowed


# Penalties ------------------------------------------------------------------------------------------------------


def _processed(
    params: Params, prompt: Sequence[int], answer: Sequence[int], cached: int = 0, dtype: mx.Dtype = mx.float32
) -> list[float]:
    """Logits of all ones, after the answer so far; mlx-lm leaves out what is cached."""
    logits = mx.ones((1, _VOCAB), dtype=dtype)
    so_far = mx.array([*prompt[cached:], *answer], dtype=mx.int32)
    for each in processors(params, effective(params, {}, _VOCAB), prompt, cached=cached):
        logits = each(so_far, logits)
        assert logits.dtype == dtype, "one row's processors must not change what the others are computed in"
    values: Any = logits[0].tolist()
    return [round(value, 4) for value in values]


def test_penalties_for_presence_and_frequency_look_at_the_answer_alone(dtype: mx.Dtype) -> None:
    assert _processed(Params(presence_penalty=0.5), [1, 2], [3, 3], 0, dtype) == [1, 1, 1, 0.5, 1, 1, 1, 1]
    assert _processed(Params(frequency_penalty=0.25), [1, 2], [3, 3], 0, dtype) == [1, 1, 1, 0.5, 1, 1, 1, 1]


def test_the_repetition_penalty_looks_at_the_prompt_too(dtype: mx.Dtype) -> None:
    assert _processed(Params(repetition_penalty=2.0), [1, 2], [3, 3], 0, dtype) == [1, 0.5, 0.5, 0.5, 1, 1, 1, 1]
    limited = Params(repetition_penalty=2.0, repetition_context=1)
    assert _processed(limited, [1, 2], [3, 3], 0, dtype) == [1, 1, 1, 0.5, 1, 1, 1, 1]


def test_a_bias_is_added_and_the_least_one_means_never(dtype: mx.Dtype) -> None:
    biased = _processed(Params(logit_bias={0: 2.5, 1: -50.0, 7: -100.0}), [1], [], 0, dtype)
    assert biased[:7] == [3.5, -49, 1, 1, 1, 1, 1]
    assert biased[7] < -1000


@pytest.mark.parametrize("seed", [None, 3])
def test_a_bias_against_every_token_leaves_the_model_s_own_order(seed: int | None, dtype: mx.Dtype) -> None:
    params = Params(logit_bias=dict.fromkeys(range(4), -100.0))
    (biased,) = processors(params, _FREE, [1])
    logits = biased(mx.array([1]), mx.array([[0.0, 0.0, 60.0, 0.0]], dtype=dtype))
    assert set(_draw(_FREE, seed, logits - mx.logsumexp(logits, axis=-1, keepdims=True))) == {2}


def test_nothing_is_done_for_parameters_that_ask_for_nothing() -> None:
    assert processors(Params(), _FREE, [1]) == []


_tokens = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=8)


@given(prompt=_tokens, answer=_tokens, share=st.floats(0, 1))
def test_penalties_are_the_same_however_much_of_the_prompt_was_cached(
    prompt: list[int], answer: list[int], share: float, dtype: mx.Dtype
) -> None:
    params = Params(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias={1: 1.0})
    cached = int(share * (len(prompt) - 1))
    assert _processed(params, prompt, answer, cached, dtype) == _processed(params, prompt, answer, 0, dtype)


# Grammars -------------------------------------------------------------------------------------------------------

_SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["ja", "né"]}, "n": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["word", "n"],
    "additionalProperties": False,
}
_REQUEST = ChatRequest("org/m", format=Format(_SCHEMA))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model that thinks, and has words of its own beside the bytes."""
    folder = tmp_path_factory.mktemp("models") / "thinker"
    return loaded(make_model(folder, '<think>Hm</think>{"word": "ja", "n": 12} né', thinks=True, calls_tools=True))


Allowed = Callable[[Sequence[int]], list[int]]


def _allowed(mask: Mask, vocab: int, dtype: mx.Dtype = mx.float32) -> Allowed:
    """Which tokens pass after those that were chosen so far; asked with one token more each time."""

    def allowed(answer: Sequence[int]) -> list[int]:
        logits = mask(answer[-1] if answer else None, mx.zeros((1, vocab), dtype=dtype))
        assert logits.dtype == dtype
        values: Any = logits[0].tolist()
        return [token for token, value in enumerate(values) if value == 0]

    return allowed


def _matcher(model: Loaded, rule: Constraint | None, dtype: mx.Dtype = mx.float32) -> Allowed:
    assert rule is not None
    return _allowed(_made(model, rule), model.vocab_size, dtype)


def _made(model: Loaded, rule: Constraint) -> Matcher:
    return Matcher(rule, grammar.compiled(rule, model), model.grammar_tokenizer.vocab_size)


def _rule(model: Loaded, request: ChatRequest, *, is_reasoning: bool = False) -> Constraint:
    rule = grammar.constraint(model, request, is_reasoning=is_reasoning)
    assert rule is not None
    return rule


def _written(data: st.DataObject, model: Loaded, allowed: Allowed, start: Sequence[int] = ()) -> str:
    """What a model writes that takes any of the tokens that pass, until it may and does end."""
    answer = list(start)
    while True:
        options = allowed(answer)
        token = data.draw(st.sampled_from(options))
        if token in model.tokenizer.eos_token_ids:
            return model.tokenizer.decode(answer[len(start) :])
        answer.append(token)
        assert len(answer) < 200


def _fits(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"word", "n"} and value["word"] in ("ja", "né") and 0 <= value["n"] <= 20


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_a_model_would_say_it_says_what_the_schema_describes(
    data: st.DataObject, thinker: Loaded, dtype: mx.Dtype
) -> None:
    rule = _rule(thinker, replace(_REQUEST, thinking=False))
    assert _fits(_written(data, thinker, _matcher(thinker, rule, dtype)))


@settings(max_examples=25)
@given(data=st.data())
def test_whatever_a_model_would_call_it_calls_a_tool_there_is(data: st.DataObject, thinker: Loaded) -> None:
    tools = (
        Tool("find", None, _SCHEMA),
        Tool("éi\"'", None, None),
        Tool("none", None, {"type": "object", "properties": {}, "additionalProperties": False}),
    )
    one = ChatRequest("org/m", tools=tools[::2], choice=ToolChoice("required"), thinking=False)
    call = json.loads(_written(data, thinker, _matcher(thinker, _rule(thinker, one))))
    assert set(call) == {"name", "arguments"}
    assert call["name"] == "none" or _fits(json.dumps(call["arguments"]))
    named = replace(one, choice=ToolChoice("required", "find"))
    assert json.loads(_written(data, thinker, _matcher(thinker, _rule(thinker, named))))["name"] == "find"


def _ids(model: Loaded, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=25)
@given(data=st.data(), thought=st.text(max_size=6))
def test_a_grammar_waits_for_the_end_of_reasoning_that_the_prompt_opened(
    data: st.DataObject, thought: str, thinker: Loaded
) -> None:
    allowed = _matcher(thinker, _rule(thinker, _REQUEST, is_reasoning=True))
    start = [*_ids(thinker, thought), *_ids(thinker, "</think>")]
    for size in range(len(start)):
        assert len(allowed(start[:size])) == thinker.vocab_size - len(thinker.tokenizer.eos_token_ids)
    assert _fits(_written(data, thinker, allowed, start))


@settings(max_examples=25)
@given(data=st.data())
def test_a_model_may_reason_first_and_then_the_grammar_holds(data: st.DataObject, thinker: Loaded) -> None:
    (opens,) = _ids(thinker, "<think>")
    start = [opens, *_ids(thinker, "{]</think>")]
    allowed = _matcher(thinker, _rule(thinker, _REQUEST))
    assert opens in allowed([])
    for size in range(1, len(start)):
        assert len(allowed(start[:size])) == thinker.vocab_size - len(thinker.tokenizer.eos_token_ids)
    assert _fits(_written(data, thinker, allowed, start))


@pytest.mark.parametrize("mark", [(7,), (7, 8, 7, 9)])
def test_a_model_that_wants_to_stop_while_an_answer_is_owed_closes_its_reasoning(
    mark: tuple[int, ...], thinker: Loaded, dtype: mx.Dtype
) -> None:
    rule = replace(_rule(thinker, _REQUEST, is_reasoning=True), after=mark)
    mask, last = _made(thinker, rule), 5  # a thought before it
    (stop,) = thinker.tokenizer.eos_token_ids
    wants_to_stop = mx.zeros((1, thinker.vocab_size), dtype=dtype).at[:, stop].add(9)
    mask(None, wants_to_stop)
    for expected in mark:
        last = mx.argmax(mask(last, wants_to_stop), axis=-1).item()  # type: ignore[assignment]
        assert last == expected
    assert thinker.tokenizer.decode([mx.argmax(mask(last, wants_to_stop)).item()]) == "{"  # type: ignore[list-item]


def test_reasoning_may_open_at_the_beginning_alone(thinker: Loaded) -> None:
    (opens,) = _ids(thinker, "<think>")
    allowed = _matcher(thinker, _rule(thinker, _REQUEST))
    assert opens in allowed([])
    assert opens not in allowed(_ids(thinker, "{"))
    quiet = _matcher(thinker, _rule(thinker, replace(_REQUEST, thinking=False)))
    assert opens not in quiet([])


def test_rows_that_no_token_has_never_pass(thinker: Loaded) -> None:
    matcher = _made(thinker, _rule(thinker, _REQUEST))
    assert max(_allowed(matcher, thinker.vocab_size + 100)([])) < thinker.vocab_size


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}])
def test_a_schema_that_nothing_fits_is_refused_with_its_field(schema: dict[str, Any], thinker: Loaded) -> None:
    rule = _rule(thinker, replace(_REQUEST, format=Format(schema)))
    with pytest.raises(InvalidRequest, match="cannot be enforced") as caught:
        grammar.compiled(rule, thinker)
    assert caught.value.field == "format"


def test_what_a_grammar_demands_no_bias_forbids(thinker: Loaded, dtype: mx.Dtype) -> None:
    (opens,) = _ids(thinker, "{")
    params = Params(logit_bias={opens: -100.0})
    rule = _rule(thinker, replace(_REQUEST, thinking=False))
    logits = mx.zeros((1, thinker.vocab_size), dtype=dtype)
    logits = Guarded(processors(params, _FREE, [1]), None, _made(thinker, rule))(mx.array([1]), logits)
    allowed = _matcher(thinker, rule)([])
    assert opens in allowed
    drawn = set(_draw(_FREE, None, logits - mx.logsumexp(logits, axis=-1, keepdims=True), 20))
    assert drawn <= set(allowed)


def test_a_sequence_whose_answer_left_its_grammar_cannot_continue(thinker: Loaded) -> None:
    """The engine asks the guard that holds all of a request's masks."""
    matcher = _made(thinker, _rule(thinker, replace(_REQUEST, thinking=False)))
    guarded = Guarded([], None, matcher)
    logits = mx.zeros((1, thinker.vocab_size))
    guarded(mx.array([1]), logits)
    before = guarded.problem
    guarded(mx.array([1, *_ids(thinker, "x")]), logits)
    assert before is None
    assert "cannot follow its grammar" in (guarded.problem or "")


def test_a_processor_that_fails_ends_its_own_sequence_alone() -> None:
    def fails(*_: mx.array) -> mx.array:
        raise ValueError("my secret")

    guarded = Guarded([fails], None, None)
    logits = mx.zeros((1, _VOCAB))
    assert guarded(mx.array([1]), logits) is logits
    assert guarded.problem == "the engine failed: ValueError"


def test_a_token_against_the_grammar_is_a_problem_that_is_told(thinker: Loaded) -> None:
    matcher = _made(thinker, _rule(thinker, replace(_REQUEST, thinking=False)))
    allowed = _allowed(matcher, thinker.vocab_size)
    allowed([])
    allowed(_ids(thinker, "x"))
    assert matcher.problem


# Reasoning budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(7,), (6, 7)])
@pytest.mark.parametrize("is_open", [True, False])
def test_reasoning_that_takes_too_long_is_ended(ends: tuple[int, ...], is_open: bool, dtype: mx.Dtype) -> None:
    budget = ReasoningBudget(Budget(3, opens=(5,), ends=ends, is_open=is_open))
    allowed = _allowed(budget, _VOCAB, dtype)
    answer = [] if is_open else [1, 1, 1, 1, 5]
    for size in range(len(answer)):
        assert len(allowed(answer[:size])) == _VOCAB
    for _ in range(3):
        assert len(allowed(answer)) == _VOCAB
        answer.append(1)
    for token in ends:
        assert allowed(answer) == [token]
        answer.append(token)
    for _ in range(5):
        assert len(allowed(answer)) == _VOCAB
        answer.append(1)


def test_reasoning_that_ends_in_time_is_left_alone() -> None:
    allowed = _allowed(ReasoningBudget(Budget(3, opens=(5,), ends=(7,), is_open=True)), _VOCAB)
    answer = [1, 7, 1, 1, 1, 1, 1, 1]
    assert all(len(allowed(answer[:size])) == _VOCAB for size in range(len(answer)))


def test_defaults_are_the_model_folder_s(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "Hello.")
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert effective(Params(), defaults, _VOCAB).temperature == 0
