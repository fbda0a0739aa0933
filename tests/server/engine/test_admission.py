"""Sequences begin only when their KV caches fit in memory, in an order in which nobody waits for ever."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import cache as caches
from mlx_overlay_server import memory
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.admission import MOST_PASSES, Admission
from mlx_overlay_server.engine.commands import Cancel, Load, Sampled, Submit, Unload
from mlx_overlay_server.errors import PromptTooLong, Unavailable
from mlx_overlay_server.memory import GROWTH, LEAST_TOKENS, SPARE, Images, KvSize, Machine, shares
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.soak import memory as soak
from tests.support.stage import Script, Stage, sequence, until


def _submit(id_: int, needed: int, *, key: str = "m") -> Submit:
    """Return a sequence that needs room for so many tokens, with those by which its KV cache grows."""
    return Submit(id_, key, (1,) * (needed - GROWTH), Params(), 10**6)


def _begun(admission: Admission, taken: int = 0) -> list[int]:
    begun = []
    while (submit := admission.next(taken)) is not None:
        begun.append(submit.id)
    return begun


def test_what_fits_begins_at_once_in_its_order() -> None:
    admission = Admission(10_000, 32)
    for id_ in range(5):
        admission.add(_submit(id_, 1000), KvSize(1))
    assert _begun(admission) == [0, 1, 2, 3, 4]


def test_a_batch_takes_its_rows_times_its_longest_row() -> None:
    admission = Admission(10_000, 32)
    for id_, size in enumerate((1000, 1000, 4000)):
        admission.add(_submit(id_, size), KvSize(1))
    assert _begun(admission) == [0, 1], "3 rows of 4,000 do not fit, though 1,000 + 1,000 + 4,000 do"
    admission.drop(0)
    assert _begun(admission) == [2], "2 rows do"


def test_models_have_batches_of_their_own() -> None:
    admission = Admission(10_000, 32)
    for id_, (size, key) in enumerate(((1000, "a"), (1000, "a"), (4000, "b"), (4000, "b"))):
        admission.add(_submit(id_, size, key=key), KvSize(1))
    assert _begun(admission) == [0, 1, 2, 3]


def test_weights_and_kept_caches_leave_less() -> None:
    admission = Admission(10_000, 32)
    for id_ in range(3):
        admission.add(_submit(id_, 1000), KvSize(1))
    assert _begun(admission, taken=7500) == [0, 1]
    assert admission.missing(7500) == 500
    assert _begun(admission, taken=7000) == [2]
    assert admission.missing(7500) == 0


def test_where_nothing_runs_the_first_begins_whatever_it_needs() -> None:
    admission = Admission(10_000, 32)
    admission.add(_submit(0, 50_000), KvSize(1))
    admission.add(_submit(1, 50_000), KvSize(1))
    assert _begun(admission) == [0]
    admission.drop(0)
    assert _begun(admission) == [1]


def test_an_answer_is_counted_as_it_grows() -> None:
    admission = Admission(3 * GROWTH, 32)
    admission.add(_submit(0, GROWTH + 1), KvSize(1))
    assert _begun(admission) == [0]
    for _ in range(GROWTH // 2):
        admission.grow(0)
    admission.add(_submit(1, GROWTH + 1), KvSize(1))
    assert _begun(admission) == []
    admission.drop(1)
    assert admission.waiting == 0


def test_no_batch_has_more_rows_than_it_may() -> None:
    admission = Admission(10_000, rows=3)
    for id_ in range(8):
        admission.add(_submit(id_, 3000), KvSize(1))
    assert _begun(admission) == list(range(8)), "3 rows of 3,000 fit; the others take nothing until one of them ends"


def test_answers_that_outgrow_the_limit_show() -> None:
    admission = Admission(10_000, 32)
    for id_ in range(2):
        admission.add(_submit(id_, 4000), KvSize(1))
    assert _begun(admission) == [0, 1]
    assert admission.excess(0) == 0
    for _ in range(500):
        admission.grow(1)
    assert admission.excess(2000) == 2 * 4500 + 2000 - 10_000


def test_what_began_last_is_paused_first_and_goes_on_first() -> None:
    admission = Admission(10_000, 32)
    for id_ in range(3):
        admission.add(_submit(id_, 3500), KvSize(1))
    admission.add(_submit(3, 5000), KvSize(1))
    assert _begun(admission) == [0, 1]
    assert admission.pauses() == [1], "the first is never paused"
    admission.pause(1)
    assert (admission.waiting, admission.pauses()) == (3, [])
    assert _begun(admission, taken=5000) == []
    admission.drop(0)
    assert _begun(admission, taken=5000) == [1]
    admission.pause(1)
    assert admission.refuse() is None, "what has begun is not refused"
    assert admission.clear() == [1]
    assert [admission.refuse(), admission.refuse()] != [None, None]
    assert admission.waiting == 0


def test_a_large_one_is_passed_by_no_more_than_a_few() -> None:
    admission = Admission(10_000, 32)
    admission.add(_submit(0, 1000), KvSize(1))
    assert _begun(admission) == [0]
    admission.add(_submit(1, 10_000), KvSize(1))
    for id_ in range(2, 100):
        admission.add(_submit(id_, 300), KvSize(1))
        for begun in _begun(admission):
            admission.drop(begun)
    assert admission.waiting == 99 - MOST_PASSES
    admission.drop(0)
    assert _begun(admission)[0] == 1


@given(st.data())
def test_nothing_begins_that_does_not_fit_and_everything_begins_in_the_end(data: st.DataObject) -> None:
    limit, kv = 10_000, {"a": 1, "b": 3, "unknown": 0}
    admission = Admission(limit, 32)
    running: dict[int, Submit] = {}
    unseen = set(range(data.draw(st.integers(0, 30))))
    for id_ in sorted(unseen):
        key = data.draw(st.sampled_from(sorted(kv)))
        admission.add(_submit(id_, GROWTH + data.draw(st.integers(1, 6000)), key=key), KvSize(kv[key]))
    for _ in range(100):
        while (submit := admission.next(0)) is not None:
            others = bool(running)
            assert isinstance(submit, Submit)
            running[submit.id] = submit
            unseen.discard(submit.id)
            lengths: dict[str, list[int]] = {}
            for each in running.values():
                lengths.setdefault(each.key, []).append((len(each.prompt) + GROWTH) * kv[each.key])
            assert not others or sum(len(rows) * max(rows) for rows in lengths.values()) <= limit
        if not running:
            break
        ended = data.draw(st.sampled_from(sorted(running)))
        del running[ended]
        admission.drop(ended)
    assert not unseen


# What a token takes -----------------------------------------------------------------------------------------------


class _Model:
    """A model of some layers' caches, which it fills as a real one does."""

    def __init__(self, *layers: Any) -> None:
        self._layers = layers

    def make_cache(self) -> list[Any]:
        return [make() for make in self._layers]

    def __call__(self, tokens: Any, cache: list[Any]) -> None:
        import mlx.core as mx

        for layer in cache:
            if isinstance(layer, caches.ArraysCache):
                layer[0] = mx.zeros((1, 500))
            else:
                rows = mx.zeros((1, 2, tokens.shape[1], 64), dtype=mx.bfloat16)
                layer.update_and_fetch(rows, rows)


