"""Reading prompts lets others breathe, takes stops in between, and means the same in pieces of any size and order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache
from mlx_overlay_server.engine.alone import PIECE
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.running import Running

_STEP = 64
_SEEDED: dict[str, Any] = {"temperature": 1, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    made = Running(folder, EngineOptions(prefill_step=_STEP))
    yield made
    made.runner.close()


def _text(number: int, size: int) -> list[int]:
    """A prompt of so many tokens, like no other from its first token on."""
    return [97 + number % 26, *(97 + (at * (number + 3)) % 26 for at in range(size - 1))]


def _read_in_a_step(running: Running) -> int:
    before = {id_: told[-1].done if (told := running.told(id_)) else 0 for id_ in running.items}
    after = running.progress()
    return sum(done - before[id_] for id_, done in after.items() if done != running.told(id_)[-1].total)


# Bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 15, 40])
def test_all_prompts_together_read_no_more_than_a_step_at_once(count: int, running: Running) -> None:
    """What is read in a step takes memory, and time from the sequences that generate."""
    for number in range(count):
        running.add(_text(number, 5 * _STEP))
    reads = [_read_in_a_step(running) for _ in range(12)]
    assert 0 < max(reads) <= _STEP


class _Machine:
    """Gives a runner a clock of its own, by which each token that is read, and each decoding step, takes some time.

    `weights`: seconds that every pass over a prompt takes on top.
    """

    def __init__(self, running: Running, *, read: float, decode: float, weights: float = 0.0) -> None:
        self.now = 0.0
        self.reads: list[int] = []
        self.silences: list[float] = []
        """Seconds between two tokens of those that decode."""
        batch: Any = running.runner._batch
        original = (batch.read, batch.draw)
        before: dict[int, int] = {}
        drawn_at = 0.0

        def reads(tokens: int) -> Any:
            parts = original[0](tokens)
            done = {part.uid: part.progress[0] for part in parts if not part.end_of_prompt}
            self.reads.append(sum(size - before.get(uid, 0) for uid, size in done.items()))
            before.update(done)
            self.now += read * self.reads[-1] + weights
            return parts

        def draws() -> Any:
            nonlocal drawn_at
            rows = original[1]()
            self.now += decode
            self.silences.append(self.now - drawn_at)
            drawn_at = self.now
            return rows

        batch.read, batch.draw = reads, draws
        running.runner._clock = lambda: self.now


@pytest.mark.parametrize("read", [1e-4, 1e-3, 1e-2])
def test_the_silence_of_those_that_decode_is_bounded_by_time(read: float, folder: Path) -> None:
    """On a slow machine, and on a quick one, which reads on at its speed."""
    running = Running(folder, EngineOptions(max_stall_ms=250))
    machine = _Machine(running, read=read, decode=0.02)
    speaking = [running.add(_text(number, 4), max_tokens=3000) for number in range(4)]
    while not all(running.tokens(id_) for id_ in speaking):
        running.step()
    machine.silences.clear()
    size = 1500
    long = running.add(_text(5, size))
    started, before = machine.now, len(running.tokens(speaking[0]))
    while not running.tokens(long):
        running.step()
    assert max(machine.silences) <= 0.25 + 64 * read * (read > 0.002), "the first pass of a slow machine is a guess"
    assert machine.now - started <= 1.3 * (size * read + 0.02 * len(machine.silences))
    assert len(running.tokens(speaking[0])) - before == len(machine.silences)
    assert len(machine.silences) <= 5 + 1.5 * size * read / 0.2, "it is read in needlessly small pieces"


def test_a_machine_that_is_slow_for_a_single_token_reads_in_passes_that_pay(folder: Path) -> None:
    """Each pass goes through all weights: many small ones would take most of the time for that."""
    running = Running(folder, EngineOptions(max_stall_ms=250))
    machine = _Machine(running, read=0.001, decode=0.08, weights=0.08)
    running.add(_text(24, 4), max_tokens=3)
    running.finish()
    machine.reads.clear()
    for number in range(24):
        running.add(_text(number, 81), max_tokens=200)
    while running.runner._unread:
        running.step()
    assert len(machine.reads) <= 24 * 1.3, "prompts of 80 tokens were read in pieces"


def test_when_nobody_decodes_a_pass_takes_four_times_as_long_at_most(folder: Path) -> None:
    running = Running(folder, EngineOptions(max_stall_ms=100))
    machine = _Machine(running, read=0.001, decode=0.02)
    running.add(_text(5, 1500))
    running.finish()
    assert 300 <= max(machine.reads) <= 400


def test_a_short_prompt_does_not_wait_for_a_long_one(running: Running) -> None:
    long = running.add(_text(0, 40 * _STEP))
    for _ in range(3):
        running.step()
    short = running.add(_text(1, 20), max_tokens=3)
    steps = 0
    while len(running.tokens(short)) < 3:
        running.step()
        steps += 1
    assert steps <= 6
    assert not running.tokens(long)
    running.runner.cancel(long)


def test_a_prompt_that_was_overtaken_is_read_on_from_where_it_was(running: Running) -> None:
    long = running.add(_text(0, 10 * _STEP))
    for number in range(1, 6):
        running.step()
        running.add(_text(number, 20), max_tokens=2)
    running.finish()
    done = [item.done for item in running.told(long)]
    assert done == sorted(done), "a part was read twice"
    assert len(running.tokens(long)) == 3


# Stops --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, _SEEDED], ids=["in the batch", "alone"])
def test_a_stop_takes_effect_between_two_pieces_of_a_prompt(params: dict[str, Any], running: Running) -> None:
    id_ = running.add(_text(0, 8 * PIECE), **params)
    for _ in range(3):
        running.step()
    done = running.told(id_)[-1].done
    assert 0 < done < 4 * PIECE, "the prompt was read at once"
    running.runner.cancel(id_)
    assert not running.runner.is_busy
    again = running.add(_text(0, 8 * PIECE))
    running.step()
    assert (running.told(again)[0].cached == done) == (not params), "what was read is not kept, or was, by a seed"
    running.runner.cancel(again)


def test_a_prompt_that_waits_can_be_cancelled(running: Running) -> None:
    first, second, third = (running.add(_text(number, 3 * _STEP)) for number in range(3))
    running.step()
    running.runner.cancel(second)
    running.finish()
    assert not running.items[second]
    assert len(running.tokens(first)) == len(running.tokens(third)) == 3


def test_sequences_beside_the_batch_read_one_piece_in_a_step(running: Running) -> None:
    speaking = running.add(_text(0, 4), max_tokens=1000, **_SEEDED)
    while not running.tokens(speaking):
        running.step()
    long = [running.add(_text(number, 4 * PIECE), **_SEEDED) for number in (1, 2)]
    batched = running.add(_text(3, 6 * _STEP))
    while not all(running.tokens(id_) for id_ in (*long, batched)):
        spoken = len(running.tokens(speaking))
        before = {id_: len(running.told(id_)) for id_ in (*long, batched)}
        running.step()
        assert len(running.tokens(speaking)) == spoken + 1
        read = [id_ for id_ in before if before[id_] < len(running.told(id_)) and not running.tokens(id_)]
        told = [running.told(id_)[-1] for id_ in read]
        assert sum(item.done < item.total for item in told) <= 1 + (batched in read)
    first, second = ([item.done for item in running.told(id_)] for id_ in long)
    assert first[:4] == second[:4], "they do not take turns"


# Meaning ------------------------------------------------------------------------------------------------------------


@cache
def _alone(folder: Path, number: int, size: int, tokens: int) -> list[int]:
    """What a prompt is answered with when it is read in one piece, and nothing else runs."""
    return _runner(folder, 1 << 20, 1).said(_text(number, size), tokens)


class _Speaking(Running):
    def said(self, prompt: list[int], tokens: int, **params: Any) -> list[int]:
        id_ = self.add(prompt, max_tokens=tokens, **params)
        self.finish()
        return self.tokens(id_)


@cache
def _runner(folder: Path, step: int, batch_size: int) -> _Speaking:
    return _Speaking(folder, EngineOptions(prefill_step=step, batch_size=batch_size))


@settings(max_examples=25)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 20, 70, 150]), st.integers(1, 6)), min_size=1, max_size=8
    ),
    delays=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    step=st.sampled_from([1, 7, 64, 4096]),
    batch_size=st.sampled_from([1, 3, 32]),
    keeps=st.booleans(),
)
def test_the_same_is_said_whatever_the_step_size_the_batch_and_the_order(
    folder: Path, prompts: list[tuple[int, int, int]], delays: list[int], step: int, batch_size: int, keeps: bool
) -> None:
    running = _runner(folder, step, batch_size)
    running.runner._prefixes = running.prefixes = PrefixCache((1 << 30) if keeps else 0)
    ids = []
    for (number, size, tokens), delay in zip(prompts, delays, strict=False):
        ids.append(running.add(_text(number, size), max_tokens=tokens))
        for _ in range(delay):
            running.step()
    running.finish()
    for id_, (number, size, tokens) in zip(ids, prompts, strict=True):
        assert running.tokens(id_) == _alone(folder, number, size, tokens)


def test_a_seed_repeats_a_long_prompt_s_answer_to_the_last_bit_whatever_else_runs(
    running: Running, folder: Path
) -> None:
    prompt = _text(0, 3 * PIECE + 17)
    told = []
    for busy in (False, True):
        if busy:
            for number in range(1, 4):
                running.add(_text(number, 300), max_tokens=50)
        id_ = running.add(prompt, max_tokens=20, logprobs=3, **_SEEDED)
        running.finish()
        told.append(running.sampled(id_))
    assert told[0] == told[1]
    assert len({item.token for item in told[0]}) > 1


def test_pieces_of_a_prompt_that_runs_alone_mean_the_same_as_all_of_it(running: Running, folder: Path) -> None:
    prompt = _text(0, 3 * PIECE + 17)
    quantised = Running(folder, EngineOptions(kv_bits=8, kv_group_size=32, quantized_kv_start=10**6))
    id_ = quantised.add(prompt, max_tokens=10, repetition_penalty=1.3)
    quantised.finish()
    other = running.add(prompt, max_tokens=10, repetition_penalty=1.3)
    running.finish()
    assert len(quantised.told(id_)) > 4, "it was read at once"
    assert quantised.tokens(id_) == running.tokens(other)
    assert quantised.read(prompt).cached == len(prompt) - 1


# What many share ----------------------------------------------------------------------------------------------------


def _agents(running: Running, count: int, shared: int, own: int, **more: Any) -> list[int]:
    common = _text(3, shared)
    return [running.add([*common, *_text(number, own)], **more) for number in range(count)]


def _computed(running: Running, ids: list[int]) -> int:
    """How many tokens of prompts were read for some sequences, which have ended."""
    return sum(running.told(id_)[-1].total - running.told(id_)[-1].cached for id_ in ids)


@pytest.mark.parametrize("step", [64, 2048])
def test_what_many_prompts_share_is_read_once(step: int, folder: Path) -> None:
    running = Running(folder, EngineOptions(prefill_step=step))
    ids = _agents(running, 8, 300, 20)
    running.finish()
    assert _computed(running, ids) == 300 + 8 * 20
    for number, id_ in enumerate(ids):
        assert running.tokens(id_) == _runner(folder, 1 << 20, 1).said([*_text(3, 300), *_text(number, 20)], 3)


def test_a_prompt_may_end_with_a_token_that_ends_answers(running: Running) -> None:
    """As a plain prompt does that holds whole turns. It is the answer's tokens that are looked at, not the prompt's."""
    (end,) = running.runner.loaded.tokenizer.eos_token_ids
    ids = [running.add([*_text(number, 20), end], max_tokens=4) for number in range(2)]
    running.finish()
    for id_ in ids:
        drawn = running.tokens(id_)
        assert len(drawn) == 4 or drawn[-1] == end, "the answer ended with the prompt, or was never told"
        assert drawn, "no token was told"


def test_the_same_prompt_many_times_is_read_once(running: Running) -> None:
    ids = [running.add(_text(0, 300)) for _ in range(6)]
    running.finish()
    assert _computed(running, ids) == 300 + 5
    assert len({tuple(running.tokens(id_)) for id_ in ids}) == 1


def test_what_another_has_read_already_is_taken_from_it_while_it_reads_and_while_it_generates(running: Running) -> None:
    """An agent's brothers arrive a moment later."""
    common = _text(3, 300)
    first = running.add([*common, *_text(0, 300)], max_tokens=1000)
    while running.told(first)[-1:] == [] or running.told(first)[-1].done < 320:
        running.step()
    assert not running.tokens(first)
    second = running.add([*common, *_text(1, 20)])
    while not running.tokens(first):
        running.step()
    third = running.add([*common, *_text(2, 20)])
    while running.runner.active > 1:
        running.step()
    assert [running.told(id_)[-1].cached for id_ in (first, second, third)] == [0, 300, 300]


