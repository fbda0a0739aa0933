"""BERT and the encoders that differ from it in names and details.

Those are RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, MPNet, ELECTRA, ALBERT, whose layers share their weights, and
Jina's BERT, which has ALiBi's biases instead of positions, and gated units. Parameters have the names that transformers
gives BERT's; `sanitize` renames those of the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_overlay_server.engine.encoding.parts import Batch, Head, activation

SHIFTED = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})
"""Types whose positions begin after that of the padding token."""
_BUCKETS = 32
_FARTHEST = 128
"""MPNet's relative positions: so many buckets, and all distances from here on share one on either side."""

_RENAMED = (
    (r"^(albert|bert|distilbert|electra|mpnet|roberta)\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    # DistilBERT's names
    (r"^transformer\.layer\.", "encoder.layer."),
    (r"\.attention\.([qkv])_lin\.", r".attention.self.\1."),
    (r"\.attention\.out_lin\.", ".attention.output.dense."),
    (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.ffn\.lin1\.", ".intermediate.dense."),
    (r"\.ffn\.lin2\.", ".output.dense."),
    (r"\.output_layer_norm\.", ".output.LayerNorm."),
    # MPNet's
    (r"\.attention\.attn\.([qkv])\.", r".attention.self.\1."),
    (r"\.attention\.attn\.o\.", ".attention.output.dense."),
    (r"\.attention\.LayerNorm\.", ".attention.output.LayerNorm."),
    (r"\.attention\.self\.q\.", ".attention.self.query."),
    (r"\.attention\.self\.k\.", ".attention.self.key."),
    (r"\.attention\.self\.v\.", ".attention.self.value."),
    # ALBERT's and ELECTRA's
    (r"^encoder\.embedding_hidden_mapping_in\.", "embeddings.project."),
    (r"^embeddings_project\.", "embeddings.project."),
    (r"^encoder\.albert_layer_groups\.0\.albert_layers\.", "encoder.layer."),
    (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.attention\.dense\.", ".attention.output.dense."),
    (r"\.ffn\.(\w+)$", r".intermediate.dense.\1"),
    (r"\.ffn_output\.", ".output.dense."),
    (r"\.full_layer_layer_norm\.", ".output.LayerNorm."),
    # Those of Jina's BERT
    (r"\.mlp\.gated_layers\.", ".intermediate.dense."),
    (r"\.mlp\.wo\.", ".output.dense."),
    (r"\.mlp\.layernorm\.", ".output.LayerNorm."),
)
_HEADS = (
    (r"^(pooler\.dense|pooler|classifier\.dense|pre_classifier)\.(weight|bias|scales|biases)$", r"head.dense.\2"),
    (r"^(classifier|classifier\.out_proj)\.(weight|bias|scales|biases)$", r"head.out.\2"),
)
_UNUSED = re.compile(
    r"^(cls|lm_head|vocab_\w+|qa_outputs|predictions|\w+_predictions|generator_lm_head)\.|position_ids$|^pooler\.|"
    r"token_type_ids$"
)


@dataclass
class ModelArgs:
    """What a config.json says, under the names of BERT's."""

    model_type: str
    vocab_size: int
    hidden: int
    embedding: int
    """Size of the embeddings, which are projected to the hidden size where that is another."""
    layers: int
    heads: int
    intermediate: int
    positions: int
    token_types: int
    eps: float
    act: str
    pad: int
    has_alibi: bool
    is_gated: bool
    """Whether the units between the projections of a layer are gated."""
    is_ranker: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelArgs:
        """Read a config.json; DistilBERT has names of its own."""
        kind = config["model_type"]
        hidden = config.get("hidden_size") or config["dim"]
        return cls(
            kind,
            config["vocab_size"],
            hidden,
            config.get("embedding_size") or hidden,
            config.get("num_hidden_layers") or config["n_layers"],
            config.get("num_attention_heads") or config["n_heads"],
            config.get("intermediate_size") or config.get("hidden_dim") or 4 * hidden,
            config["max_position_embeddings"],
            config.get("type_vocab_size", 2) if kind not in ("distilbert", "mpnet") else 0,
            config.get("layer_norm_eps", 1e-12),
            config.get("hidden_act") or config.get("activation") or ("gelu_new" if kind == "albert" else "gelu"),
            config.get("pad_token_id", 1) if kind in SHIFTED else 0,
            config.get("position_embedding_type") == "alibi",
            config.get("feed_forward_type") == "geglu",
            config["architectures"][0].endswith("ForSequenceClassification") if config.get("architectures") else False,
        )


class _Embeddings(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.first = args.pad + 1 if args.model_type in SHIFTED else 0
        self.word_embeddings = nn.Embedding(args.vocab_size, args.embedding)
        if not args.has_alibi:
            self.position_embeddings = nn.Embedding(args.positions, args.embedding)
        if args.token_types:
            self.token_type_embeddings = nn.Embedding(args.token_types, args.embedding)
        self.LayerNorm = nn.LayerNorm(args.embedding, eps=args.eps)
        if args.embedding != args.hidden or args.model_type == "albert":
            self.project = nn.Linear(args.embedding, args.hidden)

    def __call__(self, tokens: mx.array, types: mx.array) -> mx.array:
        x = self.word_embeddings(tokens)
        if "position_embeddings" in self:
            x = x + self.position_embeddings(mx.arange(self.first, self.first + tokens.shape[1]))
        if "token_type_embeddings" in self:
            x = x + self.token_type_embeddings(mx.minimum(types, self.token_type_embeddings.weight.shape[0] - 1))
        out: mx.array = self.LayerNorm(x)
        return self.project(out) if "project" in self else out


class _Heads(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads = args.heads
        self.query, self.key, self.value = (nn.Linear(args.hidden, args.hidden) for _ in range(3))

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        rows, length, size = x.shape
        queries, keys, values = (
            each(x).reshape(rows, length, self.heads, -1).transpose(0, 2, 1, 3)
            for each in (self.query, self.key, self.value)
        )
        scale = 1 / math.sqrt(size // self.heads)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
        return out.transpose(0, 2, 1, 3).reshape(rows, length, size)


class _Output(nn.Module):
    """A projection back, added to what went in."""

    def __init__(self, size: int, args: ModelArgs) -> None:
        super().__init__()
        self.dense = nn.Linear(size, args.hidden)
        self.LayerNorm = nn.LayerNorm(args.hidden, eps=args.eps)

    def __call__(self, x: mx.array, before: mx.array) -> mx.array:
        out: mx.array = self.LayerNorm(before + self.dense(x))
        return out


class _Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self = _Heads(args)
        self.output = _Output(args.hidden, args)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        return self.output(self.self(x, mask), x)


class _Intermediate(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.is_gated = args.is_gated
        self.dense = nn.Linear(args.hidden, args.intermediate * (1 + args.is_gated), bias=not args.is_gated)
        self.act = activation(args.act)

    def __call__(self, x: mx.array) -> mx.array:
        if self.is_gated:
            gate, inner = mx.split(self.dense(x), 2, axis=-1)
            return self.act(gate) * inner
        return self.act(self.dense(x))


class _Layer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = _Attention(args)
        self.intermediate = _Intermediate(args)
        self.output = _Output(args.intermediate, args)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class _Layers(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.times = args.layers if args.model_type == "albert" else 1
        self.layer = [_Layer(args) for _ in range(args.layers // self.times)]
        self.slopes = _slopes(args.heads) if args.has_alibi else ()
        if args.model_type == "mpnet":
            self.relative_attention_bias = nn.Embedding(_BUCKETS, args.heads)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        if (bias := self._bias(x.shape[1])) is not None:
            mask = bias if mask is None else mx.where(mask, bias, -mx.inf)
            mask = mask.astype(x.dtype)
        for layer in self.layer * self.times:
            x = layer(x, mask)
        return x

    def _bias(self, length: int) -> mx.array | None:
        """Return what is added to the scores of each pair of positions, for each head; None for absolute positions."""
        if "relative_attention_bias" in self:
            bias: mx.array = self.relative_attention_bias(_buckets(length)).transpose(2, 0, 1)[None]
            return bias
        if self.slopes:
            at = mx.arange(length)
            return -mx.abs(at[:, None] - at[None, :]) * mx.array(self.slopes)[None, :, None, None]
        return None


class Model(nn.Module):
    """An encoder of this family, with its head if it ranks."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the modules; their weights are loaded afterwards."""
        super().__init__()
        self.args = args
        self.embeddings = _Embeddings(args)
        self.encoder = _Layers(args)
        if args.is_ranker:
            self.head = Head(args.hidden, {"distilbert": "relu", "electra": "gelu"}.get(args.model_type, "tanh"))

    def hidden(self, batch: Batch) -> mx.array:
        """Return the last hidden state of each token."""
        types = (mx.arange(batch.longest) >= batch.first[:, None]).astype(mx.int32)
        return self.encoder(self.embeddings(batch.tokens, types), batch.mask)

    def scores(self, hidden: mx.array, batch: Batch) -> mx.array:  # noqa: ARG002 - as those of other models
        """Return the logit of each pair."""
        return self.head(hidden[:, 0])

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Give all weights the names that they have here, and leave out those that nothing here uses."""
        renamed = {}
        for name, value in weights.items():
            for pattern, replacement in _RENAMED:
                name = re.sub(pattern, replacement, name)
            if self.args.is_ranker:
                for pattern, replacement in _HEADS:
                    name = re.sub(pattern, replacement, name)
            if _UNUSED.search(name) is None and (self.args.is_ranker or not name.startswith("head.")):
                renamed[name] = value
        return renamed


def _slopes(heads: int) -> tuple[float, ...]:
    """Return ALiBi's slope of each head: a geometric sequence, and more from the next longer one between its values."""
    whole = 1 << (heads.bit_length() - 1)
    powers = [8 * (number + 1) / whole for number in range(whole)]
    powers += [4 * (number + 1) / whole for number in range(0, 2 * (heads - whole), 2)]
    return tuple(2.0**-power for power in powers)


def _buckets(length: int) -> mx.array:
    """Return MPNet's bucket of each pair of positions: near ones have one each, far ones share one."""
    positions = mx.arange(length)
    distance = positions[:, None] - positions[None, :]  # the query's position less the key's
    half = _BUCKETS // 2
    side = (distance < 0).astype(mx.int32) * half
    distance = mx.abs(distance)
    exact = half // 2
    ratio = mx.log(mx.maximum(distance, 1) / exact) / math.log(_FARTHEST / exact)
    far = mx.minimum(exact + (ratio * (half - exact)).astype(mx.int32), half - 1)
    return side + mx.where(distance < exact, distance, far)