_ROW = 2 * 2 * 64 * 2  # keys and values of two heads of 64 numbers in two bytes each


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((caches.KVCache,), _ROW),
        ((caches.KVCache, caches.KVCache), 2 * _ROW),
        ((caches.KVCache, lambda: caches.RotatingKVCache(4096)), _ROW),
        ((lambda: caches.ArraysCache(1), caches.KVCache), _ROW),
        ((lambda: caches.ArraysCache(1),), 0),
    ],
    ids=["one layer", "two layers", "a sliding window", "a recurrent state", "no KV cache"],
)
def test_a_token_takes_what_the_model_s_own_caches_take_for_it(layers: Any, expected: int) -> None:
    assert _size(*layers).token == expected


def _size(*layers: Any, bits: int | None = None) -> KvSize:
    return mlx.kv_size(_Model(*layers), bits=bits, group_size=64, start=300)


def test_a_sliding_window_takes_as_much_as_any_layer_until_it_is_full() -> None:
    size = _size(caches.KVCache, lambda: caches.RotatingKVCache(4096))
    assert (size.early, size.fixed) == (2 * _ROW, 0)
    assert 4096 <= size.until <= 4096 + 1024, "and a pass may read beyond it"
    assert size.nbytes(2000) == 2000 * 2 * _ROW
    assert size.nbytes(10_000) == 10_000 * _ROW + size.until * _ROW


