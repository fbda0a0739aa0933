"""Which texts are read together: of about the same length, and of all requests in turns. No MLX."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

Place = tuple[int, int]
"""A text: (its request's id, its index there)."""


class Queue:
    """The texts that wait to be read, of all requests."""

    def __init__(self) -> None:
        self._sorted: list[tuple[int, Place]] = []
        """(length, place) of each, shortest first."""
        self._waiting: dict[int, dict[int, int]] = {}
        """By request: its texts that wait, index -> length, longest first."""
        self._turns: deque[int] = deque()
        """The requests, in the order in which one of their texts leads a pass."""

    def __len__(self) -> int:
        """Return how many texts wait."""
        return len(self._sorted)

    def add(self, request: int, lengths: Sequence[int]) -> None:
        """Let the texts of a request wait, at least one."""
        longest_first = sorted(range(len(lengths)), key=lambda index: (lengths[index], index), reverse=True)
        self._waiting[request] = {index: lengths[index] for index in longest_first}
        self._turns.append(request)
        if len(lengths) == 1:
            insort(self._sorted, (lengths[0], (request, 0)))
        else:
            self._sorted += [(length, (request, index)) for index, length in enumerate(lengths)]
            self._sorted.sort()

    def drop(self, request: int) -> None:
        """Forget the texts of a request."""
        if self._waiting.pop(request, None) is not None:
            self._turns.remove(request)
            self._sorted = [each for each in self._sorted if each[1][0] != request]

    def next(self, room: int) -> list[Place]:
        """Take the texts that are read next, longest first: rows times longest is at most `room`, or it is one text.

        The longest text of the request whose turn it is leads; those that are about as long go with it.
        """
        if not self._turns:
            return []
        request = self._turns[0]
        self._turns.rotate(-1)
        index, length = next(iter(self._waiting[request].items()))
        end = bisect_left(self._sorted, (length, (request, index))) + 1
        start = max(0, end - max(1, room // max(1, length)))
        chosen = [place for _, place in reversed(self._sorted[start:end])]
        del self._sorted[start:end]
        for other, at in chosen:
            del self._waiting[other][at]
            if not self._waiting[other]:
                del self._waiting[other]
                self._turns.remove(other)
        return chosen
