"""Commands to the engine's thread and what it answers: plain values, the same on every rank."""

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
"""Has another process read a tokenizer, and waits for what `tokenizers.sent` returns there. Raises ServerError.

(key of the model, its folder, options for transformers, what its config.json says of end tokens)
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
    """Pixel values, for mlx-lm."""
    shown: Shown | None = None
    """What the model sees of the prompt's images, for mlx-vlm."""
    keeps_cache: bool = True
    """Whether its KV cache may serve later prompts."""
    matcher: Any = None
    """The constraint's `Matcher`. A rank other than 0 gets None and makes its own."""


@dataclass(frozen=True, slots=True)
class Encode:
    """Embed or rank some texts."""

    id: int
    """From `Engine.new_id`; the result comes back under it."""
    key: str
    """The model's, `LoadedEncoder.key`."""
    texts: tuple[Passage, ...]
    """At least one, none of them empty."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a sequence, or drop texts, whose client has left."""

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
    """Why it is the last: `stop` (an end mark, which is not part of the answer) or `length`; None when it is not."""


class Prefilled(NamedTuple):
    """Progress of a prompt: how many of its tokens are in the KV cache."""

    done: int
    total: int
    cached: int
    """Tokens reused from the KV caches of earlier prompts."""


class Scored(NamedTuple):
    """A token of a prompt, as likely as the model finds it after those before it."""

    logprob: float
    rank: int
    """Its place among all tokens, the likeliest being the first."""
    top: tuple[tuple[int, float], ...]
    """(token, log probability), likeliest first."""


class PromptScores(NamedTuple):
    """The next tokens of a prompt that was read, from its second on."""

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
    """What the engine keeps on disk, and what became of it."""

    nbytes: int = 0
    files: int = 0
    cap: int = 0
    """Bytes that it may take; 0: nothing is kept on disk."""
    written: int = 0
    """Bytes written so far."""
    restored: int = 0
    """Tokens whose KV caches were read so far."""
    failures: int = 0
    """Writes that failed so far."""


class Stats(NamedTuple):
    """The engine's counts after its last step."""

    active: int = 0
    """Sequences that read their prompts or generate."""
    waiting: int = 0
    """Sequences that wait for room in a batch."""
    cache_bytes: int = 0
    cache_entries: int = 0
    running_bytes: int = 0
    """Bytes that the running sequences are taken to need for their KV caches."""
    steps: int = 0
    failures: int = 0
    """Batches lost to an error."""
    is_alive: bool = False
    last_failure: str | None = None
    disk: DiskStats = DiskStats()
    memory: Shares | None = None
    """How the machine's memory is divided; None until the engine knows the machine."""
