"""KV caches of earlier prompts: what is found again, what is given up, and that nothing stored ever changes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)
from mlx_overlay_server.engine.mlx import Cache
from mlx_overlay_server.engine.prefix_cache import PrefixCache

_LAYERS = 2
_BYTES = _LAYERS * 2 * 4
"""What a token takes: keys and values of one float32 in each layer."""
_PLENTY = 1 << 30

Tokens = tuple[int, ...]


def _cache(tokens: Sequence[int]) -> Cache:
    """The KV cache of a sequence, in which a token's keys and values are its number."""
    layers = []
    for _ in range(_LAYERS):
        layer = KVCache()
        array = mx.array([*tokens], dtype=mx.float32).reshape(1, 1, -1, 1)
        layer.state = (array, array + 0, len(tokens))
        layers.append(layer)
    return layers


def _content(cache: Cache | None) -> list[list[float]]:
    """What each layer holds, keys and values."""
    return [] if cache is None else [array.flatten().tolist() for layer in cache for array in layer.keys_and_values()]


def _insert(prefixes: PrefixCache, *tokens: int, key: str = "m", system: int = 0) -> None:
    prefixes.insert(key, tokens, _cache(tokens), system=system)


def _found(prefixes: PrefixCache, prompt: Sequence[int], key: str = "m") -> int:
    """How much of a prompt is known; what comes with it must be that, exactly."""
    cache, length = prefixes.fetch(key, prompt)
    assert _content(cache) == ([list(map(float, prompt[:length]))] * (2 * _LAYERS) if length else [])
    return length


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_the_longest_known_beginning_is_found() -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2, 3)
    _insert(prefixes, 1, 2, 4, 5, 6)
    assert _found(prefixes, [1, 2, 4, 5, 9]) == 4
    assert _found(prefixes, [1, 2, 3, 4]) == 3
    assert _found(prefixes, [1, 9]) == 1
    assert _found(prefixes, [9, 1]) == 0


@pytest.mark.parametrize("prompt", [[1, 2, 3], [1, 2], [1]])
def test_a_token_of_the_prompt_is_left_to_process(prompt: list[int]) -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2, 3)
    assert _found(prefixes, prompt) == len(prompt) - 1


def test_models_share_nothing() -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2, 3, key="m")
    assert _found(prefixes, [1, 2, 3, 4], key="other") == 0


def test_a_dropped_model_is_forgotten_and_the_others_are_not() -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2, 3, key="m")
    _insert(prefixes, 1, 2, 3, key="other")
    prefixes.drop("m")
    assert _found(prefixes, [1, 2, 3, 4], key="m") == 0
    assert _found(prefixes, [1, 2, 3, 4], key="other") == 3
    assert (len(prefixes), prefixes.nbytes) == (1, 3 * _BYTES)


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4, 5], [1, 2, 9, 9]])
def test_what_the_caller_does_to_its_cache_does_not_change_the_stored_one(prompt: list[int]) -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2, 3, 4)
    cache, length = prefixes.fetch("m", prompt)
    assert cache is not None
    for layer in cache:
        new = mx.full((1, 1, 2, 1), -1.0)
        layer.update_and_fetch(new, new)
        layer.keys[..., :1, :] = -2
    assert length in (2, 4)
    assert _found(prefixes, [1, 2, 3, 4, 5]) == 4


def test_two_callers_have_a_cache_each() -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2, 3, 4)
    caches = [prefixes.fetch("m", [1, 2, 3, token])[0] for token in (5, 6)]
    for token, cache in enumerate(caches):
        assert cache is not None
        for layer in cache:
            layer.update_and_fetch(mx.full((1, 1, 1, 1), float(token)), mx.full((1, 1, 1, 1), float(token)))
    assert [_content(cache)[0] for cache in caches] == [[1, 2, 3, 0], [1, 2, 3, 1]]


def test_a_longer_sequence_takes_the_place_of_its_beginning() -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes, 1, 2)
    _insert(prefixes, 1, 2, 3)
    _insert(prefixes, 1, 2)
    assert (len(prefixes), prefixes.nbytes) == (1, 3 * _BYTES)


def test_nothing_is_kept_of_nothing() -> None:
    prefixes = PrefixCache(_PLENTY)
    _insert(prefixes)
    assert len(prefixes) == 0


def test_what_was_used_longest_ago_goes_first() -> None:
    prefixes = PrefixCache(6 * _BYTES)
    _insert(prefixes, 1, 1)
    _insert(prefixes, 2, 2)
    _insert(prefixes, 3, 3)
    assert _found(prefixes, [1, 1, 0]) == 2
    _insert(prefixes, 4, 4)
    assert [_found(prefixes, [token, token, 0]) for token in (1, 2, 3, 4)] == [2, 0, 2, 2]


