"""ModernBERT: rotary positions, gated units, and attention that is local in most layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_overlay_server.engine.encoding.parts import Batch, activation, rotary_attention

_OF_OTHER_HEADS = re.compile(r"^(head|classifier|decoder)\.")


@dataclass
class ModelArgs:
    """What a config.json says."""

    vocab_size: int
    hidden: int
    heads: int
    intermediate: int
    thetas: tuple[float, ...]
    """The base of the rotary positions, for each layer."""
    is_local: tuple[bool, ...]
    """For each layer, whether its tokens see only those that are near."""
    window: int
    """How far they see, on either side."""
    eps: float
    act: str
    has_norm_bias: bool
    has_attention_bias: bool
    has_mlp_bias: bool
    is_ranker: bool
    ranks_by: str
    """What a model that ranks makes its score of: `cls` or `mean`."""
    head_act: str
    has_head_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Read a config.json of transformers 4 or 5."""
        every = config.get("global_attn_every_n_layers", 3)
        kinds = config.get("layer_types")
        if kinds is None:
            kinds = [
                "sliding_attention" if at % every else "full_attention" for at in range(config["num_hidden_layers"])
            ]
        rope = config.get("rope_parameters") or {}
        thetas = {
            "full_attention": config.get("global_rope_theta", 160_000.0),
            "sliding_attention": config.get("local_rope_theta") or 10_000.0,
        }
        thetas |= {
            kind: each["rope_theta"] for kind, each in rope.items() if isinstance(each, dict) and "rope_theta" in each
        }
        return cls(
            config["vocab_size"],
            config["hidden_size"],
            config["num_attention_heads"],
            config["intermediate_size"],
            tuple(float(thetas[kind]) for kind in kinds),
            tuple(kind == "sliding_attention" for kind in kinds),
            config.get("local_attention", 128) // 2,
            config.get("norm_eps", 1e-5),
            config.get("hidden_activation", "gelu"),
            config.get("norm_bias", False),
            config.get("attention_bias", False),
            config.get("mlp_bias", False),
            config["architectures"][0].endswith("ForSequenceClassification") if config.get("architectures") else False,
            config.get("classifier_pooling", "cls"),
            config.get("classifier_activation", "gelu"),
            config.get("classifier_bias", False),
        )


class _Embeddings(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden)
        self.norm = nn.LayerNorm(args.hidden, eps=args.eps, bias=args.has_norm_bias)

    def __call__(self, tokens: mx.array) -> mx.array:
        out: mx.array = self.norm(self.tok_embeddings(tokens))
        return out


class _Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.heads = args.heads
        self.Wqkv = nn.Linear(args.hidden, 3 * args.hidden, bias=args.has_attention_bias)
        self.Wo = nn.Linear(args.hidden, args.hidden, bias=args.has_attention_bias)
        self.rope = nn.RoPE(args.hidden // args.heads, base=args.thetas[layer])

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        projected: mx.array = self.Wo(rotary_attention(self.Wqkv(x), self.heads, self.rope, mask))
        return projected


class _Mlp(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.Wi = nn.Linear(args.hidden, 2 * args.intermediate, bias=args.has_mlp_bias)
        self.Wo = nn.Linear(args.intermediate, args.hidden, bias=args.has_mlp_bias)
        self.act = activation(args.act)

    def __call__(self, x: mx.array) -> mx.array:
        inner, gate = mx.split(self.Wi(x), 2, axis=-1)
        out: mx.array = self.Wo(self.act(inner) * gate)
        return out


class _Layer(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        if layer:  # what the first layer gets has been normalised
            self.attn_norm = nn.LayerNorm(args.hidden, eps=args.eps, bias=args.has_norm_bias)
        self.attn = _Attention(args, layer)
        self.mlp_norm = nn.LayerNorm(args.hidden, eps=args.eps, bias=args.has_norm_bias)
        self.mlp = _Mlp(args)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = x + self.attn(self.attn_norm(x) if "attn_norm" in self else x, mask)
        return x + self.mlp(self.mlp_norm(x))


class _Head(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.dense = nn.Linear(args.hidden, args.hidden, bias=args.has_head_bias)
        self.norm = nn.LayerNorm(args.hidden, eps=args.eps, bias=args.has_norm_bias)
        self.act = activation(args.head_act)

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.norm(self.act(self.dense(x)))
        return out


class Model(nn.Module):
    """ModernBERT, with its head if it ranks."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the modules; their weights are loaded afterwards."""
        super().__init__()
        self.args = args
        self.embeddings = _Embeddings(args)
        self.layers = [_Layer(args, layer) for layer in range(len(args.thetas))]
        self.final_norm = nn.LayerNorm(args.hidden, eps=args.eps, bias=args.has_norm_bias)
        if args.is_ranker:
            self.head = _Head(args)
            self.classifier = nn.Linear(args.hidden, 1)

    def hidden(self, batch: Batch) -> mx.array:
        """Return the last hidden state of each token."""
        everywhere, nearby = batch.mask, batch.mask_near(self.args.window)
        x = self.embeddings(batch.tokens)
        for layer, is_local in zip(self.layers, self.args.is_local, strict=True):
            x = layer(x, nearby if is_local else everywhere)
        out: mx.array = self.final_norm(x)
        return out

    def scores(self, hidden: mx.array, batch: Batch) -> mx.array:
        """Return the logit of each pair."""
        pooled = hidden[:, 0]
        if self.args.ranks_by == "mean":
            pooled = (hidden * batch.real[..., None]).sum(axis=1) / batch.lengths[:, None]
        out: mx.array = self.classifier(self.head(pooled))
        return out

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Give all weights the names that they have here, and leave out those that nothing here uses."""
        named = {name.removeprefix("model."): value for name, value in weights.items()}
        if self.args.is_ranker:
            return {name: value for name, value in named.items() if not name.startswith("decoder.")}
        return {name: value for name, value in named.items() if _OF_OTHER_HEADS.match(name) is None}
