"""Which sequences may begin: those whose KV caches fit in memory beside all that is there already.

Everything is decided by counts of tokens, not by what is free at the moment: that is known too late.

1. A batch pads its sequences to the longest of them: it takes as many bytes as its rows times its longest row.
2. Sequences begin in the order in which they came. The first that fits begins; what does not fit yet is passed by what
   does, but by no more than `MOST_PASSES` others.
3. Where nothing runs, the first begins whatever it needs: it would wait for nothing.
4. Where answers have outgrown the memory, the sequences that began last are paused, and are the first to go on. The
   first of those that run never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mlx_overlay_server.engine.commands import Encode, Submit
from mlx_overlay_server.memory import GROWTH, Images, KvSize

_NO_IMAGES = Images()

MOST_PASSES = 32
"""Sequences that may begin although they came after one that waits for memory."""


@dataclass(slots=True)
class _Sequence:
    submit: Submit | Encode
    kv: KvSize
    images: Images
    is_alone: bool
    """Whether it takes no part in its model's batch."""
    drawn: int = 0
    """Tokens of its answer so far."""
    passes: int = 0
    """Sequences that began before it although they came later."""
    is_paused: bool = False
    """Whether it had begun before, and was paused."""

    @property
    def key(self) -> str:
        return self.submit.key

    @property
    def length(self) -> int:
        """Tokens that there must be room for: those to come for a while, too, as KV caches grow in large steps."""
        if isinstance(self.submit, Encode):  # its texts are read without a KV cache, or one after the other
            return max(len(text.tokens) for text in self.submit.texts)
        return len(self.submit.prompt) + self.drawn + GROWTH

    @property
    def nbytes(self) -> int:
        """Bytes that there must be for it where it runs by itself."""
        return self.kv.nbytes(self.length) + self.images.kept + (0 if self.drawn else self.images.looking)


class _Batch(NamedTuple):
    """A model's batch, and what runs beside it."""

    rows: int = 0
    longest: int = 0
    """Bytes of its longest row."""
    alone: int = 0
    """Bytes of all sequences that run beside it."""

    def joined(self, sequence: _Sequence) -> _Batch:
        if sequence.is_alone:
            return self._replace(alone=self.alone + sequence.nbytes)
        return self._replace(rows=self.rows + 1, longest=max(self.longest, sequence.nbytes))


class Admission:
    """The sequences that run or wait for memory, of all models."""

    def __init__(self, limit: int, rows: int) -> None:
        """`limit`: bytes that weights, kept KV caches and those of running sequences may take together now.

        `rows`: sequences that one batch has at most; others wait in their model's queue, and take nothing.
        """
        self.limit = limit
        self._rows = rows
        self._waiting: dict[int, _Sequence] = {}
        self._running: dict[int, _Sequence] = {}

    @property
    def waiting(self) -> int:
        """Sequences that wait for memory."""
        return len(self._waiting)

    @property
    def running_bytes(self) -> int:
        """Bytes that the sequences which have begun are taken to need for their KV caches."""
        return self._bytes(self._batches())

    def add(self, submit: Submit | Encode, kv: KvSize, *, images: Images = _NO_IMAGES, is_alone: bool = False) -> None:
        """Let a sequence wait; `next` hands it out. `is_alone`: whether it takes no part in its model's batch."""
        self._waiting[submit.id] = _Sequence(submit, kv, images, is_alone)

    @property
    def has_begun(self) -> bool:
        """Whether any sequence runs."""
        return bool(self._running)

    def next(self, taken: int) -> Submit | Encode | None:
        """Return the sequence that begins now, beside `taken` bytes of weights and kept caches; None while none may."""
        free = self.limit - taken
        batches = self._batches()
        for id_, sequence in self._waiting.items():
            if not self._running or self._bytes(batches, sequence) <= free:
                self._pass(id_)
                self._running[id_] = self._waiting.pop(id_)
                return sequence.submit
            if sequence.passes >= MOST_PASSES:
                return None
        return None

    def missing(self, taken: int) -> int:
        """Return how many bytes must become free before the first sequence that waits may begin; 0: none."""
        first = next(iter(self._waiting.values()), None)
        return 0 if first is None else max(0, self._bytes(self._batches(), first) + taken - self.limit)

    def excess(self, taken: int) -> int:
        """Return how many bytes running sequences have grown beyond the limit since they began."""
        return max(0, self._bytes(self._batches()) + taken - self.limit)

    def pauses(self) -> list[int]:
        """Return the sequences that may be paused, in the order in which that should be tried."""
        return list(self._running)[:0:-1]

    def pause(self, id_: int) -> None:
        """Let a sequence that runs wait for memory again, before all others."""
        sequence = self._running.pop(id_)
        sequence.is_paused = True
        self._waiting = {id_: sequence, **self._waiting}

    def refuse(self) -> Submit | Encode | None:
        """Forget the first sequence that waits, and return it; None where none does, or it was paused."""
        id_ = next(iter(self._waiting), None)
        return None if id_ is None or self._waiting[id_].is_paused else self._waiting.pop(id_).submit

    def grow(self, id_: int) -> None:
        """Note that a sequence has got a token."""
        if (sequence := self._running.get(id_)) is not None:
            sequence.drawn += 1

    def drop(self, id_: int) -> None:
        """Forget a sequence that has ended, or that nobody waits for."""
        self._waiting.pop(id_, None)
        self._running.pop(id_, None)

    def clear(self) -> list[int]:
        """Forget the sequences that have begun, paused ones too, and return their ids. The others go on waiting."""
        paused = [id_ for id_, sequence in self._waiting.items() if sequence.is_paused]
        ids = [*self._running, *paused]
        for id_ in ids:
            self.drop(id_)
        return ids

    def _batches(self) -> dict[str, _Batch]:
        """Return the batches that run, by their models' keys."""
        batches: dict[str, _Batch] = {}
        for each in self._running.values():
            batches[each.key] = batches.get(each.key, _Batch()).joined(each)
        return batches

    def _bytes(self, batches: Mapping[str, _Batch], sequence: _Sequence | None = None) -> int:
        """Return how many bytes all batches take, when one more sequence has joined its model's."""
        if sequence is not None:
            batches = {**batches, sequence.key: batches.get(sequence.key, _Batch()).joined(sequence)}
        return sum(min(batch.rows, self._rows) * batch.longest + batch.alone for batch in batches.values())

    def _pass(self, id_: int) -> None:
        """Note that a sequence begins before those that came earlier."""
        for other, sequence in self._waiting.items():
            if other == id_:
                return
            sequence.passes += 1
