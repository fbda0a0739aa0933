"""Plans which prompts are read next, and how much of them: a pure function of what waits and what there is room for.

The batch alternates between two things: each decoding sequence gets one token, then one pass of the model reads some
tokens of prompts. What a pass reads, all decoding sequences wait for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_HALF_CONTEXT = 8192
"""A pass over tokens that follow so many others reads half as much: attention takes time and memory for each."""


@dataclass(slots=True)
class Prompt:
    """A prompt that is not read to its end."""

    id: int
    size: int
    """Tokens, at least one."""
    rank: int
    """Prompts are read in this order. See `rank`."""
    done: int = 0
    """Tokens at its start that need not be read: they are in its KV cache, or known to be in a kept one."""
    stops: list[int] = field(default_factory=list)
    """Sizes of beginnings whose KV caches shall be kept: reading pauses there."""

    @property
    def left(self) -> int:
        """Tokens to read before the next stop. The last token of a prompt is read when its first answer is drawn."""
        return min((stop for stop in self.stops if stop > self.done), default=self.size - 1) - self.done

    def segments(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return what is left of the prompt's tokens, cut at the stops."""
        cuts = [self.done, *sorted(stop for stop in self.stops if stop > self.done), self.size]
        return [list(tokens[start:end]) for start, end in itertools.pairwise(cuts)]


class Pass(NamedTuple):
    """What the next pass reads."""

    ids: tuple[int, ...]
    """Prompts of which it reads a piece, and those of which nothing is left to read."""
    tokens: int
    """Length of the longest piece; each prompt gives as many, or all it has up to its next stop."""
    size: int
    """Tokens that the model computes in all: pieces are padded to the longest."""
    context: int
    """The most tokens that one of the prompts has before its piece."""


Room = Callable[[int], int]
"""How many tokens a pass may read that follow so many others."""


def rank(read: int, unread: int) -> int:
    """Return the rank of a prompt that arrives when `read` tokens have been read, and has `unread` of its own.

    Short prompts overtake long ones, but not for ever: a prompt of n tokens waits for at most n tokens of prompts that
    came after it.
    """
    return read + unread


def plan(prompts: Iterable[Prompt], *, slots: int, room: Room) -> Pass:
    """Return what the next pass reads, of prompts for which the batch has `slots` more places.

    The first in order is always read. Others join it where all of them are read to their ends, or next stops, within
    the room. A prompt that is longer than that is read alone, in pieces of equal length.
    """
    chosen: list[int] = []
    readers = tokens = context = 0
    for prompt in sorted(prompts, key=lambda prompt: (prompt.rank, prompt.id)):
        if len(chosen) >= slots:
            break
        left = prompt.left
        if left == 0:
            chosen.append(prompt.id)
        elif readers == 0:
            pieces = math.ceil(left / max(1, room(prompt.done)))
            readers, tokens, context = 1, math.ceil(left / pieces), prompt.done
            chosen.append(prompt.id)
        elif (readers + 1) * max(tokens, left) <= room(max(context, prompt.done)):
            readers, tokens, context = readers + 1, max(tokens, left), max(context, prompt.done)
            chosen.append(prompt.id)
    return Pass(tuple(chosen), tokens, readers * tokens, context)


def bounded(most: int, context: int) -> int:
    """Return how many tokens a pass may read at most, of `most` at a prompt's start, that follow so many others."""
    return max(1, most * _HALF_CONTEXT // (_HALF_CONTEXT + context))
