"""A tiny model that sees: mlx-lm's Muse Spark with weights drawn at random, and pictures to show it."""

from __future__ import annotations

import base64
import io
import json
import shutil
import string
from pathlib import Path
from typing import Any

from tests.support import muse_spark
from tests.support.tokens import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL,
    scripted_tokenizer,
    special_tokens_map,
    tokenizer_config,
    vocabulary,
)

PATCH = "<|patch|>"
"""What the template writes for an image. mlx-lm's processor has it as many times as the image has tokens."""
SIDE = 8
"""Of the square that is one of an image's tokens, in pixels."""

_ADDED = (*SPECIAL, "<|image_start|>", PATCH, "<|image_end|>")
_CONTEXT = 4096
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    f"{{{{ '{PATCH}' if part['type'] == 'image' else part['text'] }}}}"
    "{% endfor %}{% endif %}{% for call in message['tool_calls'] or () %}{{ call['function'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_vision_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a model folder that says lower-case letters without end, which depend on images; return `folder`.

    Equal seeds give equal bytes. It holds Python code, so it loads with `trust_remote_code` only.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    vocab = vocabulary([], _ADDED)
    config = _config(vocab)
    model: Any = muse_spark.Model(muse_spark.ModelArgs.from_dict(config))
    weights: Any = dict(tree_flatten(model.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"), _drawn(weights, seed, [vocab[letter] for letter in string.ascii_lowercase])
    )
    shutil.copy(muse_spark.__file__, folder / str(config["model_file"]))
    files = {
        "config.json": config,
        "generation_config.json": {"do_sample": False, "eos_token_id": EOS_ID},
        "tokenizer.json": scripted_tokenizer(vocab, _ADDED),
        # A null: else what Muse Spark says has headers, which no random weights bring about.
        "tokenizer_config.json": {**tokenizer_config(_ADDED, _TEMPLATE, _CONTEXT), "chat_template_type": None},
        "special_tokens_map.json": special_tokens_map(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def said_by_mlx_lm(folder: Path, messages: list[Any], images: list[bytes], tokens: int) -> str:
    """What the model answers, greedily, by mlx-lm alone. In `messages` images are `{"type": "image"}`."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.generate import generate_step
    from mlx_lm.processors import load_processor
    from mlx_lm.utils import load_model, load_tokenizer
    from PIL import Image

    model, config = load_model(folder, trust_remote_code=True)
    tokenizer = load_tokenizer(folder, eos_token_ids=EOS_ID)
    processor: Any = load_processor(model, config)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text, pixels = processor(text, images=[np.asarray(Image.open(io.BytesIO(image))) for image in images])
    prompt = mx.array(tokenizer.encode(text, add_special_tokens=False))
    embeddings = model.embed_inputs(prompt, pixel_values=pixels)
    steps = generate_step(prompt, model, input_embeddings=embeddings, max_tokens=tokens)
    said: str = tokenizer.decode([int(token) for token, _ in steps])
    return said


def png(color: str, width: int = 2 * SIDE, height: int = 2 * SIDE) -> bytes:
    """The file of a picture of one color."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _drawn(weights: dict[str, Any], seed: int, said: list[int]) -> dict[str, Any]:
    """Weights with every matrix and bias drawn at random; of the head, only the rows of tokens that may be said."""
    import mlx.core as mx
    import numpy as np

    random = np.random.default_rng(seed)
    drawn = dict(weights)
    for name in sorted(weights):
        shape = weights[name].shape
        if len(shape) < 2 and not name.endswith(".bias"):
            continue
        matrix = random.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
        if name == "lm_head.weight":  # the best of many is more than 0, which the others are
            matrix[[row for row in range(shape[0]) if row not in said]] = 0
        drawn[name] = mx.array(matrix)
    return drawn


def _config(vocab: dict[str, int]) -> dict[str, object]:
    text = {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "final_logit_softcapping": 20.0,
        "head_dim": 32,
        "hidden_size": 64,
        "layer_rope_theta": [10000.0, 0],
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": _CONTEXT,
        "moe_hidden_size": 32,
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
        "output_multiplier": 1.0,
        "pad_token_id": PAD_ID,
        "post_norm_eps": 1e-5,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0},
        "sliding_window": 64,
        "vocab_size": len(vocab),
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "merge_size": 2,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": SIDE // 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
    }
    return {
        "architectures": ["MuseSparkForConditionalGeneration"],
        "audio_config": {"out_hidden_size": text["hidden_size"]},  # which transformers compares
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "image_token_id": vocab[PATCH],
        "model_file": "muse_spark.py",
        "model_type": "muse_spark",
        "pad_token_id": PAD_ID,
        "text_config": text,
        "vision_config": vision,
    }
