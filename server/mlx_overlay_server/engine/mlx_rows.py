"""A KV cache of a batch with room for more rows: a part of `mlx`.

mlx-lm's BatchKVCache has exactly one row for each sequence. So whenever a sequence joins or leaves, the rows of all
others are copied, which takes longer than a step of a small model. This one works like a list: it has room for more
rows than there are, a sequence that joins is written into a free row, and the last row moves into one that is left.

What the docstring of `mlx` says holds here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

from mlx_overlay_server.engine.mlx import Cache, leaves

_ARRAYS = ("keys", "values")


class RoomyKVCache(BatchKVCache):  # type: ignore[misc]
    """Keys and values of the rows of a batch, in arrays with the shape (rows, heads, tokens, size of a head).

    Sequences take the first rows. All of them end at the same token, and begin where their left padding ends. Tokens
    that are padding in each row are left behind in front.
    """

    def __init__(self, cache: BatchKVCache) -> None:
        """Take over what another cache holds."""
        self.keys, self.values, self.offset, self.left_padding, self._idx = cache.state
        self._right_padding = None
        self._start = 0
        """The first token in the arrays that is not left behind."""

    @property
    def rows(self) -> int:
        """Sequences."""
        return int(self.offset.shape[0])

    @property
    def capacity(self) -> int:
        """Rows of the arrays."""
        return int(self.keys.shape[0])

    @property
    def has_room(self) -> bool:
        """Whether the arrays could be smaller."""
        return self.rows < self.capacity or self._idx + self.step < self.keys.shape[2]

    def is_too_large(self, rows: int) -> bool:
        """Return whether the arrays have far more rows than so many, or far more tokens than there are."""
        return 3 * rows < self.capacity or 2 * (self._idx + self.step) < self.keys.shape[2]

    def resize(self, rows: int, *, before: int = 0, after: int = 1) -> None:
        """Move to arrays with so many rows, and room for more tokens `before` and `after` those that there are.

        It is done array by array, so that each frees what it is made from before the next takes memory.
        """
        steps = -(-(before + self._idx + after) // self.step)
        for name in _ARRAYS:
            old = getattr(self, name)
            new = mx.zeros((rows, old.shape[1], steps * self.step, old.shape[3]), old.dtype)
            new[: self.rows, :, before : before + self._idx] = old[: self.rows, :, self._tokens]
            setattr(self, name, new)
            del old
            mx.eval(new)
        self._start = 0
        self._idx += before
        self.left_padding = self.left_padding + before

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add tokens to each row. Returns the keys and values of all tokens."""
        count = keys.shape[2]
        if self._start + self._idx + count > self.keys.shape[2]:
            self.resize(self.capacity, after=count)
        end = self._start + self._idx
        self.keys[: self.rows, :, end : end + count] = keys
        self.values[: self.rows, :, end : end + count] = values
        self.offset = self.offset + count
        self._idx += count
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return those of all tokens."""
        return self.keys[: self.rows, :, self._tokens], self.values[: self.rows, :, self._tokens]

    def extend(self, other: BatchKVCache) -> None:
        """Add the rows of another cache."""
        first, last = self.rows, self.rows + other.offset.shape[0]
        if last > self.capacity or other.size() > self._idx:
            self.resize(max(last, self.capacity), before=max(0, other.size() - self._idx))
        left = self._idx - other.size()
        for name in _ARRAYS:  # the padding is written as well: what was left in the row may be infinite
            added = mx.pad(getattr(other, name)[:, :, : other.size()], [(0, 0), (0, 0), (left, 0), (0, 0)])
            getattr(self, name)[first:last, :, self._tokens] = added
        self.offset = mx.concatenate([self.offset, other.offset])
        self.left_padding = mx.concatenate([self.left_padding, other.left_padding + left])

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep rows, in the order in which they are given. One that keeps its place is not touched.

        One that moves must come from behind all that are kept, as after `filled`.
        """
        for name in _ARRAYS:
            array = getattr(self, name)
            for row, source in enumerate(batch_indices):
                if row != source:
                    moved = mx.contiguous(array[source : source + 1, :, self._tokens])
                    mx.eval(moved)  # as long as it is to be made of the array, writing to that would copy all of it
                    array[row : row + 1, :, self._tokens] = moved
        kept = mx.array(list(batch_indices))
        self.offset = self.offset[kept]
        self.left_padding = self.left_padding[kept]
        common = int(self.left_padding.min().item())
        self._start += common
        self._idx -= common
        self.left_padding = self.left_padding - common

    def extract(self, idx: int) -> KVCache:
        """Return the KV cache of one row, in arrays of its own."""
        padding = int(self.left_padding[idx].item())
        cache = KVCache()
        for name in _ARRAYS:
            row = getattr(self, name)[idx : idx + 1, :, self._start + padding : self._start + self._idx]
            setattr(cache, name, mx.contiguous(row))
        cache.offset = self._idx - padding
        return cache

    @property
    def _tokens(self) -> slice:
        """Where the tokens are in the arrays."""
        return slice(self._start, self._start + self._idx)


def roomy(cache: Cache) -> Cache:
    """Return the KV cache of a batch with those of its layers exchanged that can have room."""
    return [_roomy(layer) for layer in cache]


def _roomy(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_roomy, layer.caches))
    return RoomyKVCache(layer) if type(layer) is BatchKVCache and not layer.empty() else layer


def plain(cache: Cache) -> Cache:
    """Return the KV cache of a batch with mlx-lm's own, which have no room, in place of those that have."""
    return [_plain(layer) for layer in cache]


def _plain(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_plain, layer.caches))
    if not isinstance(layer, RoomyKVCache):
        return layer
    own = BatchKVCache([0] * layer.rows)
    own.keys, own.values = layer.keys_and_values()
    own.offset, own.left_padding, own._idx = layer.offset, layer.left_padding, layer.size()  # noqa: SLF001 - as it does
    return own


def with_room(cache: Cache) -> list[RoomyKVCache]:
    """Return the layers of a KV cache that have room."""
    return [leaf for leaf in leaves(cache) if isinstance(leaf, RoomyKVCache)]


def filled(keep: Sequence[int]) -> list[int]:
    """Return the order of rows that are kept, given in ascending order, in which few move.

    The last ones take the places of those that leave.
    """
    size = len(keep)
    movers = [row for row in keep if row >= size]
    staying = set(keep)
    return [row if row in staying else movers.pop() for row in range(size)]
