"""What a pass may read is learnt from passes, so that those that decode wait as long as is wanted and no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.engine.pace import Pace

_STALL = 0.25


def _steps(
    pace: Pace, cost: Callable[[int, int], float], *, count: int = 12, context: int = 0, decode: float = 0.0
) -> list[tuple[int, float]]:
    """Read a long prompt while others decode, on a machine with so much cost: sizes and seconds of the steps.

    `decode`: seconds of each step that are not for reading.
    """
    made = []
    for _ in range(count):
        size = pace.room(context, is_decoding=True)
        seconds = cost(size, context)
        pace.note_read(size, context, seconds - decode)
        pace.note_decode(decode, 8)
        made.append((size, seconds))
        context += size
    return made


@given(
    rate=st.floats(100, 1e6), decode=st.floats(0.001, 0.15), fixed=st.floats(0, 0.02), half=st.integers(10**4, 10**6)
)
def test_passes_take_the_time_that_is_wanted(rate: float, decode: float, fixed: float, half: int) -> None:
    pace = Pace(2048, _STALL)
    pace.note_decode(decode, 8)
    steps = _steps(
        pace, lambda size, context: decode + fixed + size * (1 + context / half) / rate, count=20, decode=decode
    )
    for size, seconds in steps[1:]:  # the first is a guess
        assert seconds <= 1.1 * max(_STALL, 2 * decode) or size == 16
    size, seconds = steps[-1]
    most = 2048 * 8192 // (8192 + sum(each for each, _ in steps[:-1]))
    assert seconds >= 0.4 * _STALL or size == most, "it reads needlessly little"


def test_a_machine_that_becomes_slower_is_believed_after_a_few_passes() -> None:
    pace = Pace(10**6, _STALL)
    _steps(pace, lambda size, _: size / 4000)
    slow = _steps(pace, lambda size, _: size / 1000)
    assert slow[0][1] > _STALL
    assert slow[3][1] <= 1.2 * _STALL


def test_many_small_passes_do_not_make_the_next_large_one_small() -> None:
    """Each has costs of its own, whatever its size."""
    pace = Pace(10**6, _STALL)

    def cost(size: int, _: int) -> float:
        return 0.02 + size / 4000

    _steps(pace, cost)
    large = pace.room(0, is_decoding=True)
    for _ in range(20):
        pace.note_read(20, 0, cost(20, 0))
    assert pace.room(0, is_decoding=True) >= 0.9 * large


def test_a_few_tokens_that_compile_a_model_say_nothing_of_its_speed() -> None:
    pace = Pace(10**6, _STALL)
    first = pace.room(0, is_decoding=False)
    pace.note_read(3, 0, 2.0)
    assert pace.room(0, is_decoding=False) == first


def test_a_long_context_is_begun_with_care() -> None:
    pace = Pace(10**6, _STALL)
    near = _steps(pace, lambda size, _: size / 4000, context=0, count=2)[-1][0]
    assert pace.room(30_000, is_decoding=True) < near / 4


@pytest.mark.parametrize(("context", "size"), [(0, 2048), (8192, 1024), (32768, 409), (131072, 120), (10**9, 1)])
def test_however_quick_the_machine_is_memory_bounds_a_pass(context: int, size: int) -> None:
    pace = Pace(2048, _STALL)
    pace.note_read(64, context, 1e-6)
    assert pace.room(context, is_decoding=False) == size


def test_when_decoding_takes_all_the_time_reading_takes_as_much_again() -> None:
    pace = Pace(10**6, _STALL)
    pace.note_decode(10 * _STALL, 8)
    pace.note_read(1000, 0, 1.0)
    assert pace.room(0, is_decoding=True) == pytest.approx(1000 * 10 * _STALL, abs=1)


def test_without_anybody_who_decodes_a_pass_takes_four_times_as_long() -> None:
    pace = Pace(10**6, _STALL)
    pace.note_read(1000, 0, 1.0)
    assert pace.room(0, is_decoding=False) == 900
    assert pace.room(0, is_decoding=True) == 225


def test_a_pass_is_no_smaller_than_pays_on_a_machine_that_is_slow_for_a_single_token() -> None:
    """Else most of the time goes to reading the weights, and every prompt takes many passes."""
    pace = Pace(10**6, _STALL)
    pace.note_decode(_STALL, 1)
    for _ in range(10):
        pace.note_decode(2 * _STALL, 8)
    pace.note_read(1000, 0, 1.0)
    assert pace.room(0, is_decoding=True) == pytest.approx(1000 * 5 * _STALL, abs=1)


def test_a_piece_that_is_smaller_than_there_is_room_for_does_not_slow_the_next() -> None:
    """Pieces of a prompt are of equal length, and each pass has costs of its own."""
    pace = Pace(10**6, _STALL)
    pace.note_read(100, 0, 0.1)
    room = pace.room(0, is_decoding=True)
    pace.note_read(room * 2 // 3, 0, 0.2)
    assert pace.room(0, is_decoding=True) == room
