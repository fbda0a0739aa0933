"""A KV cache with room for more rows holds the same as one without, whoever joins and leaves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, KVCache
from mlx_overlay_server.engine.mlx_rows import RoomyKVCache, filled, roomy
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.running import Running

_NUMBERS = itertools.count(1)


def _arrays(rows: int, tokens: int) -> tuple[mx.array, mx.array]:
    """Keys and values of two heads; no number is there twice."""
    numbers = [float(next(_NUMBERS)) for _ in range(rows * 2 * tokens)]
    keys = mx.array(numbers).reshape(rows, 2, tokens, 1)
    return keys, -keys


def _batch(lengths: list[int]) -> BatchKVCache:
    made = []
    for length in lengths:
        cache = KVCache()
        cache.update_and_fetch(*_arrays(1, length))
        made.append(cache)
    return BatchKVCache.merge(made)


def _content(cache: KVCache) -> list[object]:
    return [array.tolist() for array in cache.keys_and_values()]


_STEPS = st.one_of(
    st.tuples(st.just("join"), st.lists(st.sampled_from([1, 2, 5, 255, 300]), min_size=1, max_size=3)),
    st.tuples(st.just("leave"), st.sets(st.integers(0, 5), max_size=3)),
    st.tuples(st.just("draw"), st.integers(1, 3)),
    st.tuples(st.just("draw"), st.just(256)),
    st.tuples(st.just("resize"), st.integers(0, 3)),
)


@settings(max_examples=40)
@example(lengths=[1, 4], steps=[("leave", {1}), ("draw", 1), ("join", [300]), ("leave", {1}), ("draw", 256)])
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3), steps=st.lists(_STEPS, max_size=12))
def test_rows_hold_what_was_put_into_them(lengths: list[int], steps: list[tuple[str, Any]]) -> None:
    first = _batch(lengths)
    rows = [first.extract(row) for row in range(len(lengths))]
    (batch,) = roomy([first])
    for what, more in steps:
        if what == "join":
            other = _batch(more)
            rows += [other.extract(row) for row in range(len(more))]
            batch.extend(other)
        elif what == "leave" and (keep := [row for row in range(len(rows)) if row not in more]):
            order = filled(keep)
            assert sorted(order) == keep
            rows = [rows[row] for row in order]
            batch.filter(order)
        elif what == "draw":
            added = _arrays(len(rows), more)
            batch.update_and_fetch(*added)
            for row, cache in enumerate(rows):
                cache.update_and_fetch(*(array[row : row + 1] for array in added))
        elif what == "resize":
            batch.resize(len(rows) + more)
            assert batch.capacity == len(rows) + more
        assert batch.rows == len(rows)
        assert batch.offset.tolist() == [cache.offset for cache in rows]
    assert [_content(batch.extract(row)) for row in range(len(rows))] == [_content(cache) for cache in rows]
    keys, values = batch.keys_and_values()
    assert keys.shape == values.shape == (len(rows), 2, max(cache.offset for cache in rows), 1)


def test_a_row_that_joins_finds_nothing_of_the_one_that_had_its_place() -> None:
    """What is masked counts nothing, but nothing times infinity is not a number."""
    broken = _batch([5, 5])
    broken.keys[1] = float("nan")
    (batch,) = roomy([broken])
    batch.filter([0])
    batch.extend(_batch([2]))
    assert mx.isfinite(batch.keys_and_values()[0]).all().item()


def test_few_rows_of_many_move_where_one_leaves() -> None:
    assert filled([0, 2, 3, 4, 5]) == [0, 5, 2, 3, 4]
    assert filled([3, 4]) == [4, 3]
    assert filled([]) == []


def test_one_that_joins_and_one_that_leaves_do_not_move_the_others() -> None:
    (batch,) = roomy([_batch([100] * 8)])
    batch.resize(16)
    mx.eval(batch.keys, batch.values)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(8):
        batch.extend(_batch([90]))
        mx.eval(batch.keys, batch.values)
        left = batch.extract(3)
        batch.filter(filled([0, 1, 2, *range(4, batch.rows)]))
        mx.eval(left.state)
        mx.eval(batch.keys, batch.values)
    assert mx.get_peak_memory() - before < batch.nbytes / 4


def test_a_burst_has_room_made_for_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each that joins: the sequences before it would be copied each time."""
    running = Running(make_random_model(tmp_path / "endless"), EngineOptions(prefill_step=64))
    resized: list[int] = []
    original = RoomyKVCache.resize

    def resize(cache: RoomyKVCache, rows: int, **more: int) -> None:
        resized.append(rows)
        original(cache, rows, **more)

    monkeypatch.setattr(RoomyKVCache, "resize", resize)
    for number in range(20):
        running.add([97 + number, *range(97, 97 + 29)], max_tokens=20 + number)
    running.finish()
    layers = len(running.runner._model.layers)
    assert resized[:layers] == [20] * layers
    assert len(resized) <= 4 * layers, "half of them have left, then half of those"
    running.runner.close()