def test_a_state_is_there_from_the_first_token_on() -> None:
    assert _size(lambda: caches.ArraysCache(1), caches.KVCache).nbytes(10) == 2000 + 10 * _ROW


@given(
    st.builds(KvSize, st.integers(1, 99), st.integers(0, 99), st.integers(0, 999), st.integers(0, 9999), st.booleans()),
    st.integers(0, 10**6),
)
def test_what_fits_fits_and_one_token_more_does_not(size: KvSize, nbytes: int) -> None:
    if size.early < size.token:
        return
    fits = size.tokens(nbytes)
    assert fits is not None
    assert not fits or size.nbytes(fits) <= nbytes
    assert size.nbytes(fits + 1) > nbytes
    assert size.nbytes(fits + 1) >= size.nbytes(fits), "a longer sequence takes less"


def test_images_count_until_they_are_read_and_what_stays_of_them_as_long_as_the_sequence() -> None:
    admission = Admission(10_000, 32)
    admission.add(_submit(0, 1000), KvSize(1), images=Images(kept=500, looking=7000), is_alone=True)
    assert _begun(admission) == [0]
    assert admission.running_bytes == 8500
    admission.grow(0)
    assert admission.running_bytes == 1501


def test_a_quantised_cache_takes_less() -> None:
    assert _size(caches.KVCache, bits=4) == KvSize(int(_ROW * 4.5 / 16), _ROW, 300, is_quantised=True)


def test_a_model_that_cannot_be_traced_runs_without_the_number() -> None:
    class Broken(_Model):
        def __call__(self, tokens: Any, cache: list[Any]) -> None:
            raise ZeroDivisionError

    assert mlx.kv_size(Broken(caches.KVCache), bits=None, group_size=64, start=0) == KvSize()


def test_a_sequence_may_have_as_many_tokens_as_fit_beside_its_model() -> None:
    divided = shares(Machine(16 * 10**9, is_metal=True))
    small, large = (divided.tokens(weights, KvSize(100_000)) for weights in (10**9, 9 * 10**9))
    assert small is not None
    assert large is not None
    assert small - large == 8 * 10**9 // 100_000
    assert large * 100_000 + 9 * 10**9 + divided.pool < divided.usable
    assert divided.tokens(10**9, KvSize()) is None
    assert divided.tokens(10**12, KvSize(100_000)) == LEAST_TOKENS


# In the engine ----------------------------------------------------------------------------------------------------

_CONTEXT = 4096
_GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "random", context=_CONTEXT)


def _machine(monkeypatch: pytest.MonkeyPatch, usable: int, *, least: int = LEAST_TOKENS) -> None:
    monkeypatch.setattr(mlx, "machine", lambda: Machine(usable))
    monkeypatch.setattr(memory, "LEAST_TOKENS", least)


def _loaded(stage: Stage, key: str) -> Loaded:
    loaded = stage.settled[key]
    assert isinstance(loaded, Loaded)
    return loaded


def test_the_context_is_what_memory_has_room_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def script(stage: Stage) -> Script:
        yield [Load("a", str(model))]
        yield from until(lambda: stage.loaded("a"))

    whole = _loaded(Stage(EngineOptions()).play(script), "a")
    assert whole.context == _CONTEXT
    assert whole.kv.token > 0
    assert not caplog.text
    _machine(monkeypatch, int((whole.nbytes + 3000 * whole.kv.token) * 1.1))
    less = _loaded(Stage(EngineOptions()).play(script), "a")
    assert less.context is not None
    assert LEAST_TOKENS <= less.context < _CONTEXT
    assert f"memory for {less.context} tokens" in caplog.text


