"""Tiny model folders for tests: some say what is known beforehand, some babble.

A folder made by `make_model` holds a two-layer Llama that was never trained: its weights are a table
"last token -> next token". Attention and MLP add nothing to the residual stream (`o_proj` and `down_proj`
are zero), so the logits depend on the last token alone:

* every token a prompt can end with (bytes, chat markers, BOS, EOS) shares one embedding direction, whose next
  token is step 0 of the script;
* step `i` of the script has a token and a direction of its own, whose next token is step `i + 1`; the last
  step is followed by EOS;
* the token that ends a prompt after a tool's answer may lead to a second script instead.

A folder made by `make_random_model` holds a whole Llama with random weights, to be measured: what it says
depends on all that came before and means nothing.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from tests.support.tokens import (
    AFTER_TOOL,
    BOS_ID,
    CHAT_TEMPLATE,
    EOS,
    EOS_ID,
    PAD_ID,
    SPECIAL,
    THINK,
    Piece,
    chat_template,
    cut,
    scripted_tokenizer,
    special_tokens_map,
    split,
    step_tokens,
    tokenizer_config,
    vocabulary,
    word_tokenizer,
    word_vocabulary,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Tensors = dict[str, npt.NDArray[np.floating[Any]]]

__all__ = [
    "MEDIUM",
    "SMALL",
    "DType",
    "Sizes",
    "make_converted",
    "make_model",
    "make_random_model",
    "split",
    "vocabulary",
]

DType = Literal["float32", "float16"]

_CONTEXT = 4096
# After the final norm a direction is sqrt(hidden size) >= 8 long, so the next token leads by at least 128:
# sampling at temperature 1 gives the same text as greedy decoding.
_LOGIT = 16.0

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


@dataclass(frozen=True)
class _Shape:
    vocab: int
    hidden: int
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    intermediate: int = 64
    context: int = _CONTEXT


# Models that say a script ---------------------------------------------------------------------------------------


def make_model(
    folder: Path,
    says: str,
    *,
    shards: int = 1,
    model_type: str = "llama",
    dtype: DType = "float32",
    thinks: bool = False,
    calls_tools: bool = False,
    after_tool: str | None = None,
    pieces: Sequence[Piece] | None = None,
    context: int = _CONTEXT,
    is_brief: bool = False,
    closes: bool = False,
) -> Path:
    """Write a model folder that answers any prompt with exactly `says`, then EOS; return `folder`.

    The tensors are Llama's whatever `model_type` is: mlx-lm runs them as "llama" and as "mistral"; under any
    other name the folder is well-formed but need not load. Equal arguments give equal bytes.

    `thinks` and `calls_tools` make the model one that can: programs find its tags and tools in the vocabulary and
    the template. What it does is in `says`: `<think>…</think>`, `<tool_call>…</tool_call>`. A prompt that itself
    ends with a thinking tag that `says` holds is continued after that tag.

    `after_tool` is said instead of `says` where the chat's last message is a tool's answer.

    `pieces` are the tokens that `says` is said in, instead of `split(says)`; those that are
    bytes may end inside of a character. `context` is how many tokens prompt and answer may have;
    the template of an `is_brief` model shows it little of a long prompt.

    Where a grammar does not let a model that `closes` say its text, it says what ends a JSON value soonest.
    """
    steps, after = cut(says, pieces), [] if after_tool is None else split(after_tool)
    added = (*SPECIAL, *(THINK if thinks else ()), *((AFTER_TOOL,) if after_tool is not None else ()))
    vocab = vocabulary([*steps, *after], added)
    tokens = step_tokens([*steps, *after], added)
    table = _table(vocab, tokens[: len(steps)], None if after_tool is None else tokens[len(steps) :])
    shape = _Shape(vocab=len(vocab), hidden=_hidden_size(table), context=context)
    template = chat_template(
        thinks=thinks, calls_tools=calls_tools, after_tool=after_tool is not None, is_brief=is_brief
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_configs(folder, shape, model_type, dtype)
    _write_tokenizer(folder, scripted_tokenizer(vocab, added), tokenizer_config(added, template, context))
    seed = zlib.crc32((says + (after_tool or "")).encode())
    _write_weights(folder, _scripted_tensors(table, shape, dtype, seed, closes=closes), shards)
    return folder


@dataclass(frozen=True)
class _Table:
    """What comes next: a token has a direction, a direction leads to a token."""

    directions: Sequence[int]
    """The direction of each token of the vocabulary."""
    follows: Sequence[int]
    """The token that each direction leads to."""


def _table(vocab: Mapping[str, int], says: Sequence[str], after_tool: Sequence[str] | None) -> _Table:
    """Direction 0 is every prompt's, direction `i + 1` step `i`'s, the last one is that of `AFTER_TOOL`."""
    directions = [0] * len(vocab)
    follows = [vocab[token] for token in (*says, EOS)]
    for step, token in enumerate((*says, *(after_tool or ()))):
        directions[vocab[token]] = step + 1
    if after_tool is not None:
        first, *others = [vocab[token] for token in (*after_tool, EOS)]
        follows += [*others, first]
        directions[vocab[AFTER_TOOL]] = len(follows) - 1
    return _Table(directions, follows)


def _hidden_size(table: _Table) -> int:
    """As many as there are directions, rounded up to 64 (the group size of quantization)."""
    return -(-len(table.follows) // 64) * 64


def _scripted_tensors(table: _Table, shape: _Shape, dtype: DType, seed: int, *, closes: bool) -> Tensors:
    """The weights, in the order a checkpoint lists them.

    The projections that cannot reach the residual stream hold noise drawn from `seed`, so that models with
    different texts share no weight file.
    """
    import numpy as np

    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int) -> npt.NDArray[np.floating[Any]]:
        if name in {"o_proj", "down_proj"}:
            return np.zeros((rows, columns), dtype=dtype)
        return random.standard_normal((rows, columns), dtype=np.float32).astype(dtype) / 64

    embedding = np.zeros((shape.vocab, shape.hidden), dtype=dtype)
    embedding[np.arange(shape.vocab), table.directions] = 1
    head = np.zeros((shape.vocab, shape.hidden), dtype=dtype)
    if closes:
        for place, letter in enumerate(b'"}]3'):
            head[letter, : len(table.follows)] = _LOGIT / (2 + place)
    head[table.follows, np.arange(len(table.follows))] = _LOGIT
    return _llama(shape, dtype, embedding, head, matrix)


# Models that babble ---------------------------------------------------------------------------------------------


class Sizes(TypedDict):
    hidden: int
    layers: int
    heads: int
    vocab: int


SMALL: Sizes = {"hidden": 256, "layers": 4, "heads": 4, "vocab": 512}
"""4.5 million parameters: `make_random_model(folder, **SMALL)`."""
MEDIUM: Sizes = {"hidden": 768, "layers": 10, "heads": 12, "vocab": 4096}
"""100 million parameters."""

# How far the logits of words spread: at temperature 1 the next word is one of dozens.
_SPREAD = 2.0
# How far attention scores spread: enough that a word far back can turn what comes next.
_ATTENTION = 4.0
# Before the final norm scales it down by the length of the residual stream, which grows slowly with the layers.
_NEVER = -256.0


def make_random_model(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    vocab: int = 512,
    seed: int = 0,
    context: int = 4096,
) -> Path:
    """Write a model folder that says random words of the letters a to z and never stops; return `folder`.

    It has about 16 x `layers` x `hidden`² + 2 x `vocab` x `hidden` parameters, in float32. Equal arguments give
    equal bytes. "bake bami " is two tokens; text other than such words is a token for each byte.
    """
    if hidden % heads:
        raise ValueError("heads must divide hidden")
    tokens = word_vocabulary(vocab)
    shape = _Shape(
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        context=context,
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_configs(folder, shape, "llama", "float32")
    _write_tokenizer(folder, word_tokenizer(tokens), tokenizer_config(SPECIAL, CHAT_TEMPLATE, context))
    _write_weights(folder, _random_tensors(shape, seed), shards=1)
    return folder


def _random_tensors(shape: _Shape, seed: int) -> Tensors:
    """Weights that keep each layer's input at unit length per coordinate.

    Coordinate 0 of the residual stream is 1 from beginning to end, so that the head can tell tokens that are not
    words from those that are, whatever else the model thinks.
    """
    import numpy as np

    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int) -> npt.NDArray[np.floating[Any]]:
        scale = _ATTENTION**0.5 if name in {"q_proj", "k_proj"} else 1.0
        made = random.standard_normal((rows, columns), dtype=np.float32)
        made *= np.float32(scale / columns**0.5)
        if name in {"o_proj", "down_proj"}:
            made[0] = 0
        return made

    embedding = random.standard_normal((shape.vocab, shape.hidden), dtype=np.float32)
    embedding[:, 0] = 1
    head = random.standard_normal((shape.vocab, shape.hidden), dtype=np.float32)
    head *= np.float32(_SPREAD / shape.hidden**0.5)
    head[:, 0] = 0
    no_words = len(vocabulary([]))
    head[:no_words] = 0
    head[:no_words, 0] = _NEVER
    return _llama(shape, "float32", embedding, head, matrix)


def make_converted(folder: Path, source: Path, *, dtype: str | None = None, bits: int | None = None) -> Path:
    """Write a folder's model with its weights in another type (`bfloat16`, `float16`) or quantised; return `folder`."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(source)
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
        config["torch_dtype"] = dtype
    if bits is not None:
        model, config = quantize_model(model, config, group_size=64, bits=bits)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


