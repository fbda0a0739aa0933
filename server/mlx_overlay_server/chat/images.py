"""Images of a conversation, decoded and placed in its prompt. No MLX, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_overlay_server.chat.loaded import ImageProcessor, Loaded, Shown
from mlx_overlay_server.chat.requests import Image
from mlx_overlay_server.errors import InvalidRequest

_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
"""The formats that the dialects know. Pillow reads more, some by starting other programs."""

MAX_PIXELS = 100_000_000
"""Pixels of all images of a request together, checked before any of them is decoded.

A file of a few kilobytes can hold so many that decoding takes gigabytes of memory. This many take 300 MB. They are
twelve screenshots at 4K, or one image of 10,000 x 10,000, of which models look at a few million pixels anyway.
"""


def placed(model: Loaded, text: str, images: Sequence[Image]) -> tuple[str, tuple[Any, ...]]:
    """Return a prompt's text with room for its images, and their pixel values as NumPy arrays, for mlx-lm.

    Raises InvalidRequest, and ValueError where the text and the images do not go together.
    """
    import numpy as np

    decoded = [np.asarray(_rgb(*each)) for each in _all_opened(images)]
    text, pixels = model.processor(text, images=decoded)
    return text, tuple(np.asarray(each) for each in pixels)


def shown(vision: ImageProcessor, text: str, images: Sequence[Image]) -> tuple[list[int], Shown]:
    """Return a prompt's tokens and what the model sees of its images, for mlx-vlm. Raises as `placed` does."""
    return vision.shown(text, [_rgb(*each) for each in _all_opened(images)])


def _all_opened(images: Sequence[Image]) -> list[tuple[Any, Image]]:
    """Return images as Pillow's, which are not decoded yet. Raises InvalidRequest for too many pixels together."""
    opened = []
    total = 0
    for image in images:
        opened.append(_opened(image))
        width, height = opened[-1].size
        total += width * height
        if total > MAX_PIXELS:
            raise _too_many(image)
    return list(zip(opened, images, strict=True))


def _too_many(image: Image) -> InvalidRequest:
    return InvalidRequest(
        f"the images have more than {MAX_PIXELS} pixels together; send smaller ones", param=image.where
    )


def _opened(image: Image) -> Any:
    """Return a Pillow image that is not decoded yet. Raises InvalidRequest."""
    import io
    import warnings

    from PIL import Image as Pillow  # only models that see need it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pillow.DecompressionBombWarning)  # our own limit is lower
            return Pillow.open(io.BytesIO(image.data), formats=_FORMATS)
    except Pillow.DecompressionBombError:
        raise _too_many(image) from None
    except Exception:  # noqa: BLE001 - decoders meet whatever is sent
        raise InvalidRequest("cannot decode the image", param=image.where) from None


def _rgb(opened: Any, image: Image) -> Any:
    """Return a Pillow image with three bytes for each pixel. Raises InvalidRequest."""
    try:
        return opened.convert("RGB")
    except Exception:  # noqa: BLE001 - decoders meet whatever is sent
        raise InvalidRequest("cannot decode the image", param=image.where) from None
