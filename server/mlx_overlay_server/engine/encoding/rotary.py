"""nomic-bert, gte and `new`, gte's older name: BERT with rotary positions and, in most of them, gated units.

Parameters have the names that nomic-bert's have on the Hub; `sanitize` renames those of gte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_overlay_server.engine.encoding.experts import Experts
from mlx_overlay_server.engine.encoding.parts import Batch, Head, activation, rotary_attention

_UNUSED = re.compile(r"^(cls|lm_head|pooler|classifier)\.")
_OF_HEAD = ((r"^pooler\.", "head."), (r"^classifier\.", "head.out."))
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
    (r"\.mlp\.router\.layer\.", ".mlp.router."),
    (r"\.mlp\.experts\.mlp\.(w[12])$", r".mlp.\1"),
    (r"\.mlp\.experts\.bias$", ".mlp.bias"),
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
    ntk: float
    """The factor by which gte stretches rotary positions for long texts, by NTK's rule; 1: it does not."""
    eps: float
    act: str
    is_gated: bool
    """Whether units are gated; those of nomic-bert's version 2 are not."""
    has_attention_bias: bool
    has_inner_bias: bool
    """Whether the first projection of a layer's units has a bias."""
    has_outer_bias: bool
    """Whether the last one has."""
    experts: int
    """The number of experts of each second layer, of which each token gets the best ones; 0: there are none."""
    best: int
    is_ranker: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Read a config.json, as on the Hub or with the names of transformers 5."""
        is_gte = config["model_type"] != "nomic_bert"
        hidden = config.get("n_embd") or config["hidden_size"]
        rope = config.get("rope_parameters") or {}
        act = config.get("hidden_act", "gelu") if is_gte else config.get("activation_function", "swiglu")
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
            float((config.get("rope_scaling") or {}).get("factor", 1)),
            config.get("layer_norm_epsilon") or config.get("layer_norm_eps", 1e-12),
            "silu" if act == "swiglu" else act,
            is_gte or act == "swiglu",
            is_gte or bool(config.get("qkv_proj_bias")),
            bool(config.get("mlp_fc1_bias")),
            is_gte or bool(config.get("mlp_fc2_bias")),
            config.get("num_experts") or 0,
            config.get("moe_top_k") or 1,
            config["architectures"][0].endswith("ForSequenceClassification") if config.get("architectures") else False,
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
        self.Wqkv = nn.Linear(args.hidden, 3 * args.hidden, bias=args.has_attention_bias)
        self.out_proj = nn.Linear(args.hidden, args.hidden, bias=args.has_attention_bias)
        self.rope = _rope(args.hidden // args.heads, args.theta, args.ntk)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        projected: mx.array = self.out_proj(rotary_attention(self.Wqkv(x), self.heads, self.rope, mask))
        return projected


class _Mlp(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        names = ("fc11", "fc12") if args.is_gated else ("fc1",)
        for name in names:
            self[name] = nn.Linear(args.hidden, args.intermediate, bias=args.has_inner_bias)
        self.fc2 = nn.Linear(args.intermediate, args.hidden, bias=args.has_outer_bias)
        self.act = activation(args.act)

    def __call__(self, x: mx.array) -> mx.array:
        inner = self.fc11(x) * self.act(self.fc12(x)) if "fc11" in self else self.act(self.fc1(x))
        out: mx.array = self.fc2(inner)
        return out


class _Layer(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attn = _Attention(args)
        has_experts = args.experts and layer % 2
        sizes = (args.hidden, args.intermediate)
        self.mlp = Experts(*sizes, args.experts, args.best, args.act) if has_experts else _Mlp(args)
        self.norm1 = nn.LayerNorm(args.hidden, eps=args.eps)
        self.norm2 = nn.LayerNorm(args.hidden, eps=args.eps)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.norm1(x + self.attn(x, mask))
        out: mx.array = self.norm2(x + self.mlp(x))
        return out


class _Layers(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.layers = [_Layer(args, layer) for layer in range(args.layers)]


class Model(nn.Module):
    """A model of this family, with its head if it ranks."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the modules; their weights are loaded afterwards."""
        super().__init__()
        self.args = args
        self.embeddings = _Embeddings(args)
        self.emb_ln = nn.LayerNorm(args.hidden, eps=args.eps)
        self.encoder = _Layers(args)
        if args.is_ranker:
            self.head = Head(args.hidden, "tanh")

    def hidden(self, batch: Batch) -> mx.array:
        """Return the last hidden state of each token."""
        x: mx.array = self.emb_ln(self.embeddings(batch.tokens))
        for layer in self.encoder.layers:
            x = layer(x, batch.mask)
        return x

    def scores(self, hidden: mx.array, batch: Batch) -> mx.array:  # noqa: ARG002 - as those of other models
        """Return the logit of each pair."""
        return self.head(hidden[:, 0])

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Give all weights the names that they have here, and leave out those that nothing here uses."""
        named: dict[str, mx.array] = {}
        parts: dict[tuple[str, str], dict[str, mx.array]] = {}
        for name, value in weights.items():
            for pattern, replacement in (*_RENAMED, *(_OF_HEAD if self.args.is_ranker else ())):
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


def _rope(size: int, theta: float, ntk: float) -> Callable[[mx.array], mx.array]:
    """Return what turns the vectors of a head by their positions; `ntk`: as in `ModelArgs`."""
    if ntk == 1:
        rope: Callable[[mx.array], mx.array] = nn.RoPE(size, base=theta)
        return rope
    # From token to token each pair of numbers turns by 1 / period; the longest period becomes `ntk` times as long.
    pairs = mx.arange(0, size, 2) / size
    periods = (theta * ntk) ** pairs * ntk ** (2 / size)
    return lambda x: mx.fast.rope(x, size, traditional=False, base=None, scale=1.0, offset=0, freqs=periods)