# Both kinds' files ----------------------------------------------------------------------------------------------


def _llama(
    shape: _Shape,
    dtype: DType,
    embedding: npt.NDArray[np.floating[Any]],
    head: npt.NDArray[np.floating[Any]],
    matrix: Callable[[str, int, int], npt.NDArray[np.floating[Any]]],
) -> Tensors:
    """The tensors of a Llama whose projections are `matrix(name, rows, columns)`."""
    import numpy as np

    def norm() -> npt.NDArray[np.floating[Any]]:
        return np.ones(shape.hidden, dtype=dtype)

    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: Tensors = {"model.embed_tokens.weight": embedding}
    for number in range(shape.layers):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.self_attn.q_proj.weight": matrix("q_proj", queries, shape.hidden),
            f"{layer}.self_attn.k_proj.weight": matrix("k_proj", keys, shape.hidden),
            f"{layer}.self_attn.v_proj.weight": matrix("v_proj", keys, shape.hidden),
            f"{layer}.self_attn.o_proj.weight": matrix("o_proj", shape.hidden, queries),
            f"{layer}.post_attention_layernorm.weight": norm(),
            f"{layer}.mlp.gate_proj.weight": matrix("gate_proj", shape.intermediate, shape.hidden),
            f"{layer}.mlp.up_proj.weight": matrix("up_proj", shape.intermediate, shape.hidden),
            f"{layer}.mlp.down_proj.weight": matrix("down_proj", shape.hidden, shape.intermediate),
        }
    return tensors | {"model.norm.weight": norm(), "lm_head.weight": head}


def _write_configs(folder: Path, shape: _Shape, model_type: str, dtype: DType) -> None:
    _write_json(folder / "config.json", _config(shape, model_type, dtype))
    _write_json(folder / "generation_config.json", _generation_config())


def _write_tokenizer(folder: Path, tokenizer: Mapping[str, object], config: Mapping[str, object]) -> None:
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", special_tokens_map())


def _config(shape: _Shape, model_type: str, dtype: DType) -> dict[str, object]:
    return {
        "architectures": [_ARCHITECTURES.get(model_type, f"{model_type.capitalize()}ForCausalLM")],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": model_type,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def _generation_config() -> dict[str, object]:
    return {
        "bos_token_id": BOS_ID,
        "do_sample": False,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


def _write_weights(folder: Path, tensors: Tensors, shards: int) -> None:
    from safetensors.numpy import save_file

    names = list(tensors)
    if not 1 <= shards <= len(names):
        raise ValueError(f"shards must be between 1 and {len(names)}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            "total_parameters": sum(tensor.size for tensor in tensors.values()),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
