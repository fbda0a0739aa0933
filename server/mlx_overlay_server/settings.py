"""What the command line and the environment ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

API_KEY_VARIABLE = "MLX_OMNI_API_KEY"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the server is told at its start."""

    model_paths: tuple[str, ...] = ()
    """Folders of models; (): MLX_OMNI_MODEL_PATH, else the Hugging Face cache alone."""
    exclude: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 10240
    models: tuple[str, ...] = ()
    """Ids to load at the start and keep."""
    is_offline: bool = False
    hold_downloads: bool = False
    """Download also while the Hugging Face cache is away or read-only."""
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    aliases: Mapping[str, str]
    default_model: str | None = None
    log_level: str = "info"

    memory_budget: int
    """Bytes that the weights of resident models may take."""
    idle_ttl: float = 0
    """Seconds after which an idle model is unloaded; 0: never."""
    cache_bytes: int
    """Bytes of KV caches that are kept for later prompts."""
    batch_size: int = 32
    max_queue: int = 512
    """Requests that may wait."""
    max_body: int = 64 * 10**6
    """Bytes."""
    max_messages: int = 10_000
    max_prompt: int | None = None
    """Tokens; None: the model's context."""
    max_tokens: int | None = None
    """Of an answer, where the request does not say; None: what the context holds."""
    prefill_step: int = 2048
    shutdown_seconds: float = 5
    """How long running streams may go on when the server is told to stop."""

    draft_model: str | None = None
    num_draft_tokens: int = 3
    adapter_path: str | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    trust_remote_code: bool = False
    is_pipeline: bool = False


def size(text: str) -> int:
    """Bytes: `24G`, `512M`, `1.5GB`, or a plain number. Raises ValueError."""
    number, unit = text.strip().upper().removesuffix("B"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    bytes_ = int(float(number) * _UNITS[unit])
    if bytes_ < 0:
        raise ValueError("a size is not negative")
    return bytes_


def device_memory() -> int:
    """Bytes that models may take by default: three quarters of the machine's memory.

    That is what Metal recommends on Apple silicon, too; asking it would import MLX before the server listens.
    """
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


def rank(environ: Mapping[str, str]) -> int | None:
    """This process's number under `mlx.launch`; None outside of it (mlx/distributed: MLX_RANK, and MPI's own)."""
    for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None
