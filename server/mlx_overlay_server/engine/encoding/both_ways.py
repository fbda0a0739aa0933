"""mlx-lm's models with attention in both directions: EmbeddingGemma, and those such as gte-Qwen2."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from hf_overlay.catalog import tasks

from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.encoding.parts import Batch

_PROJECTION = "dense."


def classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the classes (model, arguments) for a config.json."""
    base, arguments = mlx.headless_classes(config)
    return _gemma(base) if tasks.is_gemma(config) else _plain(base), arguments


def _plain(base: Any) -> Any:
    class Plain(base):
        def hidden(self, batch: Batch) -> mx.array:
            """Return the last hidden state of each token."""
            inner = mlx.inner_model(self)
            x = inner.embed_tokens(batch.tokens)
            for layer in inner.layers:
                x = layer(x, batch.mask)
            out: mx.array = inner.norm(x)
            return out

    return Plain


def _gemma(base: Any) -> Any:
    class Gemma(base):
        def hidden(self, batch: Batch) -> mx.array:
            """Return the last hidden state of each token."""
            inner = mlx.inner_model(self)
            x = inner.embed_tokens(batch.tokens)
            x = x * mx.array(inner.args.hidden_size**0.5, x.dtype)
            everywhere, nearby = batch.mask, batch.mask_near(inner.window_size // 2)
            for number, layer in enumerate(inner.layers, 1):
                x = layer(x, nearby if number % inner.sliding_window_pattern else everywhere)
            out: mx.array = inner.norm(x)
            return out

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Make modules of the projections that mlx-embeddings keeps among the weights: `dense.0`, `dense.1`."""
            own = {name: weights.pop(name) for name in list(weights) if name.startswith(_PROJECTION)}
            weights = super().sanitize(weights)
            inner_size = mlx.inner_model(self).args.hidden_size
            self.dense: list[nn.Linear] = []
            while (matrix := own.get(f"{_PROJECTION}{len(self.dense)}.weight")) is not None:
                self.dense.append(nn.Linear(inner_size, matrix.shape[0], bias=False))
                inner_size = matrix.shape[0]
            return {**weights, **own}

    return Gemma
