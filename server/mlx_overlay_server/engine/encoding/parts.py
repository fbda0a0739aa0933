"""What the encoders share: a batch of texts, and activations by their names in config.json."""

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


def batch_of(texts: Sequence[Passage]) -> Batch:
    """Return a batch of at least one text."""
    lengths = [len(text.tokens) for text in texts]
    tokens = np.zeros((len(texts), max(lengths)), dtype=np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text.tokens)] = text.tokens
    first = mx.array([text.first for text in texts])
    return Batch(mx.array(tokens), mx.array(lengths), first, min(lengths) < max(lengths))


def activation(name: str) -> Callable[[mx.array], mx.array]:
    """Return an activation function; the names are those in `hf_overlay.catalog.tasks`, and `tanh`."""
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": mx.tanh,
}
