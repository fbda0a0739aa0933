"""The server's settings and their defaults, and functions that read sizes and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

API_KEY_VARIABLE = "MLX_OMNI_API_KEY"
KV_BITS = (2, 3, 4, 6, 8)
"""Bits that a number in a quantised KV cache may have."""
KV_GROUP_SIZES = (32, 64, 128)
"""How many numbers may share a scale there."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(text: str) -> int:
    """Return the bytes that a text such as `24G`, `512M`, `1.5GB` or `1000` stands for. Raises ValueError."""
    number, unit = text.strip().upper().removesuffix("B"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    bytes_ = int(float(number) * _UNITS[unit])
    if bytes_ < 0:
        raise ValueError("a size is not negative")
    return bytes_


def rank(environ: Mapping[str, str]) -> int | None:
    """Return this process's rank under `mlx.launch` (its MLX_RANK, or MPI's own variables); None outside of it."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of the engine, the same for every model."""

    batch_size: int = 32
    """Sequences of one model that generate at once."""
    prefill_step: int = 2048
    """Tokens of prompts that one pass of a model reads at most."""
    max_stall_ms: int = 250
    """Milliseconds that a decoding sequence waits for others' prompts at most, between two of its tokens.

    There are two exceptions. Where decoding itself takes more than half of this time, reading prompts may take as long
    as decoding. And it may always take five times as long as a pass over a single token.
    """
    cache_bytes: int | None = None
    """Bytes of KV caches that are kept for later prompts; None: a part of the machine's memory (`memory`)."""
    kv_disk: int = 20 * 10**9
    """Bytes of KV caches that are kept on disk; 0: none."""
    no_wired_memory: bool = False
    """On macOS: do not wire the memory of models, which is done to keep them from being paged out."""
    kv_bits: int | None = None
    """Bits of each quantised number in the KV cache; None: not quantised."""
    kv_group_size: int = 64
    """Numbers that share a scale in a quantised KV cache."""
    quantized_kv_start: int = 5000
    """Tokens of a sequence from which on its KV cache is quantised."""
    trust_remote_code: bool = False
    """Run Python files that come with models."""
    num_draft_tokens: int = 3
    """Tokens that the draft model proposes in each step."""
    load_seconds: float = 120
    """Seconds that a load may take without any progress."""
    is_pipeline: bool = False
    """Under mlx.launch: distribute layers instead of splitting tensors."""


class Tuning(NamedTuple):
    """Options of the engine for one model alone. None: as for all models."""

    kv_bits: int | None = None
    """0: its KV caches are not quantised."""
    kv_group_size: int | None = None
    quantized_kv_start: int | None = None
    num_draft_tokens: int | None = None

    def applied(self, options: EngineOptions) -> EngineOptions:
        """Return the engine's options with those of this model in their place."""
        own = {name: value for name, value in self._asdict().items() if value is not None}
        return replace(options, **{**own, "kv_bits": own.get("kv_bits", options.kv_bits) or None})


UNTUNED = Tuning()


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on single requests, and on all of them together."""

    waiting_requests: int = 512
    """Requests that may wait for a place in a batch."""
    body: int = 64 * 10**6
    """Bytes of a request's body."""
    messages: int = 10_000
    """Messages of a conversation."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; None: the model's context."""
    preparation_seconds: float = 20
    """Seconds that preparing one request may take: rendering, decoding images, tokenizing and compiling."""
    answer_tokens: int | None = None
    """Tokens of an answer whose request names no limit; None: what is left of the model's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What requests for a model get where they say nothing themselves. None: as without a profile."""

    model: str
    """The id of the model."""
    context: int | None = None
    """Tokens that prompt and answer may have together; it lowers the model's own limit."""
    max_tokens: int | None = None
    """Tokens of an answer."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    system: str | None = None
    """The system prompt of conversations that have none."""
    chat_template: str | None = None
    """A chat template in place of the model's own."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template; a request's own win."""
    reasoning_budget: int | None = None
    """Tokens that the reasoning may take."""
    draft_model: str | None = None
    """The id of a draft model for speculative decoding."""
    adapter_path: str | None = None
    """A folder of LoRA weights."""
    kv_bits: int | None = None
    """Bits of each quantised number in the KV cache; 0: not quantised."""
    kv_group_size: int | None = None
    quantized_kv_start: int | None = None
    num_draft_tokens: int | None = None
    pin: bool = False
    """Never unload the model."""
    idle_ttl: float | None = None
    """Seconds after which the model is unloaded when it is idle; 0: never."""

    @property
    def tuning(self) -> Tuning:
        """The engine's options for this model alone."""
        return Tuning(self.kv_bits, self.kv_group_size, self.quantized_kv_start, self.num_draft_tokens)

    @property
    def is_loaded_apart(self) -> bool:
        """Whether the model is loaded apart for this profile, beside the model that answers to the plain id."""
        return self.adapter_path is not None or self.draft_model is not None or self.tuning != UNTUNED


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key, of which only the hash is kept."""

    name: str
    digest: str
    """The SHA-256 of the key, in hexadecimal."""
    models: tuple[str, ...] = ()
    """The names of the models that it may use; (): all."""
    rate: int | None = None
    """Requests that it may send in a minute; None: any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that the command line, the environment and the configuration file say."""

    model_paths: tuple[str, ...] = ()
    """Folders of models."""
    below: tuple[str, ...] = ()
    """Read-only tiers behind the user's own cache."""
    maps: Mapping[str, str] = field(default_factory=dict)
    """Folders that answer to an id, before all else: id -> folder."""
    exclude: tuple[str, ...] = ()
    """Ids that come from the Hugging Face cache or the Hub, even where a folder has them."""
    is_offline: bool = False
    """Download nothing."""
    hold_downloads: bool = False
    """Download also while the Hugging Face cache is away or read-only."""

    host: str = "127.0.0.1"
    port: int = 10240
    """0: any free port."""
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server (CORS)."""
    log_level: str = "info"
    log_format: str = "text"
    """`text` for people, `json` for programs."""
    shutdown_seconds: float = 5
    """Seconds that running streams may take to end when the server stops."""

    models: tuple[str, ...] = ()
    """Ids to load at the start and keep."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that clients insist on -> ids."""
    default_model: str | None = None
    """The id that answers to unknown names; None: they are an error."""
    draft_model: str | None = None
    """The id of the draft model for speculative decoding with the first of `models`."""
    adapter_path: str | None = None
    """The folder of LoRA weights for the first of `models`."""

    memory_budget: int | None = None
    """Bytes that the weights of resident models may take; None: what other uses of the machine's memory leave."""
    idle_ttl: float = 0
    """Seconds after which an idle model is unloaded; 0: never."""

    profiles: Mapping[str, Profile] = field(default_factory=dict)
    """By the id of a model, or by a name of their own for requests to use."""
    keys: tuple[Key, ...] = ()
    """Keys of the configuration file, beside `api_key`."""

    engine: EngineOptions = EngineOptions()
    limits: Limits = Limits()
