"""The commands to the engine's thread, and its answers. They are plain values, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_overlay import Task

from mlx_overlay_server.chat.grammar import Budget, Constraint
from mlx_overlay_server.chat.loaded import Shown
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.encoding.loaded import Passage
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.memory import Shares
from mlx_overlay_server.settings import UNTUNED, Tuning

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ReadTokenizer = Callable[[str, str, Mapping[str, Any], Any], bytes]
"""Reads a tokenizer in another process, and returns what `tokenizers.sent` returned there. Raises ServerError.

Its arguments: the model's key, its folder, options for transformers, and the end tokens in its config.json.
"""


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model into memory."""

    key: str
    """From `Engine.new_key`; the loaded model has it, too."""
    path: str
    """The model's folder."""
    adapter_path: str | None = None
    """A folder of LoRA weights."""
    draft_path: str | None = None
    """The folder of a draft model for speculative decoding."""
    task: Task = "text"
    nbytes: int = 0
    """Bytes of the weights, for which running sequences leave room; 0: unknown."""
    tuning: Tuning = UNTUNED


@dataclass(frozen=True, slots=True)
class Unload:
    """Drop a model, its KV caches and what it still generates."""

    key: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate one sequence."""

    id: int
    """From `Engine.new_id`. Its items come back under it."""
    key: str
    """The key of the model: `Loaded.key`."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: Params
    max_tokens: int
    """The most tokens of the answer."""
    system: int = 0
    """How many tokens at the prompt's start are worth keeping in the KV cache for other conversations."""
    constraint: Constraint | None = None
    budget: Budget | None = None
    images: tuple[Any, ...] = ()
    """Pixel values of the prompt's images, for models of mlx-lm."""
    shown: Shown | None = None
    """The prompt's images as a model of mlx-vlm sees them."""
    keeps_cache: bool = True
    """Whether its KV cache may serve later prompts."""
    matcher: Any = None
    """The constraint's `Matcher`. Ranks other than 0 get None, and make their own."""


@dataclass(frozen=True, slots=True)
class Encode:
    """Embed or rank some texts."""

    id: int
    """From `Engine.new_id`. The result comes back under it."""
    key: str
    """The key of the model: `LoadedEncoder.key`."""
    texts: tuple[Passage, ...]
    """The texts: at least one, and none of them empty."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence or drop texts, because nobody waits for them any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """End the engine's thread."""


Command = Load | Unload | Submit | Encode | Cancel | Stop


class Sampled(NamedTuple):
    """A token that was drawn for a sequence."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    """(token, log probability), likeliest first."""
    finish: str | None
    """Why it is the last token: `stop` (an end token, which is not part of the answer) or `length`; None for others."""


class Prefilled(NamedTuple):
    """Progress of a prompt: how many of its tokens are in the KV cache."""

    done: int
    total: int
    cached: int
    """Tokens reused from the KV caches of earlier prompts."""


class Scored(NamedTuple):
    """The log probability of one token of a prompt, given the tokens before it."""

    logprob: float
    rank: int
    """Its rank among all tokens; the likeliest one has 1."""
    top: tuple[tuple[int, float], ...]
    """(token, log probability), likeliest first."""


class PromptScores(NamedTuple):
    """The scores of the next tokens of a prompt, in order. The first token has none."""

    tokens: tuple[Scored, ...]


class Encoded(NamedTuple):
    """The result of an `Encode`."""

    rows: npt.NDArray[np.float32]
    """For each text its vector, or one number: the logit of its score."""


Item = Sampled | Prefilled | PromptScores | Encoded | ServerError


def is_last(item: Item) -> bool:
    """Return whether nothing follows an item of the same id."""
    return isinstance(item, (Encoded, ServerError)) or (isinstance(item, Sampled) and item.finish is not None)


class DiskStats(NamedTuple):
    """Figures of the KV caches on disk."""

    nbytes: int = 0
    files: int = 0
    cap: int = 0
    """Bytes that they may take; 0: none are kept on disk."""
    written: int = 0
    """Bytes written since the start."""
    restored: int = 0
    """Tokens whose KV caches have been read since the start."""
    failures: int = 0
    """Writes that have failed since the start."""


class Stats(NamedTuple):
    """Figures of the engine after its last step."""

    active: int = 0
    """Sequences that read their prompts or generate."""
    waiting: int = 0
    """Sequences that wait for a place in a batch."""
    cache_bytes: int = 0
    cache_entries: int = 0
    running_bytes: int = 0
    """Bytes that the KV caches of running sequences are estimated to need."""
    steps: int = 0
    failures: int = 0
    """Batches that errors have ended."""
    is_alive: bool = False
    last_failure: str | None = None
    disk: DiskStats = DiskStats()
    memory: Shares | None = None
    """How the machine's memory is divided; None until the engine knows the machine."""
