"""Tiny model folders whose greedy answer is known beforehand.

A folder made here holds a two-layer Llama that was never trained: its weights are a table
"last token -> next token". Attention and MLP add nothing to the residual stream (`o_proj` and `down_proj`
are zero), so the logits depend on the last token alone:

* every token a prompt can end with (bytes, chat markers, BOS, EOS) shares one embedding direction, whose next
  token is step 0 of the script;
* step `i` of the script has a token and a direction of its own, whose next token is step `i + 1`; the last
  step is followed by EOS.

A step's token is never produced by encoding text. It is stored as a step number between two private-use
characters, then the text; the decoder drops the number. So two steps with the same text are two tokens.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Tensors = dict[str, npt.NDArray[np.floating[Any]]]

DType = Literal["float32", "float16"]

BOS = "<|begin_of_text|>"
EOS = "<|im_end|>"
PAD = "<|pad|>"
TURN = "<|im_start|>"
SPECIAL = (BOS, EOS, PAD, TURN)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Opens and closes the step number inside a step's token. Private use: `says` may not contain them.
_MARK_OPEN, _MARK_CLOSE = "\ue000", "\ue001"

# bytes 0..255 come first, so a byte is its own token id
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_BOS_ID, _EOS_ID, _PAD_ID = (len(_BYTES) + SPECIAL.index(token) for token in (BOS, EOS, PAD))

_LAYERS = 2
_HEADS = 2
_KV_HEADS = 1
_HEAD_DIM = 64
_INTERMEDIATE = 64
_CONTEXT = 4096
# After the final norm a direction is sqrt(hidden size) >= 8 long, so the next token leads by at least 128:
# sampling at temperature 1 gives the same text as greedy decoding.
_LOGIT = 16.0

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def make_model(
    folder: Path, says: str, *, shards: int = 1, model_type: str = "llama", dtype: DType = "float32"
) -> Path:
    """Write a model folder that answers any prompt with exactly `says`, then EOS; return `folder`.

    The tensors are Llama's whatever `model_type` is: mlx-lm runs them as "llama" and as "mistral"; under any
    other name the folder is well-formed but need not load. Equal arguments give equal bytes.
    """
    steps = split(says)
    vocab = vocabulary(steps)
    folder.mkdir(parents=True, exist_ok=True)
    hidden = _hidden_size(steps)
    _write_json(folder / "config.json", _config(len(vocab), hidden, model_type, dtype))
    _write_json(folder / "generation_config.json", _generation_config())
    _write_json(folder / "tokenizer.json", _tokenizer(vocab))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "special_tokens_map.json", _special_tokens())
    _write_weights(folder, _tensors(len(steps), vocab, hidden, dtype, zlib.crc32(says.encode())), shards)
    return folder


def split(says: str) -> list[str]:
    """Cut a text into the pieces the model says one by one: words, each with the space before it."""
    if _MARK_OPEN in says or _MARK_CLOSE in says:
        raise ValueError("the text holds a character that marks step tokens")
    return re.findall(r"\s*\S+|\s+", says)


def vocabulary(steps: Sequence[str]) -> dict[str, int]:
    """Token -> id: 256 bytes, the special tokens, one token for each step."""
    scripted = [f"{_MARK_OPEN}{number}{_MARK_CLOSE}{text}" for number, text in enumerate(steps)]
    return {token: number for number, token in enumerate((*_BYTES, *SPECIAL, *scripted))}


def _hidden_size(steps: Sequence[str]) -> int:
    """One direction for prompts and one for each step, rounded up to 64 (the group size of quantization)."""
    return -(-(1 + len(steps)) // 64) * 64


def _config(vocab_size: int, hidden: int, model_type: str, dtype: DType) -> dict[str, object]:
    return {
        "architectures": [_ARCHITECTURES.get(model_type, f"{model_type.capitalize()}ForCausalLM")],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": _BOS_ID,
        "eos_token_id": _EOS_ID,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": _INTERMEDIATE,
        "max_position_embeddings": _CONTEXT,
        "mlp_bias": False,
        "model_type": model_type,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": _KV_HEADS,
        "pad_token_id": _PAD_ID,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _generation_config() -> dict[str, object]:
    return {
        "bos_token_id": _BOS_ID,
        "do_sample": False,
        "eos_token_id": _EOS_ID,
        "pad_token_id": _PAD_ID,
    }


def _special_tokens() -> dict[str, object]:
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


def _added_tokens() -> list[dict[str, object]]:
    return [
        {
            "id": len(_BYTES) + number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(SPECIAL)
    ]


def _tokenizer_config() -> dict[str, object]:
    return {
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in _added_tokens()
        },
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": _CONTEXT,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _tokenizer(vocab: Mapping[str, int]) -> dict[str, object]:
    """tokenizer.json: text is encoded byte by byte, BOS first; tokens are joined with nothing between."""
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [_BOS_ID], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Replace", "pattern": {"Regex": f"^{_MARK_OPEN}[0-9]+{_MARK_CLOSE}"}, "content": ""},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [],
        },
    }


def _tensors(steps: int, vocab: Mapping[str, int], hidden: int, dtype: DType, seed: int) -> Tensors:
    """The weights, in the order a checkpoint lists them.

    The projections that cannot reach the residual stream hold noise drawn from `seed`, so that models with
    different texts share no weight file.
    """
    import numpy as np

    random = np.random.default_rng(seed)

    def noise(rows: int, columns: int) -> npt.NDArray[np.floating[Any]]:
        return random.standard_normal((rows, columns), dtype=np.float32).astype(dtype) / 64

    prompt = 0  # the direction of every token that is not a step; step i has direction i + 1
    first_step = len(vocab) - steps
    embedding = np.zeros((len(vocab), hidden), dtype=dtype)
    embedding[:first_step, prompt] = 1
    head = np.zeros((len(vocab), hidden), dtype=dtype)
    for step in range(steps):
        embedding[first_step + step, step + 1] = 1
        head[first_step + step, step] = _LOGIT
    head[_EOS_ID, steps] = _LOGIT

    tensors: Tensors = {"model.embed_tokens.weight": embedding}
    for number in range(_LAYERS):
        layer = f"model.layers.{number}"
        tensors |= {
            f"{layer}.input_layernorm.weight": np.ones(hidden, dtype=dtype),
            f"{layer}.self_attn.q_proj.weight": noise(_HEADS * _HEAD_DIM, hidden),
            f"{layer}.self_attn.k_proj.weight": noise(_KV_HEADS * _HEAD_DIM, hidden),
            f"{layer}.self_attn.v_proj.weight": noise(_KV_HEADS * _HEAD_DIM, hidden),
            f"{layer}.self_attn.o_proj.weight": np.zeros((hidden, _HEADS * _HEAD_DIM), dtype=dtype),
            f"{layer}.post_attention_layernorm.weight": np.ones(hidden, dtype=dtype),
            f"{layer}.mlp.gate_proj.weight": noise(_INTERMEDIATE, hidden),
            f"{layer}.mlp.up_proj.weight": noise(_INTERMEDIATE, hidden),
            f"{layer}.mlp.down_proj.weight": np.zeros((hidden, _INTERMEDIATE), dtype=dtype),
        }
    tensors["model.norm.weight"] = np.ones(hidden, dtype=dtype)
    tensors["lm_head.weight"] = head
    return tensors


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
