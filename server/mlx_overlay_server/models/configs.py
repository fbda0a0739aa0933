"""What the config.json of a model says of it before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def read(path: str) -> Mapping[str, Any]:
    """Return a folder's config.json; {} where it cannot be read."""
    try:
        with open(f"{path}/config.json", encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def sees(task: str, config: Mapping[str, Any]) -> bool:
    """Return whether a model that generates text (`task`) has a part for images."""
    return task == "text" and "vision_config" in config


def kv_bytes(config: Mapping[str, Any]) -> int:
    """Estimate the bytes that each token takes in a KV cache of 16-bit numbers, in a long sequence; 0: unknown.

    Only layers of full attention grow with the sequence. The engine works out the true number when it loads the model.
    """
    text = config.get("text_config")
    shape = {**config, **text} if isinstance(text, dict) else config

    def size(*names: str) -> int:
        return next((shape[name] for name in names if isinstance(shape.get(name), int)), 0)

    layers, heads = size("num_hidden_layers"), size("num_attention_heads")
    kinds = shape.get("layer_types")
    if isinstance(kinds, list) and kinds:
        layers = sum(kind == "full_attention" for kind in kinds)
    if latent := size("kv_lora_rank"):  # one compressed vector that all heads share
        return 2 * layers * (latent + size("qk_rope_head_dim"))
    head = size("head_dim") or (size("hidden_size") // heads if heads else 0)
    return 2 * 2 * layers * size("num_key_value_heads", "num_attention_heads") * head