def test_sequences_wait_for_memory_and_all_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is cancelled, and those of a model that is unloaded, do not wait any longer."""
    most: list[int] = []

    def script(stage: Stage) -> Script:
        yield [Load("a", str(model)), Load("b", str(model))]
        yield from until(lambda: stage.loaded("a", "b"))
        ids = range(1, 9)
        yield [sequence(id_, "a", max_tokens=5) for id_ in ids]
        while not all(stage.is_over(id_) for id_ in ids):
            most.append(stage.stats.active)
            yield []
        assert all(isinstance(stage.items[id_][-1], Sampled) for id_ in ids)
        large = replace(sequence(11, "a", max_tokens=10**6), prompt=(97,) * 600)
        yield [large, sequence(12, "b", max_tokens=10**6)]
        yield from until(lambda: stage.has_begun(11))
        yield [sequence(13, "b"), sequence(14, "a", max_tokens=3)]
        yield []
        assert stage.stats.waiting == 3
        yield [Cancel(14), Unload("b")]
        yield from until(lambda: stage.is_over(12) and stage.is_over(13))
        assert [type(stage.items[id_][-1]) for id_ in (12, 13)] == [Unavailable] * 2
        yield [Cancel(11), sequence(15, "a", max_tokens=3)]
        yield from until(lambda: stage.is_over(15))
        assert (stage.stats.active, stage.stats.waiting) == (0, 0)

    loaded = Stage(EngineOptions()).play(lambda stage: iter_load(stage, model))
    size = _loaded(loaded, "a")
    row = (2 + GROWTH) * size.kv.token
    _machine(monkeypatch, int((2 * size.nbytes + 3.5 * row) * 16 / 15) + 2, least=1)
    Stage(EngineOptions(cache_bytes=0)).play(script)
    assert max(most) == 3


def test_answers_that_grow_take_the_memory_of_kept_prefixes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _loaded(Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)), "a")

    def script(stage: Stage) -> Script:
        yield from iter_load(stage, model)
        yield [sequence(1, "a", max_tokens=100)]
        yield from until(lambda: stage.is_over(1))
        assert stage.stats.cache_entries == 1
        yield [sequence(2, "a", max_tokens=10**6)]
        yield from until(lambda: stage.has_begun(2))
        yield []
        assert stage.stats.cache_entries == 1
        yield from until(lambda: stage.stats.steps > 770)
        yield [Cancel(7)]  # any command, for fresh stats
        yield []
        assert stage.stats.cache_entries == 0
        assert stage.stats.active == 1
        yield from until(lambda: stage.is_over(2))
        last = stage.items[2][-1]
        assert isinstance(last, Sampled)
        assert last.finish == "length", "memory ends it, for which nothing more can be freed"

    _machine(monkeypatch, int((loaded.nbytes + (700 + GROWTH) * loaded.kv.token) * 16 / 15), least=1)
    Stage(EngineOptions(cache_bytes=400 * loaded.kv.token)).play(script)


def iter_load(stage: Stage, model: Path) -> Script:
    """A script that loads a model, and ends."""
    yield [Load("a", str(model))]
    yield from until(lambda: stage.loaded("a"))


def test_no_more_memory_is_in_use_than_there_is(tmp_path: Path) -> None:
    """P14, as `make soak` tries it at random: by MLX's own count."""
    folders = soak.models(tmp_path)
    budget = 8 * soak.weights(folders[0])
    played = soak.played(folders, budget, Random(20), sequences=8, disk=tmp_path / "kv")
    assert played.restored > 0, "nothing was read from disk: the test shows less"
    assert played.peak <= soak.MOST * budget
    assert played.on_disk == 0
    assert len(played.items) == 8
    assert all(isinstance(items[-1], Sampled | PromptTooLong | Unavailable) for items in played.items)


def test_a_model_without_room_for_one_sequence_is_not_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = _loaded(Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)), "a")
    _machine(monkeypatch, int((loaded.nbytes + 1000 * loaded.kv.token) * 16 / 15))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    refused = Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)).settled["a"]
    assert isinstance(refused, Unavailable)
    assert refused.code == "model_too_large"
    assert mx.get_peak_memory() - before < loaded.nbytes, "no weights were read"


