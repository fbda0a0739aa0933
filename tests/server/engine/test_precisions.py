"""Answers keep to what requests ask of them also on models in bfloat16, in float16, and quantised to 4 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from mlx_overlay_server.chat.grammar import Budget, Constraint

from tests.support.models import make_converted, make_random_model
from tests.support.running import PROMPT, Running

_SEEDED: dict[str, Any] = {"temperature": 1, "seed": 3}
_BOTH = pytest.mark.parametrize("params", [{}, _SEEDED], ids=["in the batch", "alone"])
_KINDS = ("bfloat16", "float16", "4 bits")
_SCHEMA = {
    "type": "object",
    "properties": {"word": {"enum": ["ja", "no"]}, "n": {"type": "integer", "minimum": 0, "maximum": 20}},
    "required": ["word", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=_KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    plain = make_random_model(place / "plain")
    if request.param == "4 bits":
        return make_converted(place / "converted", plain, dtype="bfloat16", bits=4)
    return make_converted(place / "converted", plain, dtype=request.param)


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    made = Running(folder)
    yield made
    made.runner.close()


@_BOTH
def test_answers_follow_their_grammar(params: dict[str, Any], running: Running) -> None:
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    rule = Constraint(json.dumps({"grammars": [{"json_schema": {"x-guidance": options, **_SCHEMA}}]}))
    ids = [running.add([*PROMPT, n], max_tokens=200, more={"constraint": rule}, **params) for n in range(3)]
    running.finish()
    for id_ in ids:
        assert running.sampled(id_)[-1].finish == "stop"
        said = json.loads(running.runner.loaded.tokenizer.decode(running.tokens(id_)[:-1]))
        assert said["word"] in ("ja", "no")
        assert 0 <= said["n"] <= 20


@_BOTH
def test_reasoning_ends_when_its_budget_is_spent(params: dict[str, Any], running: Running) -> None:
    budget = Budget(5, is_open=True, opens=(1,), ends=(97, 98))
    id_ = running.add(max_tokens=10, more={"budget": budget}, **params)
    running.finish()
    assert running.tokens(id_)[5:7] == [97, 98]


def _logprobs(folder: Path, tokens: list[int]) -> list[list[float]]:
    """What the model thinks after each of the tokens, worked out in one piece."""
    model, _ = load_model(folder)
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    values: Any = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
    return list(values)


@_BOTH
def test_log_probabilities_are_the_model_s(params: dict[str, Any], running: Running, folder: Path) -> None:
    """As near as a type with 8 bits of precision comes to them."""
    running.add([120, 121], max_tokens=1000)
    id_ = running.add(max_tokens=8, logprobs=4, **params)
    while running.runner.active > 1:
        running.step()
    drawn = running.sampled(id_)
    expected = _logprobs(folder, [*PROMPT, *(item.token for item in drawn)])
    for at, item in enumerate(drawn):
        values = expected[len(PROMPT) - 1 + at]
        assert item.logprob == pytest.approx(values[item.token], abs=0.25)
        top = [value for _, value in item.top]
        assert top == sorted(top, reverse=True)
        assert top == pytest.approx(sorted(values, reverse=True)[:4], abs=0.25)
        if not params:
            assert item.top[0][1] == item.logprob, "greedy, and something was likelier"


@_BOTH
def test_what_was_said_is_not_said_again_under_the_greatest_penalty(params: dict[str, Any], running: Running) -> None:
    id_ = running.add(max_tokens=60, presence_penalty=2.0, frequency_penalty=2.0, **params)
    other = running.add(max_tokens=60, **params)
    running.finish()
    said, freely = running.tokens(id_), running.tokens(other)
    assert len(set(said)) > len(set(freely))


@_BOTH
def test_what_a_bias_forbids_is_never_said(params: dict[str, Any], running: Running) -> None:
    id_ = running.add(max_tokens=20, **params)
    running.finish()
    banned = running.tokens(id_)[0]
    other = running.add(max_tokens=20, logit_bias={banned: -100.0}, **params)
    running.finish()
    assert banned not in running.tokens(other)
    assert len(running.tokens(other)) == 20


def test_a_model_that_computes_in_fewer_bits_is_what_is_tested(running: Running) -> None:
    assert running.runner._model(mx.array([[1]])).dtype in (mx.bfloat16, mx.float16)
