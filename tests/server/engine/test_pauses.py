"""A sequence that is paused for want of memory goes on as if nothing had happened, and its client is told nothing."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_overlay_server.chat.grammar import Budget
from mlx_overlay_server.engine.commands import Prefilled, PromptScores
from mlx_overlay_server.engine.sampling import Guarded
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.running import PROMPT, Running

_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {100: 5.0}},
    "a budget": {"more": {"budget": Budget(7, is_open=True, opens=(1,), ends=(98, 99, 100))}},
    "a seed": {"temperature": 1, "seed": 3, "logprobs": 3, "repetition_penalty": 1.3},
    "a scored prompt": {"prompt_logprobs": 1, "presence_penalty": 1.5},
}
_RUN: dict[str, dict[str, Any]] = {
    "in a batch": {},
    "quantised": {"options": EngineOptions(kv_bits=8, kv_group_size=32, quantized_kv_start=10**6)},
    "with a draft model": {"draft": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Running]:
    place = tmp_path_factory.mktemp("models")
    folder, draft = (make_random_model(place / str(seed), seed=seed) for seed in (0, 1))
    return {
        how: Running(folder, each.get("options", EngineOptions()), draft=draft if each.get("draft") else None)
        for how, each in _RUN.items()
    }


@pytest.fixture
def running(runs: dict[str, Running]) -> Running:
    return runs["in a batch"]


def _said(running: Running, pauses: dict[int, tuple[int, int]], kind: str) -> list[list[Any]]:
    """What three sequences say, where at some steps one of them is paused for some steps: step -> (which, how long).

    With a seed it is the same to the last bit.
    """
    running.prefixes.trim(0)
    ids = [running.add(PROMPT[: 5 + 5 * number], max_tokens=24, **_KINDS[kind]) for number in range(3)]
    back: dict[int, list[int]] = {}
    for step in range(400):
        for id_ in back.pop(step, []):
            running.runner.add(running.submits[id_])
        if step in pauses:
            which, length = pauses[step]
            if running.runner.pause(ids[which]):
                back.setdefault(step + length, []).append(ids[which])
        if running.runner.is_busy:
            running.step()
        elif not back:
            break
    for id_ in ids:
        told = [item for item in running.items[id_] if isinstance(item, Prefilled) and item.done == item.total]
        assert len(told) == 1, "the end of the prompt is told once"
        scored = [score for item in running.items[id_] if isinstance(item, PromptScores) for score in item.tokens]
        assert len(scored) in (0, len(running.submits[id_].prompt) - 1), "a token of the prompt is scored once"
    return [running.sampled(id_) if kind == "a seed" else running.tokens(id_) for id_ in ids]


@settings(max_examples=12)
@given(
    pauses=st.dictionaries(st.integers(0, 30), st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=4),
    kind=st.sampled_from(sorted(_KINDS)),
    how=st.sampled_from(sorted(_RUN)),
)
@example(pauses={0: (0, 1), 2: (2, 3), 3: (1, 2), 9: (2, 5), 21: (0, 1)}, kind="a seed", how="in a batch")
@example(pauses={1: (0, 1), 4: (1, 1), 8: (2, 2), 10: (2, 1)}, kind="a budget", how="in a batch")
@example(pauses={1: (0, 1), 4: (1, 1), 8: (2, 2)}, kind="penalties", how="with a draft model")
def test_the_same_is_said_whenever_sequences_are_paused(
    runs: dict[str, Running], pauses: dict[int, tuple[int, int]], kind: str, how: str
) -> None:
    assert _said(runs[how], pauses, kind) == _said(runs[how], {}, kind)


def test_a_mask_does_not_read_a_token_twice() -> None:
    read: list[int | None] = []

    class Mask:
        problem = None

        def __call__(self, last: int | None, logits: Any) -> Any:
            read.append(last)
            return logits

    guarded = Guarded([], None, Mask())  # type: ignore[arg-type]
    guarded.read_last = lambda tokens: tokens  # type: ignore[assignment,return-value]
    for token in (1, 2):
        guarded(token, None)  # type: ignore[arg-type]
    guarded.draw_again()
    for token in (2, 3):
        guarded(token, None)  # type: ignore[arg-type]
    assert read == [None, 2, None, 3]


def test_what_cannot_be_paused_goes_on(runs: dict[str, Running]) -> None:
    """How many numbers a seed has given a draft model's guesses is not known."""
    running = runs["with a draft model"]
    seeded = running.add(temperature=1, seed=3)
    assert not running.runner.pause(seeded)
    assert not running.runner.pause(10**9)
    running.finish()
    assert running.tokens(seeded)


@pytest.mark.parametrize("kind", ["plain", "a seed"])
def test_what_is_paused_can_be_cancelled(running: Running, kind: str) -> None:
    id_ = running.add(max_tokens=50, **_KINDS[kind])
    for _ in range(5):
        running.step()
    assert running.runner.pause(id_)
    assert not running.runner.is_busy
    running.runner.cancel(id_)
    assert not running.runner._paused
    assert not running.runner._alone.resume(id_)


@pytest.mark.parametrize("how", sorted(_RUN))
def test_what_is_paused_holds_no_kv_cache(runs: dict[str, Running], how: str) -> None:
    running = runs[how]
    running.prefixes.trim(0)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        id_ = running.add(tuple(range(97, 117)) * 40, max_tokens=50)
        while not running.tokens(id_):
            running.step()
        held = mx.get_active_memory() - before
        assert running.runner.pause(id_)
        running.step()
        mx.synchronize()
        assert mx.get_active_memory() - before < held / 10
    finally:
        gc.enable()
    running.runner.cancel(id_)
