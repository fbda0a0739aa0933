"""What looking at images takes in memory, by the shapes that models' configurations have."""

from __future__ import annotations

import numpy as np
import pytest
from mlx_overlay_server.engine import looking
from mlx_overlay_server.engine.looking import NO_LOOK
from mlx_overlay_server.memory import Cost, Images

_QWEN = {
    "hidden_size": 2048,
    "vision_config": {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14}
    | {"temporal_patch_size": 2},
}
_GEMMA = {
    "text_config": {"hidden_size": 2560},
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304, "patch_size": 14},
}
_COST = Cost(token=1000, pair=2)


@pytest.mark.parametrize(
    ("config", "pixels", "looking_bytes"),
    [
        (_QWEN, np.empty((400, 3 * 2 * 14 * 14)), 400 * 1000 + 2 * 400**2),
        (_GEMMA, np.empty((2, 3, 28, 42)), 2 * (6 * 1000 + 2 * 6**2)),
        (_GEMMA, np.empty((3, 28, 42)), 6 * 1000 + 2 * 6**2),
    ],
    ids=["patches of all images", "images", "an image"],
)
def test_images_count_by_their_patches(
    config: dict[str, object], pixels: np.ndarray[tuple[int, ...], np.dtype[np.float64]], looking_bytes: int
) -> None:
    look = looking.look(config, _COST, whole=Cost())
    hidden = 2048 if config is _QWEN else 2560
    assert look.takes(100, [pixels]) == Images(kept=100 * hidden * 4, looking=looking_bytes + 8 * pixels.size)


def test_a_prompt_that_is_read_at_once_counts_as_a_whole() -> None:
    look = looking.look(_GEMMA, Cost(), whole=Cost(token=10, pair=1))
    assert look.takes(1000, []).looking == 10 * 1000 + 1000**2


@pytest.mark.parametrize(("config", "hidden", "heads"), [(_QWEN, 1280, 16), (_GEMMA, 1152, 16), ({}, None, None)])
def test_the_part_for_images_has_names_of_its_own(config: dict[str, object], hidden: int | None, heads: int) -> None:
    shape = looking.vision_shape(config)
    assert (shape["hidden_size"], shape["num_attention_heads"]) == (hidden, heads)


def test_what_is_not_known_counts_as_nothing_but_its_pixels() -> None:
    assert looking.look({}, Cost(), whole=Cost()) == NO_LOOK
    assert NO_LOOK.takes(100, [np.empty((1, 3, 8, 8))]) == Images(0, 8 * 192)
