"""How a machine's memory is divided: from facts about it, and what the user chose, to limits in bytes. Pure functions.

All numbers of this kind are here. The engine's thread finds the facts out when it starts (`engine/mlx.py`), since they
take MLX, and tells the shares to everybody else.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

PREFIXES = 1 / 8
"""The part of the memory for KV caches that are kept for later prompts."""
RUNNING = 1 / 8
"""The part for what is needed while sequences run: their KV caches, and what a prefill computes with."""
MAX_RUNNING = 32 * 10**9
POOL = 1 / 32
"""The part for MLX's buffer pool: buffers that were freed and are kept to be used again."""
MAX_POOL = 2 * 10**9
PREFILL = 1 / 4
"""The part of what running sequences have that is left for computing, and not for their KV caches."""
SPEECH = 10**9
"""What the process of a model that transcribes or speaks takes beside the weights: its libraries, and what it computes
with."""

LEAST_TOKENS = 2048
"""Tokens that one sequence must have room for beside its model's weights, or the model is not loaded."""
GROWTH = 256
"""Tokens by which a KV cache grows at once: it takes the memory of so many before they come."""
CONTAINER = 4 / 5
"""The part of a container's memory that MLX may take."""
SPARE = 1 / 20
"""The part of MLX's memory that must stay free in the machine when a sequence begins."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known about the memory that MLX takes from."""

    usable: int
    """Bytes that MLX may take: what Metal recommends; elsewhere the limit that MLX sets itself."""
    is_metal: bool = False
    """Whether it is a GPU of Apple's, which shares its memory with all other programs."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The bytes that each use of the memory may take."""

    usable: int
    """All that MLX may take."""
    pool: int
    """MLX's buffer pool."""
    running: int
    """KV caches of running sequences, and what a prefill computes with."""
    prefixes: int
    """KV caches that are kept for later prompts."""

    @property
    def weights(self) -> int:
        """The weights of all resident models: what the other uses leave."""
        return max(0, self.usable - self.pool - self.running - self.prefixes)

    @property
    def held(self) -> int:
        """All that stays from step to step: weights, kept KV caches and those of running sequences."""
        return max(0, self.usable - self.pool - self.computing)

    @property
    def computing(self) -> int:
        """What a prefill may compute with."""
        return int(self.running * PREFILL)

    def has_room(self, weights: int, kv: KvSize, context: int | None) -> bool:
        """Return whether a model's weights fit together with one sequence, which may have `context` tokens."""
        return weights + kv.nbytes(min(context or LEAST_TOKENS, LEAST_TOKENS) + GROWTH) <= self.held

    def tokens(self, weights: int, kv: KvSize) -> int | None:
        """Return how many tokens one sequence may have that has its model's weights and nothing else beside it.

        None: nobody knows.
        """
        fits = kv.tokens(self.held - weights)
        return None if fits is None else max(LEAST_TOKENS, fits - GROWTH)


@dataclass(frozen=True, slots=True)
class KvSize:
    """The bytes that the KV cache of one sequence takes, which a model's layers decide. All 0: unknown."""

    token: int = 0
    """For each token of a long sequence."""
    early: int = 0
    """For each of its first `until` tokens, while sliding windows are not full, or nothing is quantised yet."""
    until: int = 0
    fixed: int = 0
    """Whatever its length, such as recurrent states."""
    is_quantised: bool = False
    """Whether the first tokens take as much as any other once there are more."""

    def nbytes(self, tokens: int) -> int:
        """Return what so many tokens take at most until there are so many."""
        first = self.early * min(tokens, self.until)
        if self.is_quantised:
            return self.fixed + max(first, self.token * tokens if tokens > self.until else 0)
        return self.fixed + first + self.token * max(0, tokens - self.until)

    def tokens(self, nbytes: int) -> int | None:
        """Return how many tokens fit in so many bytes; None: nobody knows."""
        if not self.token:
            return None
        first, rest = self.early * self.until, max(0, nbytes - self.fixed)
        if rest < first:
            return rest // self.early
        return max(self.until, rest // self.token) if self.is_quantised else self.until + (rest - first) // self.token

    def beside(self, other: KvSize) -> KvSize:
        """Return what a sequence takes that has KV caches of two models."""
        return KvSize(
            self.token + other.token,
            self.early + other.early,
            max(self.until, other.until),
            self.fixed + other.fixed,
            self.is_quantised or other.is_quantised,
        )

    def with_copy(self, layers: int) -> KvSize:
        """Return the same with room for a copy of one of so many layers."""
        token, early = (each + each // max(1, layers) for each in (self.token, self.early))
        return replace(self, token=token, early=early)


NO_KV = KvSize()
"""Of a model of which it is not known."""


class Images(NamedTuple):
    """The bytes that a prompt's images take beside weights and KV caches."""

    kept: int = 0
    """As long as the sequence runs."""
    looking: int = 0
    """Beside that until its prompt is read: what the model computes with while it looks at them."""


class Cost(NamedTuple):
    """The bytes that a pass of a model computes with, beside weights and KV caches."""

    token: int = 0
    """For each token that it reads."""
    pair: int = 0
    """For each token that it reads and each that this one attends to; 0: attention needs no memory for them."""

    def nbytes(self, tokens: int) -> int:
        """Return what a pass over so many tokens computes with, when nothing comes before them."""
        return self.token * tokens + self.pair * tokens**2

    def tokens(self, context: int, limit: int) -> int:
        """Return how many tokens a pass may read after so many others, when it may compute with `limit` bytes."""
        if not self.token and not self.pair:
            return 1 << 30
        alone = self.token + self.pair * context
        if not self.pair:
            return limit // alone
        return int((math.sqrt(alone**2 + 4 * self.pair * limit) - alone) / (2 * self.pair))


def shares(machine: Machine, *, prefixes: int | None = None) -> Shares:
    """Divide a machine's memory. `prefixes`: the bytes that the user chose for kept KV caches; None: a part of all."""
    usable = machine.usable
    return Shares(
        usable,
        pool=min(int(usable * POOL), MAX_POOL),
        running=min(int(usable * RUNNING), MAX_RUNNING),
        prefixes=int(usable * PREFIXES) if prefixes is None else prefixes,
    )


def advice(platform: str | None = None) -> str:
    """Return what to do about a model that the memory budget is too small for; `platform` as in `sys.platform`."""
    if (platform or sys.platform) != "darwin":
        return "raise --memory-budget"
    return (
        "raise --memory-budget, or let the GPU use more of the memory: "
        "`sudo sysctl iogpu.wired_limit_mb=MEGABYTES`, then start the server again"
    )
