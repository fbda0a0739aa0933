"""What looking at images takes in memory, estimated from a model's config.json. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mlx_overlay_server.memory import Cost, Images

_NUMBER = 4
"""Bytes of a number while something is computed, and in embeddings."""
_CHANNELS = 3


class Look(NamedTuple):
    """What a model computes with while it looks at images."""

    token: int = 0
    """Bytes that stay of each token of a prompt with images: what it is for the model."""
    patch: int = 0
    """Pixel values that make one patch."""
    cost: Cost = Cost()
    """Of a pass over the patches of one image."""
    whole: Cost = Cost()
    """Of the pass over the prompt, for models that may have to read it at once; nothing for others."""

    def takes(self, size: int, images: Iterable[Any]) -> Images:
        """Return what the images of a prompt of `size` tokens take; `images` are NumPy arrays of pixel values."""
        looking = 0
        for image in images:
            looking += 2 * image.size * _NUMBER  # as it comes, and as numbers of the model's type
            if self.patch:
                count = math.prod(image.shape[:-3]) if image.ndim > 3 else 1
                patches = image.size // count // self.patch
                looking += count * self.cost.nbytes(patches)
        return Images(kept=self.token * size, looking=max(looking, self.whole.nbytes(size)))


NO_LOOK = Look()
"""Of a model that sees nothing."""


def look(config: Mapping[str, Any], cost: Cost, *, whole: Cost) -> Look:
    """Return what a model takes to look at images. `cost` and `whole` are those of `Look`, as `mlx.cost` has them."""
    text, vision = (_part(config, name) for name in ("text_config", "vision_config"))
    hidden = _number({**config, **text}, "hidden_size")
    side, frames = _number(vision, "patch_size", "spatial_patch_size"), _number(vision, "temporal_patch_size")
    return Look(hidden * _NUMBER, _CHANNELS * side * side * max(1, frames), cost, whole)


def vision_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape of a model's part for images, by the names that config.json has for texts."""
    vision = _part(config, "vision_config")
    return {
        "hidden_size": _number(vision, "embed_dim", "hidden_size", "width") or None,
        "num_attention_heads": _number(vision, "num_attention_heads", "num_heads", "heads") or None,
        "intermediate_size": _number(vision, "intermediate_size") or None,
    }


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _number(shape: Mapping[str, Any], *names: str) -> int:
    """Return the first of some numbers that is there; 0: none is."""
    return next((shape[name] for name in names if isinstance(shape.get(name), int)), 0)