def test_a_prompt_that_never_fits_is_refused_with_what_would(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(stage: Stage) -> Script:
        yield from iter_load(stage, model)
        yield [sequence(1, "a", max_tokens=5), replace(sequence(2, "a"), prompt=(97,) * 900)]
        yield from until(lambda: stage.is_over(1) and stage.is_over(2))

    loaded = _loaded(Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)), "a")
    _machine(monkeypatch, int((loaded.nbytes + (800 + GROWTH) * loaded.kv.token) * 16 / 15), least=1)
    stage = Stage(EngineOptions()).play(script)
    assert isinstance(stage.items[1][-1], Sampled)
    refused = stage.items[2][-1]
    assert isinstance(refused, PromptTooLong)
    assert re.match(r"prompt is too long: 900 tokens > 799 maximum", refused.message)


def test_what_other_programs_leave_is_all_there_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits as long as another runs, and goes on when that has ended; without another, it is refused."""
    loaded = _loaded(Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)), "a")

    def script(stage: Stage) -> Script:
        yield from iter_load(stage, model)
        yield [sequence(1, "a", max_tokens=5)]
        yield from until(lambda: stage.is_over(1))
        monkeypatch.setattr(mlx, "reach", lambda: loaded.nbytes + int(_GB * SPARE))
        yield [sequence(2, "a", max_tokens=5)]
        yield from until(lambda: stage.is_over(2))

    _machine(monkeypatch, _GB)
    stage = Stage(EngineOptions(cache_bytes=0)).play(script)
    assert isinstance(stage.items[1][-1], Sampled)
    refused = stage.items[2][-1]
    assert isinstance(refused, Unavailable)
    assert refused.code == "insufficient_memory"


def test_a_load_waits_for_sequences_and_takes_what_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []

    def script(stage: Stage) -> Script:
        yield from iter_load(stage, model)
        yield [sequence(1, "a", max_tokens=40)]
        yield from until(lambda: stage.has_begun(1))
        yield [Load("b", str(model), nbytes=size.nbytes), sequence(2, "a", max_tokens=5)]
        while not stage.is_over(1):
            begun.append(stage.loaded("b") or stage.has_begun(2))
            yield []
        yield from until(lambda: stage.loaded("b") and stage.is_over(2))

    size = _loaded(Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)), "a")
    _machine(monkeypatch, int((2 * size.nbytes + GROWTH * size.kv.token) * 16 / 15), least=1)
    stage = Stage(EngineOptions(cache_bytes=0)).play(script)
    assert begun
    assert not any(begun)
    assert isinstance(stage.items[2][-1], Sampled)


def test_answers_that_outgrow_the_memory_take_turns(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of two models, and one that runs alone."""
    seeded = {"params": Params(temperature=1, seed=3)}

    def script(stage: Stage) -> Script:
        yield [Load("a", str(model)), Load("b", str(model))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(9, "a", max_tokens=1)]  # the steps of one model and of two are counted
        yield from until(lambda: stage.is_over(9))
        yield [sequence(1, "a", max_tokens=330), sequence(2, "b", max_tokens=330)]
        yield [sequence(3, "b", max_tokens=330, **seeded)]
        yield from until(lambda: all(stage.has_begun(id_) for id_ in (1, 2, 3)))
        while not all(stage.is_over(id_) for id_ in (1, 2, 3)):
            waiting.append(stage.stats.waiting)
            yield []

    loaded = _loaded(Stage(EngineOptions()).play(lambda stage: iter_load(stage, model)), "a")
    waiting: list[int] = []
    free = _said(Stage(EngineOptions()).play(script))
    assert [len(each) for each in free] == [330] * 3
    assert max(waiting) == 0
    _machine(monkeypatch, int((2 * loaded.nbytes + 900 * loaded.kv.token) * 16 / 15), least=1)
    assert _said(Stage(EngineOptions(cache_bytes=0)).play(script)) == free
    assert max(waiting) > 1, "only one of them was ever paused"


def _said(stage: Stage) -> list[list[int]]:
    return [[item.token for item in stage.items[id_] if isinstance(item, Sampled)] for id_ in (1, 2, 3)]
