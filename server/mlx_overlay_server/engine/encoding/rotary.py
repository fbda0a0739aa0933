"""nomic-bert and gte: BERT with rotary positions and gated units.

Parameters have the names that nomic-bert's have on the Hub; `sanitize` renames those of gte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_overlay_server.engine.encoding.parts import Batch, activation, rotary_attention

_UNUSED = re.compile(r"^(cls|lm_head|pooler|classifier)\.")
_RENAMED = (
    (r"^(bert|new|gte)\.", ""),
    (r"^embeddings\.LayerNorm\.", "emb_ln."),
    (r"^(?:encoder\.layer|layers)\.", "encoder.layers."),
    (r"\.(?:attention|self_attn)\.o_proj\.", ".attn.out_proj."),
    (r"\.(?:attention|self_attn)\.", ".attn."),
    (r"\.qkv_proj\.", ".Wqkv."),
    (r"\.mlp\.up_proj\.", ".mlp.fc11."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc12."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.(?:attn_ln|post_attention_layernorm)\.", ".norm1."),
    (r"\.(?:mlp_ln|post_mlp_layernorm)\.", ".norm2."),
)
_SPLIT = re.compile(r"(.*)\.([qkv])_proj\.(\w+)")
_JOINED = re.compile(r"(.*)\.up_gate_proj\.(\w+)")


@dataclass
class ModelArgs:
    """What a config.json says."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    token_types: int
    theta: float
    eps: float
    act: str
    has_bias: bool
    """Of the projections of attention, and of the last one of the gated units."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Read a config.json, as on the Hub or with the names of transformers 5."""
        is_gte = config["model_type"] == "gte"
        hidden = config.get("n_embd") or config["hidden_size"]
        rope = config.get("rope_parameters") or {}
        return cls(
            config["vocab_size"],
            hidden,
            config.get("n_layer") or config["num_hidden_layers"],
            config.get("n_head") or config["num_attention_heads"],
            config.get("n_inner") or config.get("intermediate_size") or 4 * hidden,
            config.get("type_vocab_size", 1 if is_gte else 2),
            float(
                config.get("rotary_emb_base")
                or config.get("rope_theta")
                or rope.get("rope_theta", 160_000.0 if is_gte else 1000.0)
            ),
            config.get("layer_norm_epsilon") or config.get("layer_norm_eps", 1e-12),
            config.get("hidden_act", "gelu") if is_gte else "silu",
            is_gte,
        )


class _Embeddings(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden)
        if args.token_types:
            self.token_type_embeddings = nn.Embedding(args.token_types, args.hidden)

    def __call__(self, tokens: mx.array) -> mx.array:
        out: mx.array = self.word_embeddings(tokens)
        if "token_type_embeddings" in self:
            out = out + self.token_type_embeddings(mx.zeros_like(tokens))
        return out


class _Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads = args.heads
        self.Wqkv = nn.Linear(args.hidden, 3 * args.hidden, bias=args.has_bias)
        self.out_proj = nn.Linear(args.hidden, args.hidden, bias=args.has_bias)
        self.rope = nn.RoPE(args.hidden // args.heads, base=args.theta)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        projected: mx.array = self.out_proj(rotary_attention(self.Wqkv(x), self.heads, self.rope, mask))
        return projected


class _Mlp(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.fc11 = nn.Linear(args.hidden, args.intermediate, bias=False)
        self.fc12 = nn.Linear(args.hidden, args.intermediate, bias=False)
        self.fc2 = nn.Linear(args.intermediate, args.hidden, bias=args.has_bias)
        self.act = activation(args.act)

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.fc2(self.fc11(x) * self.act(self.fc12(x)))
        return out


class _Layer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attn = _Attention(args)
        self.mlp = _Mlp(args)
        self.norm1 = nn.LayerNorm(args.hidden, eps=args.eps)
        self.norm2 = nn.LayerNorm(args.hidden, eps=args.eps)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.norm1(x + self.attn(x, mask))
        out: mx.array = self.norm2(x + self.mlp(x))
        return out


class _Layers(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.layers = [_Layer(args) for _ in range(args.layers)]


class Model(nn.Module):
    """A model of this family, which embeds."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the modules; their weights are loaded afterwards."""
        super().__init__()
        self.embeddings = _Embeddings(args)
        self.emb_ln = nn.LayerNorm(args.hidden, eps=args.eps)
        self.encoder = _Layers(args)

    def hidden(self, batch: Batch) -> mx.array:
        """Return the last hidden state of each token."""
        x: mx.array = self.emb_ln(self.embeddings(batch.tokens))
        for layer in self.encoder.layers:
            x = layer(x, batch.mask)
        return x

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Give all weights the names that they have here, and leave out those that nothing here uses."""
        named: dict[str, mx.array] = {}
        parts: dict[tuple[str, str], dict[str, mx.array]] = {}
        for name, value in weights.items():
            for pattern, replacement in _RENAMED:
                name = re.sub(pattern, replacement, name)
            if split := _SPLIT.fullmatch(name):
                parts.setdefault((split[1], split[3]), {})[split[2]] = value
            elif joined := _JOINED.fullmatch(name):
                for own, part in zip(("fc11", "fc12"), mx.split(value, 2), strict=True):
                    named[f"{joined[1]}.{own}.{joined[2]}"] = part
            elif _UNUSED.match(name) is None:
                named[name] = value
        for (module, kind), each in parts.items():
            named[f"{module}.Wqkv.{kind}"] = mx.concatenate([each[one] for one in "qkv"])
        return named
