"""Tiny models of random weights whose KV caches are of each kind that mlx-lm has."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.models import make_random_model

_VOCABULARY = 512

KINDS: Mapping[str, Mapping[str, Any]] = {
    "rows": {},  # KVCache: a Llama, as make_random_model makes it
    "windows": {  # RotatingKVCache and KVCache in turns
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "num_key_value_heads": 1,
        "sliding_window": 48,
        "sliding_window_pattern": 2,
    },
    "recurrent": {  # ArraysCache
        "model_type": "mamba2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 2,
    },
    "hybrid": {  # CacheList of an ArraysCache and a KVCache
        "model_type": "falcon_h1",
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 64,
        "mamba_d_head": 16,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "lm_head_multiplier": 1.0,
    },
}
"""Names of kinds -> config.json."""

_SIZES: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
RECURRENT: Mapping[str, Mapping[str, Any]] = {
    "mamba": {
        **_SIZES,
        "state_size": 16,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "mamba2": {**_SIZES, **KINDS["recurrent"]},
    "jamba": {
        **_SIZES,
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 5,
        "expert_layer_period": 10,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    "lfm2": {
        **_SIZES,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
}
"""Model types with recurrent layers -> the rest of a config.json."""


def make_kind(folder: Path, kind: str) -> Path:
    """Write a model of a kind; return `folder`. Equal arguments give equal weights."""
    make_random_model(folder, vocab=_VOCABULARY)
    if not KINDS[kind]:
        return folder
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import save_model

    config = {**KINDS[kind], "vocab_size": _VOCABULARY, "eos_token_id": 257}
    mx.random.seed(0)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    # Larger weights than mlx-lm begins with: what comes first in a prompt must matter for what is said at its end.
    model.update(tree_map(lambda value: value + 0.3 * mx.random.normal(value.shape), model.parameters()))
    mx.eval([value for _, value in tree_flatten(model.parameters())])
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
