"""Which prompts are read next, and how much of them: nobody starves, short ones do not wait, passes are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.engine.prefill import LEAST_SHARED, Prompt, plan, rank

_ROOM = 64


def _prompt(id_: int, size: int, *, done: int = 0, read: int = 0, stops: Sequence[int] = ()) -> Prompt:
    return Prompt(id_, size, rank(read, size - done), done, list(stops))


@st.composite
def _prompts(draw: st.DrawFn) -> list[Prompt]:
    made = []
    for id_ in range(draw(st.integers(1, 12))):
        size = draw(st.integers(1, 400))
        done = draw(st.integers(0, size - 1))
        stops = draw(st.lists(st.integers(1, size), max_size=2))
        made.append(_prompt(id_, size, done=done, read=draw(st.integers(0, 500)), stops=stops))
    return made


def _constant(_: int) -> int:
    return _ROOM


@given(prompts=_prompts(), slots=st.integers(1, 12), room=st.integers(1, 200))
def test_a_pass_reads_no_more_than_there_is_room_for(prompts: list[Prompt], slots: int, room: int) -> None:
    chosen = plan(prompts, slots=slots, room=lambda _: room)
    by_id = {prompt.id: prompt for prompt in prompts}
    pieces = [min(chosen.tokens, by_id[id_].left) for id_ in chosen.ids]
    readers = [piece for piece in pieces if piece]
    assert chosen.size == len(readers) * chosen.tokens <= room
    assert chosen.tokens == max(readers, default=0)
    assert len(set(chosen.ids)) == len(chosen.ids) <= slots
    assert chosen.context == max((by_id[id_].done for id_ in chosen.ids if by_id[id_].left), default=0)


@given(prompts=_prompts(), room=st.integers(1, 200))
def test_prompts_are_read_together_where_all_of_them_are_read_to_their_ends(prompts: list[Prompt], room: int) -> None:
    chosen = plan(prompts, slots=100, room=lambda _: room)
    lefts = [prompt.left for prompt in prompts if prompt.id in chosen.ids and prompt.left]
    assert len(lefts) == 1 or max(lefts, default=0) == chosen.tokens


def _serve(prompts: Iterable[tuple[int, Prompt]], *, slots: int = 100) -> dict[int, int]:
    """Read all prompts, each of which arrives after so many tokens: how many tokens were read when each was."""
    coming = sorted(prompts, key=lambda pair: pair[0])
    waiting: dict[int, Prompt] = {}
    ends: dict[int, int] = {}
    clock = 0
    for _ in range(10_000):
        while coming and (coming[0][0] <= clock or not waiting):
            arrival, prompt = coming.pop(0)
            clock = max(clock, arrival)
            waiting[prompt.id] = replace(prompt, rank=rank(clock, prompt.size - prompt.done))
        if not waiting:
            return ends
        chosen = plan(waiting.values(), slots=slots, room=_constant)
        assert chosen.ids, "nothing is read, and something waits"
        for id_ in chosen.ids:
            prompt = waiting[id_]
            piece = min(chosen.tokens, prompt.left)
            clock += piece
            prompt.done += piece
            if prompt.done >= prompt.size - 1:
                ends[id_] = clock
                del waiting[id_]
    raise AssertionError("prompts are not read to their ends")


@given(prompts=_prompts(), arrivals=st.lists(st.integers(0, 2000), min_size=12, max_size=12), slots=st.integers(1, 4))
def test_every_prompt_is_read_to_its_end(prompts: list[Prompt], arrivals: list[int], slots: int) -> None:
    ends = _serve(zip(arrivals, prompts, strict=False), slots=slots)
    assert ends.keys() == {prompt.id for prompt in prompts}


@given(size=st.integers(1, 1000), others=st.lists(st.integers(1, 300), max_size=40))
def test_a_long_prompt_waits_for_no_more_than_its_own_length_of_those_that_came_later(
    size: int, others: list[int]
) -> None:
    """However many short ones come, one after the other."""
    arrivals = [(1 + sum(others[:at]), _prompt(1 + at, other)) for at, other in enumerate(others)]
    ends = _serve([(0, _prompt(0, size)), *arrivals])
    assert ends[0] <= 2 * size + _ROOM + max(others, default=0)


def test_a_short_prompt_overtakes_long_ones() -> None:
    ends = _serve([(0, _prompt(0, 4000)), (0, _prompt(1, 4000)), (1, _prompt(2, 60))])
    assert min(ends, key=lambda id_: ends[id_]) == 2
    assert ends[2] < 200


def test_a_long_prompt_is_read_in_pieces_of_one_length() -> None:
    """A last piece of a few tokens would cost a whole step."""
    prompt = _prompt(0, 70)
    assert plan([prompt], slots=1, room=_constant).tokens == 35
    prompt.done = 35
    assert plan([prompt], slots=1, room=_constant).tokens == 34


def test_a_stop_ends_a_piece() -> None:
    prompt = _prompt(0, 50, stops=[20])
    assert plan([prompt], slots=1, room=_constant).tokens == 20
    prompt.done = 20
    assert plan([prompt], slots=1, room=_constant).tokens == 29


def test_a_prompt_is_cut_at_the_stops_that_lie_ahead() -> None:
    prompt = _prompt(0, 6, done=1, stops=[4, 1, 2])
    assert prompt.segments([10, 11, 12, 13, 14, 15]) == [[11], [12, 13], [14, 15]]


def test_a_prompt_with_nothing_left_to_read_takes_no_room() -> None:
    prompts = [_prompt(0, 400), *(_prompt(id_, 9, done=8) for id_ in range(1, 5))]
    chosen = plan(prompts, slots=4, room=_constant)
    assert set(chosen.ids) == {1, 2, 3, 4}
    chosen = plan(prompts, slots=9, room=_constant)
    assert set(chosen.ids) == {0, 1, 2, 3, 4}
    assert chosen.size == 57


# What prompts share -----------------------------------------------------------------------------------------------


def _sharing(sizes: Sequence[int], shared: int) -> list[Prompt]:
    prompts = [_prompt(id_, size) for id_, size in enumerate(sizes)]
    for prompt in prompts:
        prompt.shared = {other.id: shared for other in prompts if other is not prompt}
    return prompts


def test_what_many_share_is_read_by_the_first_of_them_alone() -> None:
    prompts = _sharing([130, 120, 140], 100)
    assert plan(prompts, slots=3, room=lambda _: 1000).ids == (1,)


def test_one_that_shares_nothing_is_not_held_up() -> None:
    prompts = [*_sharing([120, 120], 100), _prompt(7, 110)]
    assert plan(prompts, slots=3, room=lambda _: 1000).ids == (7, 0)


def test_what_is_read_or_too_short_to_wait_for_is_not_waited_for() -> None:
    first, second = _sharing([160, 160], 150)
    assert not second.waits_for(replace(first, done=150))
    assert second.waits_for(replace(first, done=149))
    assert not replace(second, done=150 - LEAST_SHARED + 1).waits_for(first)
    assert replace(second, done=150 - LEAST_SHARED).waits_for(first)
    assert not replace(second, has_begun=True).waits_for(first), "it has a cache of its own"


@given(data=st.data(), prompts=_prompts(), slots=st.integers(1, 4))
def test_prompts_that_share_anything_are_all_read(data: st.DataObject, prompts: list[Prompt], slots: int) -> None:
    """Whatever begins like what, and whether or not a part that was read can be had in the end."""
    for prompt in prompts:
        for other in prompts[: prompt.id]:
            shared = data.draw(st.integers(0, min(prompt.size, other.size)))
            if shared > 0:
                prompt.shared[other.id] = other.shared[prompt.id] = shared
    ends = _serve(((0, prompt) for prompt in prompts), slots=slots)
    assert len(ends) == len(prompts)
