"""The items that the engine has made and not handed to the event loop yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from mlx_overlay_server.engine.commands import Item, Prefilled, PromptScores, Sampled

HOLD_SECONDS = 0.0003
"""Seconds that tokens may be held for each sequence that generates, so that more of them are handed over at once.

Each hand-over costs the event loop a wake-up, a line of JSON and a system call per stream, on the processor that the
next step wants as well. For one stream that is nothing; for 32 it is 10 ms, which nobody sees.
"""


class Outbox:
    """Collects items for the event loop, and says when they are due.

    Only tokens in the middle of an answer may be held. A first token, an end, an error and the progress of a prompt are
    due at once, and take what is held along.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self.items: list[tuple[int, Item]] = []
        """(id of the sequence, item), in the order that they were made."""
        self._waiting: set[int] = set()
        """Sequences without a first token."""
        self._is_urgent = False
        self._due_at = 0.0
        self._added_at = 0.0
        self._step = 0.0
        """Seconds between the last two additions."""

    def expect(self, id_: int) -> None:
        """Note a new sequence: its first token must not be held."""
        self._waiting.add(id_)

    def forget(self, ids: Iterable[int]) -> None:
        """Note that sequences have ended before their first token, if they have."""
        self._waiting.difference_update(ids)

    def add(self, items: Iterable[tuple[int, Item]]) -> None:
        """Take what a step has made, as (id of the sequence, item)."""
        now = self._clock()
        self._step, self._added_at = now - self._added_at, now
        for id_, item in items:
            if not isinstance(item, Sampled) or item.finish is not None or id_ in self._waiting:
                self._is_urgent = True
            if not isinstance(item, Prefilled | PromptScores):
                self._waiting.discard(id_)
            self.items.append((id_, item))

    @property
    def is_due(self) -> bool:
        """Whether the items must be handed over now: also where the next step would come later than they are due."""
        return self._is_urgent or (bool(self.items) and self._clock() + self._step / 2 >= self._due_at)

    def sent(self, sequences: int) -> None:
        """Note that all items were handed over; `sequences` that generate say how long the next may be held."""
        self.items = []  # the list itself may be on its way to the event loop
        self._is_urgent = False
        self._due_at = self._clock() + HOLD_SECONDS * sequences

    def reset(self) -> None:
        """Drop everything: every sequence has ended."""
        self.items = []  # the list itself may be on its way to the event loop
        self._waiting.clear()
        self._is_urgent = False
