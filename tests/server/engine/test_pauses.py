"""A sequence that is paused for want of memory goes on as if nothing had happened, and its client is told nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_overlay_server.chat.grammar import Budget
from mlx_overlay_server.engine.commands import Prefilled
from mlx_overlay_server.engine.sampling import Guarded
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.running import PROMPT, Running

_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {100: 5.0}},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder: Path = make_random_model(tmp_path_factory.mktemp("models") / "random")
    return Running(folder, EngineOptions(cache_bytes=0))


def _said(running: Running, pauses: dict[int, tuple[int, int]], kind: str) -> list[list[int]]:
    """What three sequences say, where at some steps one of them is paused for some steps: step -> (which, how long)."""
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
    return [running.tokens(id_) for id_ in ids]


@settings(max_examples=15)
@given(
    pauses=st.dictionaries(st.integers(0, 30), st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=4),
    kind=st.sampled_from(sorted(_KINDS)),
)
def test_the_same_is_said_whenever_sequences_are_paused(
    running: Running, pauses: dict[int, tuple[int, int]], kind: str
) -> None:
    assert _said(running, pauses, kind) == _said(running, {}, kind)


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


def test_what_cannot_be_paused_goes_on(running: Running) -> None:
    counted = running.add(more={"budget": Budget(5, False, (1,), (2,))})
    seeded = running.add(temperature=1, seed=3)
    assert not running.runner.pause(counted)
    assert not running.runner.pause(seeded)
    assert not running.runner.pause(10**9)
    running.finish()
    assert running.tokens(counted)
    assert running.tokens(seeded)


def test_what_is_paused_can_be_cancelled(running: Running) -> None:
    id_ = running.add(max_tokens=50)
    for _ in range(5):
        running.step()
    assert running.runner.pause(id_)
    assert not running.runner.is_busy
    running.runner.cancel(id_)
    assert not running.runner._paused
