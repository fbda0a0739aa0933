"""KV caches of earlier prompts, for those that begin alike.

Within a budget of bytes. What was used longest ago goes first, but by halves: of a conversation, the part that came
from system messages and tools is kept, and that goes only when there is nothing else to give up.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

Tokens = npt.NDArray[np.int64]
Cache = list[Any]
"""mlx-lm's KV cache of one sequence: an object a layer."""


@dataclass(slots=True)
class _Entry:
    key: str
    tokens: Tokens
    cache: Cache
    nbytes: int
    system: int
    used: int

    @property
    def is_system(self) -> bool:
        return 0 < len(self.tokens) <= self.system


class PrefixCache:
    """Used by the engine's thread alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[_Entry] = []
        self._clock = itertools.count()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def fetch(self, key: str, prompt: Sequence[int]) -> tuple[Cache | None, int]:
        """The KV cache of the longest known beginning of a prompt, and how many tokens that is.

        At least one token of the prompt is left to process. The cache is the caller's to change.
        """
        tokens = np.asarray(prompt, dtype=np.int64)
        best: _Entry | None = None
        length = 0
        for entry in self._entries:
            if entry.key != key:
                continue
            common = min(_common(entry.tokens, tokens), len(tokens) - 1)
            is_usable = common == len(entry.tokens) or can_trim_prompt_cache(entry.cache)
            if is_usable and common > length:
                best, length = entry, common
        if best is None:
            return None, 0
        best.used = next(self._clock)
        cache = copy.deepcopy(best.cache)  # lazy: arrays are shared until one is written to
        if length < len(best.tokens):
            trim_prompt_cache(cache, len(best.tokens) - length)
        return cache, length

    def insert(self, key: str, prompt: Sequence[int], cache: Cache, *, system: int) -> None:
        """Keep the cache of a sequence of tokens, whose first `system` are shared by other conversations."""
        if not prompt:
            return
        tokens = np.asarray(prompt, dtype=np.int64)
        can_trim = can_trim_prompt_cache(cache)
        for entry in [each for each in self._entries if each.key == key]:
            common = _common(entry.tokens, tokens)
            if common == len(tokens) and (can_trim or common == len(entry.tokens)):
                entry.used = next(self._clock)  # known already
                entry.system = max(entry.system, system)
                return
            if common == len(entry.tokens) and can_trim:  # the new one serves for it
                self._remove(entry)
                system = max(system, entry.system)
        self._add(_Entry(key, tokens, cache, _nbytes(cache), system, next(self._clock)))
        self.trim(self._max_bytes)

    def trim(self, max_bytes: int) -> None:
        """Give up entries until they take no more than so many bytes."""
        while self.nbytes > max_bytes:
            oldest = min((each for each in self._entries if not each.is_system), key=_used, default=None)
            if oldest is None:
                self._remove(min(self._entries, key=_used))
                continue
            self._remove(oldest)
            if (covering := self._covering(oldest)) is not None:
                covering.system = max(covering.system, oldest.system)
            elif (system := _shrunk(oldest)) is not None:
                self._add(system)

    def drop(self, key: str) -> None:
        """Forget a model."""
        for entry in [each for each in self._entries if each.key == key]:
            self._remove(entry)

    def _covering(self, entry: _Entry) -> _Entry | None:
        """Another entry that begins with an entry's shared beginning."""
        shared = entry.tokens[: entry.system]
        same = (each for each in self._entries if each.key == entry.key)
        return next((each for each in same if _common(each.tokens, shared) == entry.system), None)

    def _add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self.nbytes += entry.nbytes

    def _remove(self, entry: _Entry) -> None:
        self._entries = [each for each in self._entries if each is not entry]
        self.nbytes -= entry.nbytes


def _shrunk(entry: _Entry) -> _Entry | None:
    """An entry's shared beginning, in memory of its own; None where it has none, or its kind cannot be cut."""
    if not 0 < entry.system < len(entry.tokens) or not all(type(layer) is KVCache for layer in entry.cache):
        return None
    cache = []
    for layer in entry.cache:
        cut = KVCache()
        keys, values = (mx.contiguous(array[..., : entry.system, :]) for array in (layer.keys, layer.values))
        cut.keys, cut.values, cut.offset = keys, values, entry.system
        cache.append(cut)
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return _Entry(entry.key, entry.tokens[: entry.system], cache, _nbytes(cache), entry.system, entry.used)


def _used(entry: _Entry) -> int:
    return entry.used


def _nbytes(cache: Cache) -> int:
    return sum(layer.nbytes for layer in cache)


def _common(a: Tokens, b: Tokens) -> int:
    """The length of the common beginning of two sequences of tokens."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size
