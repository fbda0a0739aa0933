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

LEAST_SHARED = 64
"""Tokens that two prompts must begin with, beyond what is known of them, for one to wait for the other."""


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
    shared: dict[int, int] = field(default_factory=dict)
    """Id of another prompt -> how many tokens both begin with, where one can take them from the other."""
    has_begun: bool = False
    """Whether it has a KV cache of its own."""

    @property
    def left(self) -> int:
        """Tokens to read before the next stop. The last token of a prompt is read when its first answer is drawn."""
        return min((stop for stop in self.stops if stop > self.done), default=self.size - 1) - self.done

    def segments(self, tokens: Sequence[int]) -> list[list[int]]:
        """Return what is left of the prompt's tokens, cut at the stops."""
        cuts = [self.done, *sorted(stop for stop in self.stops if stop > self.done), self.size]
        return [list(tokens[start:end]) for start, end in itertools.pairwise(cuts)]

    def waits_for(self, other: Prompt) -> bool:
        """Return whether it is better to wait until another prompt has been read, for the part that both begin with."""
        shared = self.shared.get(other.id, 0)
        return not self.has_begun and other.done < shared and shared - self.done >= LEAST_SHARED


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


NOTHING = Pass((), 0, 0, 0)

Room = Callable[[int], int]
"""(tokens that come before) -> tokens that a pass may read after them."""


def rank(read: int, unread: int) -> int:
    """Return the rank of a prompt that arrives when `read` tokens have been read, and has `unread` of its own.

    Short prompts overtake long ones, but not for ever: a prompt of n tokens waits for at most n tokens of prompts that
    came after it.
    """
    return read + unread


def plan(prompts: Iterable[Prompt], *, slots: int, room: Room) -> Pass:
    """Return what the next pass reads, of prompts for which the batch has `slots` more places.

    The first in order is always read. Others join it where all of them are read to their ends, or next stops, within
    the room. A prompt that is longer than that is read alone, in pieces of equal length. One that begins like another
    one before it waits until that one has read what both begin with.
    """
    chosen: list[int] = []
    readers = tokens = context = 0
    ahead: dict[int, Prompt] = {}
    for prompt in sorted(prompts, key=lambda prompt: (prompt.rank, prompt.id)):
        if len(chosen) >= slots:
            break
        is_waiting = any(id_ in ahead and prompt.waits_for(ahead[id_]) for id_ in prompt.shared)
        ahead[prompt.id] = prompt
        if is_waiting:
            continue
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
