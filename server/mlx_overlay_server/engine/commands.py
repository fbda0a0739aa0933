"""What goes to the engine's thread and what comes back: plain values, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_overlay_server.chat.grammar import Budget, Constraint
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.errors import ServerError


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for every model."""

    batch_size: int = 32
    """Sequences that generate at once, a model."""
    prefill_step: int = 2048
    """Tokens of a prompt between two steps of the others."""
    cache_bytes: int = 1 << 32
    """KV caches kept for later prompts, in bytes."""
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    """Tokens after which the KV cache is quantised."""
    trust_remote_code: bool = False
    num_draft_tokens: int = 3
    is_pipeline: bool = False
    """Under mlx.launch: share out layers, not tensors."""


@dataclass(frozen=True, slots=True)
class Load:
    """Make a model resident."""

    key: str
    path: str
    adapter_path: str | None = None
    draft_path: str | None = None


@dataclass(frozen=True, slots=True)
class Unload:
    """Drop a model, its KV caches and what it still generates."""

    key: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate one sequence."""

    id: int
    """From `Engine.new_id`; its items come back under it."""
    key: str
    """The model's, `Loaded.key`."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: Params
    max_tokens: int
    """Tokens of the answer, at most."""
    system: int = 0
    """Tokens at the prompt's start whose KV cache is worth keeping for other conversations."""
    constraint: Constraint | None = None
    budget: Budget | None = None
    images: tuple[Any, ...] = ()
    matcher: Any = None
    """The constraint's `Matcher`. A rank other than 0 gets None and makes its own."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants the rest of a sequence."""

    id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread."""


Command = Load | Unload | Submit | Cancel | Stop


class Sampled(NamedTuple):
    """A token of a sequence."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    """(token, log probability), likeliest first."""
    finish: str | None
    """`stop` (the token is an end mark, no part of the answer), `length`, or None."""


class Prefilled(NamedTuple):
    """How much of a prompt is in the KV cache."""

    done: int
    total: int
    cached: int
    """Of it: reused from earlier prompts."""


Item = Sampled | Prefilled | ServerError


class Stats(NamedTuple):
    """The engine as of its last step."""

    active: int = 0
    """Sequences in a batch, or alone, prefill included."""
    waiting: int = 0
    """Sequences that no batch has room for yet."""
    cache_bytes: int = 0
    cache_entries: int = 0
    steps: int = 0
    failures: int = 0
    """Times that a batch was lost to an error."""
    is_alive: bool = False
    last_failure: str | None = None
