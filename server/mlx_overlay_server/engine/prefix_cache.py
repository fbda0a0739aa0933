"""KV caches of earlier prompts, reused for prompts that begin with the same tokens, within a budget of bytes.

The least recently used entry goes first, in two steps: of a conversation, the part that comes from system messages and
tools stays, and it goes only when nothing else is left.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.arrays import Tokens
from mlx_overlay_server.engine.mlx import Cache

if TYPE_CHECKING:
    from mlx_overlay_server.engine.disk.tier import Tier
    from mlx_overlay_server.engine.disk.writer import Job


@dataclass(slots=True)
class _Entry:
    key: str
    tokens: Tokens
    cache: Cache
    nbytes: int
    system: int
    used: int
    job: Job | None = None
    """That it is written to disk; None where it is not going to be."""

    @property
    def is_on_disk(self) -> bool:
        return self.job is not None and self.job.is_written

    @property
    def is_system(self) -> bool:
        return 0 < len(self.tokens) <= self.system


class PrefixCache:
    """The KV caches that are kept, of all models. Only the engine's thread may use it."""

    def __init__(self, max_bytes: int, disk: Tier | None = None) -> None:
        """`disk` keeps them as well, and for longer; None: nothing is kept on disk."""
        self._most_bytes = max_bytes
        self._room: Callable[[], int] = lambda: 1 << 62
        """Returns how many bytes there are for them, with those that are written and those that are read."""
        self._entries: list[_Entry] = []
        self._clock = itertools.count()
        self.kept = 0
        """Bytes of all entries."""
        self.coming = 0
        """Bytes of the KV cache that is being read from disk."""
        self.disk = disk

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take, with those that are on their way to the disk or from it."""
        return self.kept + self.coming + (self.disk.held if self.disk is not None else 0)

    def __len__(self) -> int:
        return len(self._entries)

    def fetch(self, key: str, prompt: Sequence[int] | Tokens) -> tuple[Cache | None, int]:
        """Return the KV cache of a prompt's longest known beginning, and its number of tokens; (None, 0) without one.

        At least one token of the prompt is left to read. The caller may change the cache.
        """
        best, length = self._longest(key, prompt)
        if best is None:
            return None, 0
        best.used = next(self._clock)
        cache = copy.deepcopy(best.cache)  # lazy: arrays are shared until one is written to
        if length < len(best.tokens):
            trim_prompt_cache(cache, len(best.tokens) - length)
        return cache, length

    def known(self, key: str, prompt: Sequence[int] | Tokens) -> int:
        """Return how many tokens of a prompt `fetch` would return the KV cache of."""
        return self._longest(key, prompt)[1]

    def _longest(self, key: str, prompt: Sequence[int] | Tokens) -> tuple[_Entry | None, int]:
        """Return the entry that serves for most of a prompt, and how many tokens that is; (None, 0) without one."""
        tokens = np.asarray(prompt, dtype=np.int64)
        best: _Entry | None = None
        length = 0
        for entry in self._entries:
            if entry.key != key:
                continue
            if not agree(entry.tokens, tokens, at=length):  # it does not share more
                continue
            shared = min(common(entry.tokens, tokens), len(tokens) - 1)
            is_usable = shared == len(entry.tokens) or can_trim_prompt_cache(entry.cache)
            if is_usable and shared > length:
                best, length = entry, shared
        return best, length

    def insert(self, key: str, prompt: Sequence[int], cache: Cache, *, system: int) -> None:
        """Keep the KV cache of a sequence, whose first `system` tokens other conversations share."""
        if not prompt:
            return
        tokens = np.asarray(prompt, dtype=np.int64)
        can_trim = can_trim_prompt_cache(cache)
        for entry in [each for each in self._entries if each.key == key]:
            if not agree(
                entry.tokens, tokens, at=min(len(entry.tokens), len(tokens)) - 1
            ):  # none begins with the other
                continue
            shared = common(entry.tokens, tokens)
            if shared == len(tokens) and (can_trim or shared == len(entry.tokens)):
                entry.used = next(self._clock)  # known already
                entry.system = max(entry.system, system)
                if self.disk is not None:
                    self.disk.touch(key, tokens)
                return
            if shared == len(entry.tokens) and can_trim:  # the new one serves for it
                self._remove(entry)
                system = max(system, entry.system)
        kept = mlx.compact(cache)
        entry = _Entry(key, tokens, kept, _nbytes(kept), system, next(self._clock))
        self._add(entry)
        self.trim(self._max_bytes)
        is_there = any(each is entry for each in self._entries)
        if is_there and self.nbytes > self._room():  # what had to go for it is still being written
            self._remove(entry)
        elif is_there:
            mlx.evaluate(kept)  # only now, when there is room: it takes the memory that was counted
            if self.disk is not None:
                entry.job = self.disk.stage(key, tokens, kept)

    def would_keep(self, nbytes: int) -> bool:
        """Return whether a KV cache of so many bytes would be kept."""
        return nbytes <= self._most

    @property
    def _most(self) -> int:
        """Bytes that all entries may have, beside what is on its way to the disk or from it."""
        return min(self._max_bytes, self._room() - (self.nbytes - self.kept))

    def expect(self, nbytes: int) -> bool:
        """Make room for a KV cache that will be read from disk. Returns whether there is any."""
        if not self.would_keep(nbytes):
            return False
        self.trim(self._most - nbytes)
        self.coming = nbytes
        return True

    def restore(self, key: str, tokens: Tokens, cache: Cache, *, system: int) -> None:
        """Keep a KV cache that was read from disk, and was expected."""
        self.coming = 0
        self._add(_Entry(key, tokens, cache, _nbytes(cache), system, next(self._clock)))

    @property
    def _max_bytes(self) -> int:
        """Bytes that all entries may have."""
        return max(0, min(self._most_bytes, self._room()))

    def bound(self, room: Callable[[], int]) -> None:
        """Keep at most as many bytes as `room` returns whenever one is kept, where that is less than the budget."""
        self._room = room

    def free(self, nbytes: int) -> None:
        """Drop entries until so many bytes are free, or none is left."""
        self.trim(max(0, self.kept - nbytes))

    def trim(self, max_bytes: int) -> None:
        """Drop entries until they take at most so many bytes."""
        while self.kept > max_bytes:
            oldest = min((each for each in self._entries if not each.is_system), key=_used, default=None)
            if oldest is None:
                self._remove(min(self._entries, key=_used))
                continue
            self._remove(oldest)
            if (covering := self._covering(oldest)) is not None:
                covering.system = max(covering.system, oldest.system)
            elif (system := _shrunk(oldest)) is not None:
                self._add(system)

    def spill(self) -> None:
        """Have everything written that is not on disk yet, what was used last first."""
        for entry in sorted(self._entries, key=_used, reverse=True):
            if self.disk is not None and not entry.is_on_disk:
                entry.job = self.disk.stage(entry.key, entry.tokens, entry.cache)

    def drop(self, key: str) -> None:
        """Drop every entry of a model, and what would be written of it."""
        if self.disk is not None:
            self.disk.discard(key)
        for entry in [each for each in self._entries if each.key == key]:
            self._remove(entry)

    def _covering(self, entry: _Entry) -> _Entry | None:
        """Return another entry that begins with an entry's shared beginning; None without one."""
        shared = entry.tokens[: entry.system]
        same = (each for each in self._entries if each.key == entry.key)
        return next((each for each in same if common(each.tokens, shared) == entry.system), None)

    def _add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        self.kept += entry.nbytes

    def _remove(self, entry: _Entry) -> None:
        self._entries = [each for each in self._entries if each is not entry]
        self.kept -= entry.nbytes
        if entry.job is not None:
            entry.job.is_kept = False


def _shrunk(entry: _Entry) -> _Entry | None:
    """Return an entry of another's shared beginning, in memory of its own.

    None when it has no shared beginning, or its kind of cache cannot be cut.
    """
    if not 0 < entry.system < len(entry.tokens):
        return None
    cache = mlx.head(entry.cache, dropping=len(entry.tokens) - entry.system)
    if cache is None:
        return None
    mlx.evaluate(cache)
    return _Entry(entry.key, entry.tokens[: entry.system], cache, _nbytes(cache), entry.system, entry.used)


def _used(entry: _Entry) -> int:
    return entry.used


def _nbytes(cache: Cache) -> int:
    return sum(layer.nbytes for layer in cache)


def common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens two sequences share at their start."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size


def agree(a: Tokens, b: Tokens, *, at: int) -> bool:
    """Return whether two sequences have the same token in one place: a quick look before all of them are compared."""
    return at < len(a) and at < len(b) and a.item(at) == b.item(at)
