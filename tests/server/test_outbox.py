"""When the engine's items are handed to the event loop: at once, or held for a moment to go with others."""

from __future__ import annotations

import pytest
from mlx_overlay_server.engine.commands import Item, Prefilled, Sampled
from mlx_overlay_server.engine.outbox import HOLD_SECONDS, Outbox
from mlx_overlay_server.errors import Failed

_TOKEN = Sampled(1, None, (), None)
_SEQUENCES = 32


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(clock: Clock) -> Outbox:
    """In the middle of many answers, just after a hand-over."""
    outbox = Outbox(clock)
    for _ in range(2):
        outbox.add([])
    outbox.sent(_SEQUENCES)
    return outbox


def _is_due(outbox: Outbox) -> bool:
    """For the type checker, to which a property that was False stays False."""
    return outbox.is_due


def test_tokens_in_the_middle_of_answers_are_held_for_a_moment_and_not_longer(outbox: Outbox, clock: Clock) -> None:
    for _ in range(_SEQUENCES - 1):
        clock.now += HOLD_SECONDS
        outbox.add([(1, _TOKEN)])
        assert not _is_due(outbox)
    clock.now += HOLD_SECONDS
    assert _is_due(outbox)
    assert outbox.items == [(1, _TOKEN)] * (_SEQUENCES - 1)


@pytest.mark.parametrize(("step", "steps"), [(1.5, 1), (0.7, 1), (0.6, 2), (0.45, 2), (0.2, 5)])
def test_tokens_are_not_held_for_a_step_that_comes_late(step: float, steps: int, outbox: Outbox, clock: Clock) -> None:
    """`step`: its share of the time that they may be held."""
    for _ in range(steps):
        assert not _is_due(outbox)
        clock.now += step * HOLD_SECONDS * _SEQUENCES
        outbox.add([(1, _TOKEN)])
    assert _is_due(outbox)


def test_with_one_sequence_there_is_next_to_no_wait(clock: Clock) -> None:
    outbox = Outbox(clock)
    outbox.sent(1)
    outbox.add([(1, _TOKEN)])
    clock.now += HOLD_SECONDS
    assert outbox.is_due


@pytest.mark.parametrize(
    "item", [Prefilled(1, 2, 0), Failed("no"), Sampled(1, None, (), "stop"), Sampled(1, None, (), "length")]
)
def test_all_but_a_token_in_the_middle_is_due_at_once_and_takes_the_others_along(outbox: Outbox, item: Item) -> None:
    outbox.add([(1, _TOKEN)])
    outbox.add([(2, item), (3, _TOKEN)])
    assert outbox.is_due
    assert [id_ for id_, _ in outbox.items] == [1, 2, 3]


def test_a_first_token_is_due_at_once_and_the_second_is_not(outbox: Outbox) -> None:
    outbox.expect(1)
    outbox.add([(1, Prefilled(1, 1, 0))])
    outbox.sent(_SEQUENCES)
    outbox.add([(1, _TOKEN)])
    assert outbox.is_due
    outbox.sent(_SEQUENCES)
    outbox.add([(1, _TOKEN)])
    assert not outbox.is_due


def test_nothing_is_due_where_there_is_nothing(outbox: Outbox, clock: Clock) -> None:
    clock.now += 1000
    assert not outbox.is_due


def test_what_was_sent_is_not_changed_when_it_goes(outbox: Outbox) -> None:
    """The event loop may not have read it yet."""
    outbox.add([(1, _TOKEN)])
    sent = outbox.items
    outbox.sent(_SEQUENCES)
    assert sent == [(1, _TOKEN)]
    assert outbox.items == []
