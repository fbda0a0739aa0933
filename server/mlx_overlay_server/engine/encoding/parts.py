"""What the encoders share: a batch of texts, heads, and activations by their names in config.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_overlay_server.encoding.loaded import Passage


class Batch(NamedTuple):
    """Some texts that are read together, padded on their right to the longest."""

    tokens: mx.array
    """A row for each text."""
    lengths: mx.array
    """How many tokens of each row are the text's own."""
    first: mx.array
    """How many of these belong to the first text of a pair."""
    is_padded: bool

    @property
    def longest(self) -> int:
        """Tokens of each row."""
        return self.tokens.shape[1]

    @property
    def real(self) -> mx.array:
        """For each row and position, whether a token of the text is there."""
        return mx.arange(self.longest) < self.lengths[:, None]

    @property
    def mask(self) -> mx.array | None:
        """What tokens attend to: those of their text; None: all that there are."""
        return self.real[:, None, None, :] if self.is_padded else None

    def mask_near(self, window: int) -> mx.array | None:
        """Return the same for tokens that attend to those which are at most `window` away, on either side."""
        if self.longest <= window:
            return self.mask
        at = mx.arange(self.longest)
        near = mx.abs(at[:, None] - at[None, :]) <= window
        return near if self.mask is None else near & self.mask


def batch_of(texts: Sequence[Passage]) -> Batch:
    """Return a batch of at least one text."""
    lengths = [len(text.tokens) for text in texts]
    tokens = np.zeros((len(texts), max(lengths)), dtype=np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text.tokens)] = text.tokens
    first = mx.array([text.first for text in texts])
    return Batch(mx.array(tokens), mx.array(lengths), first, min(lengths) < max(lengths))


def rotary_attention(
    made: mx.array, heads: int, rope: Callable[[mx.array], mx.array], mask: mx.array | None
) -> mx.array:
    """Return what tokens attend to; `made` holds the queries, keys and values of all heads for each token."""
    rows, length, size = made.shape
    queries, keys, values = made.reshape(rows, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scale = queries.shape[-1] ** -0.5
    out = mx.fast.scaled_dot_product_attention(rope(queries), rope(keys), values, scale=scale, mask=mask)
    return out.transpose(0, 2, 1, 3).reshape(rows, length, size // 3)


class Head(nn.Module):
    """What makes a score of the first token's hidden state: the head of BERT's models that rank."""

    def __init__(self, size: int, act: str) -> None:
        super().__init__()
        self.dense = nn.Linear(size, size)
        self.out = nn.Linear(size, 1)
        self.act = activation(act)

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.out(self.act(self.dense(x)))
        return out


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """Return an activation function; the names are those in `hf_overlay.catalog.tasks`, and `tanh`."""
    if name == "gelu" and mx.default_device() == mx.Device(mx.cpu):
        return _gelu_on_processor
    return _ACTIVATIONS[name]


def _gelu_on_processor(x: mx.array) -> mx.array:
    """Return GELU of single precision, from Abramowitz and Stegun's formula 7.1.28 for the error function.

    It takes a third of the time of MLX's own on a processor, which is half of that of the whole of a small encoder.
    """
    size = mx.abs(x)
    tail = size * _TAIL[-1]
    for each in reversed(_TAIL[:-1]):
        tail = (tail + each) * size
    tail = tail + 1
    for _ in range(4):
        tail = mx.square(tail)
    return mx.maximum(x, 0) - 0.5 * size / tail


_TAIL = tuple(
    each / 2 ** (power / 2)
    for power, each in enumerate(
        (0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638), 1
    )
)
"""The formula's coefficients, for x instead of x / √2."""

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": mx.tanh,
}