def test_of_a_conversation_the_system_prompt_is_kept() -> None:
    prefixes = PrefixCache(6 * _BYTES)
    _insert(prefixes, 1, 1, 7, 7, system=2)
    _insert(prefixes, 2, 2, 8, 8, system=2)
    assert _found(prefixes, [2, 2, 8, 8, 0]) == 4
    assert _found(prefixes, [1, 1, 7, 7, 0]) == 2
    assert prefixes.nbytes == 6 * _BYTES


def test_a_system_prompt_goes_after_all_else_and_before_the_budget_is_broken() -> None:
    prefixes = PrefixCache(4 * _BYTES)
    _insert(prefixes, 1, 1, 1, system=3)
    _insert(prefixes, 2, 2)
    assert [_found(prefixes, [token] * 4) for token in (1, 2)] == [3, 0]
    _insert(prefixes, 3, 3, 3, system=3)
    assert [_found(prefixes, [token] * 4) for token in (1, 3)] == [0, 3]


def test_a_system_prompt_stays_one_when_a_longer_sequence_takes_its_place() -> None:
    prefixes = PrefixCache(4 * _BYTES)
    _insert(prefixes, 1, 1, system=2)
    _insert(prefixes, 1, 1, 1, system=0)  # as a plain completion says it
    _insert(prefixes, 2, 2)
    assert _found(prefixes, [1, 1, 0]) == 2


def test_a_system_prompt_that_another_sequence_begins_with_stays_one_when_its_own_goes() -> None:
    prefixes = PrefixCache(4 * _BYTES)
    _insert(prefixes, 1, 1, 7, system=2)
    _insert(prefixes, 1, 1, 8, 8, system=0)
    _insert(prefixes, 2, 2)
    assert _found(prefixes, [1, 1, 0]) == 2


def test_a_system_prompt_that_another_sequence_begins_with_is_not_kept_twice() -> None:
    prefixes = PrefixCache(7 * _BYTES)
    _insert(prefixes, 1, 2, 3, 4, 5, system=2)
    _insert(prefixes, 1, 2, 6, system=2)  # the first has to go
    assert _found(prefixes, [1, 2, 6, 7]) == 3
    assert (len(prefixes), prefixes.nbytes) == (1, 3 * _BYTES)


def _key_values(kind: Any) -> Any:
    def layer(view: mx.array) -> Any:
        made = kind()
        made.update_and_fetch(view, view)
        made.keys, made.values, made.offset = view, view + 0, view.shape[2]
        return made

    return layer


def _arrays(view: mx.array) -> ArraysCache:
    layer = ArraysCache(2)
    layer[0], layer[1] = view, view + 0
    return layer


def _quantized(view: mx.array) -> QuantizedKVCache:
    layer = QuantizedKVCache()
    layer.update_and_fetch(view, view)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        _key_values(KVCache),
        _key_values(lambda: RotatingKVCache(1000)),
        _key_values(lambda: ChunkedKVCache(1000)),
        lambda view: CacheList(_key_values(KVCache)(view), _arrays(view)),
        _quantized,
        _arrays,
    ],
    ids=["KVCache", "RotatingKVCache", "ChunkedKVCache", "CacheList", "QuantizedKVCache", "ArraysCache"],
)
def test_what_is_kept_holds_the_memory_that_is_counted_and_not_its_batch(layer: Any) -> None:
    prefixes = PrefixCache(_PLENTY)
    gc.collect()
    before = mx.get_active_memory()
    batch = mx.zeros((32, 4, 1024, 64))
    mx.eval(batch)
    prefixes.insert("m", range(300), [layer(batch[3:4, :, :300]) for _ in range(2)], system=0)
    del batch
    gc.collect()
    assert prefixes.nbytes > 0
    assert mx.get_active_memory() - before <= 1.1 * prefixes.nbytes


def test_room_for_tokens_to_come_is_not_kept() -> None:
    prefixes = PrefixCache(_PLENTY)
    layer = KVCache()
    layer.update_and_fetch(mx.zeros((1, 1, 3, 8)), mx.zeros((1, 1, 3, 8)))
    assert layer.keys.shape[2] > 3
    prefixes.insert("m", [1, 2, 3], [layer], system=0)
    assert prefixes.nbytes == 2 * 3 * 8 * 4


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    prefixes = PrefixCache(2 * _BYTES)
    _insert(prefixes, 1, 2, 3)
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


class _Disk:
    """A disk that has not written yet what it was given."""

    def __init__(self, held: int) -> None:
        self.held = held

    def stage(self, *_: Any) -> None:
        pass


