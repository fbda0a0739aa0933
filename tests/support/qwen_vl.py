"""A tiny model that mlx-vlm shows images to: Qwen 2.5 VL with weights drawn at random."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.tokens import (
    BOS_ID,
    EOS_ID,
    SPECIAL,
    scripted_tokenizer,
    special_tokens_map,
    tokenizer_config,
    vocabulary,
)

MARK = "<|image_pad|>"
"""What the template writes for an image. The processor has it as many times as the image has tokens."""
SIDE = 8
"""Of the square that is one of an image's tokens, in pixels."""

_ADDED = (*SPECIAL, "<|vision_start|>", MARK, "<|vision_end|>", "<|video_pad|>")
_CONTEXT = 4096
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    f"{{{{ '<|vision_start|>{MARK}<|vision_end|>' if part['type'] == 'image' else part['text'] }}}}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_qwen_vl(folder: Path, *, seed: int = 0) -> Path:
    """Write a model folder that says what depends on images and means nothing; return `folder`."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    vocab = vocabulary([], _ADDED)
    config = _config(vocab)
    kinds, _ = get_model_and_args(config)
    nested = {**config, "text_config": {key: value for key, value in config.items() if key != "vision_config"}}
    parsed = kinds.ModelConfig.from_dict(copy.deepcopy(nested))
    parsed = update_module_configs(parsed, kinds, copy.deepcopy(nested), ["text", "vision"])
    random = np.random.default_rng(seed)
    weights: Any = dict(tree_flatten(kinds.Model(parsed).parameters()))
    for name in sorted(weights):
        shape = weights[name].shape
        if len(shape) > 1:
            weights[name] = mx.array(random.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    files = {
        "config.json": config,
        "generation_config.json": {"do_sample": False, "eos_token_id": EOS_ID},
        "preprocessor_config.json": _PREPROCESSOR,
        "tokenizer.json": scripted_tokenizer(vocab, _ADDED),
        "tokenizer_config.json": tokenizer_config(_ADDED, _TEMPLATE, _CONTEXT),
        "special_tokens_map.json": special_tokens_map(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def said_by_mlx_vlm(folder: Path, messages: list[Any], images: Sequence[bytes], tokens: int) -> list[int]:
    """The tokens of a greedy answer by mlx-vlm alone. In `messages` images are `{"type": "image"}`."""
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.utils import load, prepare_inputs
    from PIL import Image

    model, processor = load(str(folder))
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
    inputs = prepare_inputs(processor, images=opened or None, prompts=[text])
    ids, pixels, mask = inputs.pop("input_ids"), inputs.pop("pixel_values", None), inputs.pop("attention_mask")
    steps = generate_step(ids, model, pixels, mask, temperature=0, max_tokens=tokens, **inputs)
    return [int(token) for token, _ in steps]


_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": SIDE // 2,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": SIDE * SIDE,
    "max_pixels": 1 << 20,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _config(vocab: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "hidden_size": 64,
        "image_token_id": vocab[MARK],
        "intermediate_size": 64,
        "max_position_embeddings": _CONTEXT,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "video_token_id": vocab["<|video_pad|>"],
        "vision_config": {
            "depth": 2,
            "fullatt_block_indexes": [1],
            "hidden_size": 32,
            "in_channels": 3,
            "intermediate_size": 32,
            "model_type": "qwen2_5_vl",
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": SIDE // 2,
            "spatial_merge_size": 2,
            "spatial_patch_size": SIDE // 2,
            "temporal_patch_size": 2,
            "window_size": 2 * SIDE,
        },
        "vision_end_token_id": vocab["<|vision_end|>"],
        "vision_start_token_id": vocab["<|vision_start|>"],
        "vocab_size": len(vocab),
    }
