"""KV caches of mlx-lm as arrays outside of MLX, and back: the part of `mlx` that keeping them on disk takes.

What the docstring of `mlx` says holds here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from mlx_overlay_server.engine.arrays import Array
from mlx_overlay_server.engine.mlx import Cache, leaves

_ROWS = (KVCache, QuantizedKVCache)
_TYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.complex64: "C64",
}


class Parts(NamedTuple):
    """What a KV cache holds, as arrays outside of MLX."""

    rows: dict[str, Array]
    """Arrays that have one row for each token, in their third dimension."""
    arrays: dict[str, Array]
    """Other arrays, such as those of sliding windows and of recurrent states."""
    outline: dict[str, Any]
    """All else, as JSON has it: where those other arrays belong, and numbers."""


def layout(cache: Cache) -> str:
    """Return the kinds of a KV cache's layers as a text."""
    return " ".join(_kind(leaf) for leaf in leaves(cache))


def has_rows(cache: Cache) -> bool:
    """Return whether a kind of KV cache has layers that hold one row for each token, and so can be cut at any token."""
    return any(type(leaf) in _ROWS for leaf in leaves(cache))


def has_states(cache: Cache) -> bool:
    """Return whether a kind of KV cache has layers that cannot be cut, such as sliding windows and recurrent states."""
    return not all(type(leaf) in _ROWS for leaf in leaves(cache))


def quantised(cache: Cache, *, bits: int, group_size: int) -> Cache:
    """Return an empty KV cache of the kind that mlx-lm makes of another when it quantises it."""
    return [
        layer.to_quantized(group_size=group_size, bits=bits) if hasattr(layer, "to_quantized") else layer
        for layer in cache
    ]


def taken_apart(cache: Cache, size: int) -> Parts | None:
    """Return what a KV cache of `size` tokens holds; None for kinds that this cannot be said of.

    The arrays share their memory with the cache, which must be evaluated.
    """
    parts = Parts({}, {}, {})
    for number, leaf in enumerate(leaves(cache)):
        if leaf.empty():
            continue
        if type(leaf) not in _ROWS:
            try:
                parts.outline[str(number)] = _outline(leaf.state, parts.arrays)
            except TypeError:
                return None
        elif leaf.offset != size:
            return None
        else:
            for name, array in tree_flatten(leaf.keys_and_values()):
                parts.rows[f"{number}.{name}"] = _outside(array)
    return parts


def put_together(empty: Cache, size: int, made: Mapping[str, mx.array], outline: Mapping[str, Any]) -> Cache:
    """Put what a KV cache of `size` tokens held into an empty one of the same layout, and return that.

    `made`: the arrays of its `Parts`, by their names.
    """
    layers = leaves(empty)
    rows: dict[str, list[tuple[str, mx.array]]] = {}
    for name, array in made.items():
        number, _, rest = name.partition(".")
        if number.isdigit():
            rows.setdefault(number, []).append((rest, array))
    for number, flat in rows.items():
        leaf = layers[int(number)]
        leaf.keys, leaf.values = (tuple(part) if isinstance(part, list) else part for part in tree_unflatten(flat))
        leaf.offset = size
    for number, state in outline.items():
        layers[int(number)].state = _state(state, made)
    return empty


def inside(array: Array) -> mx.array:
    """Return an array of MLX's that is a copy of one outside."""
    made = mx.array(array.values)
    return made.view(mx.bfloat16) if array.type == "BF16" else made


def _outside(array: mx.array) -> Array:
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return Array(_TYPES[array.dtype], np.asarray(bits))


def _kind(leaf: Any) -> str:
    name = type(leaf).__name__
    return f"{name}/{leaf.bits}/{leaf.group_size}" if isinstance(leaf, QuantizedKVCache) else name


def _outline(state: Any, arrays: dict[str, Array]) -> Any:
    """Return a state as JSON has it, and add its arrays to `arrays`. Raises TypeError for what JSON cannot say."""
    if isinstance(state, mx.array):
        name = f"state.{len(arrays)}"
        arrays[name] = _outside(state)
        return {"array": name}
    if isinstance(state, (list, tuple)):
        return [_outline(each, arrays) for each in state]
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"a {type(state).__name__} in the state of a KV cache")


def _state(outline: Any, made: Mapping[str, mx.array]) -> Any:
    if isinstance(outline, list):
        return [_state(each, made) for each in outline]
    return made[outline["array"]] if isinstance(outline, dict) else outline
