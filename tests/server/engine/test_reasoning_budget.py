"""A reasoning budget holds for every block of reasoning in an answer, however the one before it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_overlay_server.chat.grammar import Budget
from mlx_overlay_server.engine.sampling import ReasoningBudget

_VOCAB = 12
_SAID = 1
_ENDS = ((7,), (6, 7))
_OPENS = ((5,), (4, 5))
_ANY = list(range(_VOCAB))


class Answer:
    """An answer that goes on token by token, as an engine asks for each."""

    def __init__(
        self, tokens: int, *, is_open: bool, opens: tuple[int, ...] = (5,), ends: tuple[int, ...] = (7,)
    ) -> None:
        self._mask = ReasoningBudget(Budget(tokens, is_open=is_open, opens=opens, ends=ends))
        self._tokens: list[int] = []

    def allowed(self) -> list[int]:
        """Which tokens may come next."""
        values: Any = self._mask(self._tokens[-1] if self._tokens else None, mx.zeros((1, _VOCAB)))[0].tolist()
        return [token for token, value in enumerate(values) if value == 0]

    def say(self, tokens: Sequence[int], *, freely: bool = True) -> None:
        """Go on with some tokens, of which each must be allowed; `freely`: and every other one, too."""
        for token in tokens:
            assert self.allowed() == (_ANY if freely else [token]), f"after {self._tokens}"
            self._tokens.append(token)


@pytest.mark.parametrize("ends", _ENDS)
@pytest.mark.parametrize("opens", _OPENS)
@pytest.mark.parametrize("is_open", [True, False], ids=["opened by the prompt", "opened by the model"])
def test_a_second_block_is_limited_like_the_first(is_open: bool, opens: tuple[int, ...], ends: tuple[int, ...]) -> None:
    answer = Answer(2, is_open=is_open, opens=opens, ends=ends)
    for number in range(3):
        if number or not is_open:
            answer.say([_SAID, _SAID, _SAID, *opens])
        answer.say([_SAID, _SAID])
        answer.say(ends, freely=False)
    answer.say([_SAID] * 5)


@pytest.mark.parametrize("ends", _ENDS)
def test_a_block_after_one_that_ended_in_time_has_its_whole_budget(ends: tuple[int, ...]) -> None:
    answer = Answer(4, is_open=True, ends=ends)
    answer.say([_SAID, *ends, _SAID, 5])
    answer.say([_SAID] * 4)
    answer.say(ends, freely=False)
    answer.say([_SAID] * 8)


def test_an_end_that_the_model_begins_is_finished_and_not_begun_again() -> None:
    """The mark's first token is part of the reasoning until the second one makes it a mark."""
    answer = Answer(2, is_open=True, ends=(6, 7))
    answer.say([_SAID, 6])
    answer.say([7], freely=False)
    answer.say([_SAID] * 5)


def test_no_budget_at_all_ends_a_block_at_once() -> None:
    answer = Answer(0, is_open=True)
    answer.say([7], freely=False)
    answer.say([_SAID, 5])
    answer.say([7], freely=False)
    answer.say([_SAID] * 3)


def test_marks_apart_are_no_mark() -> None:
    answer = Answer(1, is_open=False, opens=(4, 5))
    answer.say([4, _SAID, 5, _SAID, 5, 4, _SAID, _SAID])