def test_one_that_shares_a_part_with_one_that_is_being_read_waits_for_that_part(running: Running) -> None:
    common = _text(3, 300)
    first = running.add([*common, *_text(0, 300)])
    running.step()
    assert running.told(first)[-1].done < 200
    second = running.add([*common, *_text(1, 900)])
    running.finish()
    assert running.told(second)[-1].cached == 300


def test_who_waits_for_one_that_leaves_is_read(running: Running) -> None:
    first, *others = _agents(running, 3, 300, 20)
    for _ in range(2):
        running.step()
    done = running.told(first)[-1].done
    assert 0 < done < 300
    running.runner.cancel(first)
    running.finish()
    assert all(len(running.tokens(id_)) == 3 for id_ in others)
    assert _computed(running, others) == 300 + 2 * 20 - done, "what it had read is lost"


def test_without_room_for_kept_caches_everything_is_read(running: Running) -> None:
    running.runner._prefixes = running.prefixes = PrefixCache(0)
    ids = _agents(running, 4, 300, 20)
    running.finish()
    assert all(len(running.tokens(id_)) == 3 for id_ in ids)


def test_caches_that_cannot_be_cut_are_kept_where_what_is_shared_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "is_trimmable", lambda _: False)
    running = Running(folder, EngineOptions(prefill_step=_STEP))
    first = running.add([*_text(3, 300), *_text(0, 20)])
    running.step()
    assert 0 < running.told(first)[-1].done < 300
    others = [running.add([*_text(3, 300), *_text(number, 20)]) for number in (1, 2)]
    running.finish()
    assert _computed(running, [first, *others]) == 300 + 3 * 20
    for number, id_ in enumerate((first, *others)):
        assert running.tokens(id_) == _runner(folder, 1 << 20, 1).said([*_text(3, 300), *_text(number, 20)], 3)


