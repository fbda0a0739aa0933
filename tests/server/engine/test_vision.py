"""Models that see: by what their KV caches are known, and that they say what mlx-vlm says, where that is installed."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_overlay_server.chat.loaded import Shown
from mlx_overlay_server.engine import vision
from mlx_overlay_server.engine.seen import Seen
from mlx_overlay_server.engine.vision import SeeingModel, _identity
from PIL import Image

MARK = 290
RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
PROMPT = [1, 2, MARK, MARK, 3, MARK, MARK, MARK, 4]

_has_mlx_vlm = pytest.mark.skipif(find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
_silently = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what mlx-vlm imports


# What a prompt with images is known by ----------------------------------------------------------------------------


def test_each_image_has_a_number_of_its_own_that_no_token_is() -> None:
    known = _identity(PROMPT, MARK, [RED, BLUE])
    assert [token for token in known if token >= 0] == [1, 2, 3, 4]
    assert known[2] == known[3]
    assert known[5] == known[6] == known[7]
    assert known[2] != known[5]
    assert _identity(PROMPT, MARK, [BLUE, RED])[2] == known[5]


def test_an_image_keeps_its_number_when_another_follows() -> None:
    assert _identity(PROMPT[:5], MARK, [RED]) == _identity(PROMPT, MARK, [RED, BLUE])[:5]


def test_images_in_several_parts_are_known_together() -> None:
    assert len({*_identity(PROMPT, MARK, [RED])}) == 5
    assert _identity(PROMPT, MARK, [RED])[2] != _identity(PROMPT, MARK, [BLUE])[2]


def test_images_of_the_same_bytes_and_another_shape_are_others() -> None:
    wide = Image.new("RGB", (16, 4), "red")
    assert _identity(PROMPT[:4], MARK, [RED]) != _identity(PROMPT[:4], MARK, [wide])


def test_a_prompt_without_a_place_for_its_images_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        _identity([1, 2, 3], MARK, [RED])


# Which models it is for -------------------------------------------------------------------------------------------

_SEES: dict[str, Any] = {"model_type": "qwen2_5_vl", "vision_config": {}, "image_token_id": MARK}


@_has_mlx_vlm
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (_SEES, True),
        ({**_SEES, "model_type": "gemma3", "image_token_id": None, "image_token_index": 5}, True),
        ({**_SEES, "vision_config": None}, False),
        ({**_SEES, "image_token_id": None}, False),
        ({**_SEES, "model_type": "no_such_model"}, False),
        ({**_SEES, "model_type": "../utils"}, False),
        ({**_SEES, "model_file": "own.py"}, False),
        ([], False),
    ],
)
def test_a_model_with_a_part_for_images_is_for_mlx_vlm(config: Any, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vision.is_for(str(tmp_path)) is expected


def test_a_folder_that_cannot_be_read_is_left_to_mlx_lm(tmp_path: Path) -> None:
    assert not vision.is_for(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert not vision.is_for(str(tmp_path))


# What they keep of images -----------------------------------------------------------------------------------------


class _Tower(nn.Module):  # type: ignore[misc]
    """Counts how often it looks at something."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.zeros(1)
        self.looks = 0

    def __call__(self, pixels: mx.array) -> tuple[mx.array, None]:
        self.looks += 1
        return pixels + self.weight, None