def test_what_waits_for_the_disk_or_comes_from_it_takes_the_room_of_what_is_kept() -> None:
    prefixes = PrefixCache(10 * _BYTES, disk=cast("Any", _Disk(4 * _BYTES)))
    prefixes.bound(lambda: 8 * _BYTES)
    _insert(prefixes, 1, 2, 3)
    _insert(prefixes, 7, 8, 9)
    assert (len(prefixes), prefixes.kept, prefixes.nbytes) == (1, 3 * _BYTES, 7 * _BYTES)
    assert not prefixes.expect(5 * _BYTES)
    assert prefixes.expect(4 * _BYTES)
    assert (prefixes.kept, prefixes.nbytes) == (0, 8 * _BYTES)
    prefixes.restore("m", np.asarray([4, 5, 6, 7]), _cache((4, 5, 6, 7)), system=0)
    assert (prefixes.kept, prefixes.nbytes) == (4 * _BYTES, 8 * _BYTES)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    prefixes = PrefixCache(0)
    _insert(prefixes, 1, 2, 3, system=1)
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_a_cache_that_cannot_be_cut_is_found_for_what_goes_on_after_it_alone() -> None:
    layer = ArraysCache(1)
    layer[0] = mx.zeros((1, 4))
    prefixes = PrefixCache(_PLENTY)
    prefixes.insert("m", [1, 2, 3], [layer], system=2)
    assert [prefixes.fetch("m", prompt)[1] for prompt in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 9])] == [3, 0, 0]
    prefixes.insert("m", [1, 2], [layer], system=2)
    assert [prefixes.fetch("m", prompt)[1] for prompt in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 9])] == [3, 2, 2]


# Against a model of it that is too simple to be wrong ------------------------------------------------------------

_keys = st.sampled_from(["m", "other"])
_sequences = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)


def test_a_cache_that_cannot_be_cut_goes_with_its_system_prompt() -> None:
    prefixes = PrefixCache(4 * 4)
    for token in (1, 2):  # the second one's room is the first one's
        layer = ArraysCache(1)
        layer[0] = mx.zeros((1, 3))
        prefixes.insert("m", [token, 3], [layer], system=1)
    assert len(prefixes) == 1
    assert prefixes.fetch("m", [2, 3, 4])[1] == 2
    assert prefixes.fetch("m", [1, 3, 4])[1] == 0


@st.composite
def _inserts(draw: st.DrawFn) -> tuple[str, Tokens, int]:
    tokens = draw(_sequences)
    return draw(_keys), tokens, draw(st.integers(0, len(tokens)))


_histories = st.lists(st.one_of(_inserts(), _keys), max_size=12)
"""Insert a sequence, or drop a model."""


def _play(prefixes: PrefixCache, history: Sequence[tuple[str, Tokens, int] | str]) -> list[tuple[str, Tokens, int]]:
    """Do it all; what was inserted and not dropped since."""
    known: list[tuple[str, Tokens, int]] = []
    for event in history:
        if isinstance(event, str):
            prefixes.drop(event)
            known = [each for each in known if each[0] != event]
        else:
            key, tokens, system = event
            _insert(prefixes, *tokens, key=key, system=system)
            known.append(event)
    return known


@given(history=_histories, key=_keys, prompt=_sequences)
def test_with_room_for_all_the_longest_beginning_ever_kept_is_found(
    history: list[tuple[str, Tokens, int] | str], key: str, prompt: Tokens
) -> None:
    prefixes = PrefixCache(_PLENTY)
    known = _play(prefixes, history)
    longest = max((_common(tokens, prompt) for owner, tokens, _ in known if owner == key), default=0)
    assert _found(prefixes, prompt, key) == min(longest, len(prompt) - 1)


@given(history=_histories, key=_keys, prompt=_sequences, room=st.integers(0, 24))
def test_whatever_was_given_up_the_budget_holds_and_what_is_found_is_right(
    history: list[tuple[str, Tokens, int] | str], key: str, prompt: Tokens, room: int
) -> None:
    prefixes = PrefixCache(room * _BYTES)
    known = _play(prefixes, history)
    longest = max((_common(tokens, prompt) for owner, tokens, _ in known if owner == key), default=0)
    assert prefixes.nbytes <= room * _BYTES
    assert _found(prefixes, prompt, key) <= longest


@settings(max_examples=300)
@given(history=_histories)
def test_system_prompts_are_all_kept_where_there_is_room_for_them_alone(
    history: list[tuple[str, Tokens, int] | str],
) -> None:
    systems = {(event[0], event[1][: event[2]]) for event in history if not isinstance(event, str)}
    room = sum(len(tokens) for _, tokens in systems)
    prefixes = PrefixCache(room * _BYTES)
    known = _play(prefixes, history)
    for key, tokens, system in known:
        assert _found(prefixes, (*tokens[:system], 9), key) == system


@given(history=_histories, last=_inserts(), room=st.integers(8, 24))
def test_the_newest_is_found_where_older_ones_are_no_system_prompts(
    history: list[tuple[str, Tokens, int] | str], last: tuple[str, Tokens, int], room: int
) -> None:
    prefixes = PrefixCache(room * _BYTES)
    _play(prefixes, [event if isinstance(event, str) else (event[0], event[1], 0) for event in history])
    _play(prefixes, [last])
    assert _found(prefixes, (*last[1], 9), last[0]) == len(last[1])