@settings(max_examples=25)
@given(
    prompts=st.lists(
        st.tuples(st.sampled_from([0, 70, 150]), st.integers(0, 4), st.sampled_from([1, 20, 80])),
        min_size=1,
        max_size=8,
    ),
    delays=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    cancelled=st.integers(0, 10),
    step=st.sampled_from([7, 64, 4096]),
    batch_size=st.sampled_from([1, 3, 32]),
    room=st.sampled_from([0, 200_000, 1 << 30]),
)
def test_the_same_is_said_whatever_is_shared(
    folder: Path,
    prompts: list[tuple[int, int, int]],
    delays: list[int],
    cancelled: int,
    step: int,
    batch_size: int,
    room: int,
) -> None:
    running = _runner(folder, step, batch_size)
    running.runner._prefixes = running.prefixes = PrefixCache(room)
    texts = [[*_text(3, shared), *_text(number, own)] for shared, number, own in prompts]
    ids: list[int] = []
    for text, delay in zip(texts, delays, strict=False):
        ids.append(running.add(text, max_tokens=4))
        for _ in range(delay):
            running.step()
    if cancelled < len(ids):
        running.runner.cancel(ids[cancelled])
    running.finish()
    for at, (id_, text) in enumerate(zip(ids, texts, strict=True)):
        expected = _answer(folder, tuple(text))
        assert running.tokens(id_) == expected or (at == cancelled and len(running.tokens(id_)) < 4)


@cache
def _answer(folder: Path, prompt: tuple[int, ...]) -> list[int]:
    runner = _runner(folder, 1 << 20, 1)
    runner.runner._prefixes = runner.prefixes = PrefixCache(0)
    return runner.said(list(prompt), 4)