class _Seeing(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = _Tower()


def _look(seen: Seen, model: _Seeing, number: int) -> None:
    pixels = np.full(10, number, dtype=np.float32)
    seen.look_at({"pixel_values": pixels})
    assert model.vision_tower(mx.array(pixels))[0].tolist() == pixels.tolist()


def test_an_image_that_was_seen_is_not_looked_at_again_until_others_take_its_place() -> None:
    model, seen = _Seeing(), Seen(max_bytes=80)
    seen.attach(model)
    assert [name for name, _ in tree_flatten(model.parameters())] == ["vision_tower.weight"]
    for number, looks in ((1, 1), (1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        _look(seen, model, number)
        assert model.vision_tower.looks == looks
    seen.forget()
    _look(seen, model, 2)
    assert model.vision_tower.looks == 5


def test_what_takes_more_than_may_be_kept_is_not_kept() -> None:
    model, seen = _Seeing(), Seen(max_bytes=39)
    seen.attach(model)
    for looks in (1, 2):
        _look(seen, model, 1)
        assert model.vision_tower.looks == looks
    assert not len(seen)


# What they say ----------------------------------------------------------------------------------------------------

_TEXT = {
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
}
_QWEN3 = {
    "model_type": "qwen3_vl",
    "image_token_id": MARK,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
    "text_config": {
        **_TEXT,
        "model_type": "qwen3_vl_text",
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": [0, 1],
        "depth": 3,
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 32,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 64,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
_GEMMA3 = {
    "model_type": "gemma3",
    "hidden_size": 64,
    "image_token_index": MARK,
    "mm_tokens_per_image": 16,
    "pad_token_id": 0,
    "vocab_size": 300,
    "text_config": {
        **_TEXT,
        "mm_tokens_per_image": 16,
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "image_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 4,
    },
}


@_has_mlx_vlm
@_silently
@pytest.mark.parametrize(
    ("config", "marks", "shape"), [(_QWEN3, 12, (48, 96)), (_GEMMA3, 16, (1, 3, 32, 32))], ids=["qwen3_vl", "gemma3"]
)
@pytest.mark.parametrize("piece", [7, 64])
def test_prompts_read_in_pieces_are_answered_as_by_mlx_vlm(
    config: dict[str, Any], marks: int, shape: tuple[int, ...], piece: int
) -> None:
    from mlx_vlm.generate.ar import generate_step as by_mlx_vlm

    random = np.random.default_rng(1)
    arrays: dict[str, Any] = {"pixel_values": random.standard_normal(shape, dtype=np.float32)}
    if config is _QWEN3:
        arrays["image_grid_thw"] = np.array([[1, 6, 8]])
    prompt = [1, 2, 3, 292, *[MARK] * marks, 293, *range(20, 50)]
    inner = _made(config)
    given = {name: mx.array(value) for name, value in arrays.items()}
    mask = mx.ones((1, len(prompt)), dtype=mx.int32)
    steps = by_mlx_vlm(mx.array([prompt]), inner, given.pop("pixel_values"), mask, temperature=0, max_tokens=6, **given)
    expected = [int(token) for token, _ in steps]

    model = SeeingModel(inner)
    cache = model.make_cache()
    shown = Shown({**arrays, "attention_mask": np.array(mask)}, tuple(prompt))
    first = model.sequence(prompt, shown, cache)
    sequence = model.sequence(prompt, shown, cache)
    assert len(model.seen) == 1
    assert mx.array_equal(first.embeddings, sequence.embeddings)
    assert sequence.in_pieces
    for start in range(0, len(prompt) - 1, piece):
        end = min(start + piece, len(prompt) - 1)
        sequence(mx.array([prompt[start:end]]), cache=cache, input_embeddings=sequence.embeddings[start:end][None])
        mx.eval([layer.state for layer in cache])
    drawn = generate_step(
        mx.array(prompt[-1:]), sequence, input_embeddings=sequence.embeddings[-1:], prompt_cache=cache, max_tokens=6
    )
    assert [int(token) for token, _ in drawn] == expected
    assert len(set(expected)) > 1


def _made(config: dict[str, Any]) -> Any:
    """A model with weights drawn at random."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    kinds, _ = get_model_and_args(config)
    parsed = kinds.ModelConfig.from_dict(copy.deepcopy(config))
    parsed = update_module_configs(parsed, kinds, copy.deepcopy(config), ["text", "vision"])
    model = kinds.Model(parsed)
    random = np.random.default_rng(0)
    weights = [
        (name, mx.array(random.standard_normal(value.shape, dtype=np.float32) * value.shape[-1] ** -0.5))
        for name, value in tree_flatten(model.parameters())
        if value.ndim > 1
    ]
    model.load_weights(weights, strict=False)
    mx.eval(model.parameters())
    return model
