"""From the hidden states of a text's tokens to one vector, as sentence-transformers makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_overlay_server.engine.encoding.facts import Dense, Facts
from mlx_overlay_server.engine.encoding.parts import Batch

Step = Callable[[mx.array], mx.array]


class Pooling:
    """How a model makes one vector of a text."""

    def __init__(self, known: Facts, projections: Sequence[Step] = ()) -> None:
        """Load what the model's modules need. `projections`: those that are among its weights, if no file has them."""
        self._modes = known.modes
        self._steps: list[Step] = [_normalised if step is None else _dense(step) for step in known.steps]
        if all(step is None for step in known.steps):
            self._steps = [*projections, *self._steps]

    def __call__(self, hidden: mx.array, batch: Batch) -> mx.array:
        """Return a row for each text, in single precision."""
        x = mx.concatenate([_POOLED[mode](hidden, batch) for mode in self._modes], axis=-1)
        for step in self._steps:
            x = step(x)
        return x


def _dense(dense: Dense) -> Step:
    weights: Any = mx.load(dense.path)
    matrix = weights["linear.weight"].astype(mx.float32)
    bias = weights["linear.bias"].astype(mx.float32) if "linear.bias" in weights else mx.zeros(matrix.shape[0])
    mx.eval(matrix, bias)
    if dense.activation == "Tanh":
        return lambda x: mx.tanh(x @ matrix.T + bias)
    return lambda x: x @ matrix.T + bias


def _normalised(x: mx.array) -> mx.array:
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _first(hidden: mx.array, batch: Batch) -> mx.array:  # noqa: ARG001 - as all of these
    return hidden[:, 0].astype(mx.float32)


def _last(hidden: mx.array, batch: Batch) -> mx.array:
    return hidden[mx.arange(hidden.shape[0]), batch.lengths - 1].astype(mx.float32)


def _largest(hidden: mx.array, batch: Batch) -> mx.array:
    return mx.where(batch.real[..., None], hidden.astype(mx.float32), -mx.inf).max(axis=1)


def _weighted(weights: mx.array, hidden: mx.array) -> mx.array:
    """Return the sum of each row's hidden states, each times its weight."""
    return (weights[:, None, :] @ hidden.astype(mx.float32)).squeeze(1)


def _mean(hidden: mx.array, batch: Batch) -> mx.array:
    return _weighted(batch.real.astype(mx.float32), hidden) / batch.lengths[:, None]


def _mean_by_root(hidden: mx.array, batch: Batch) -> mx.array:
    return _weighted(batch.real.astype(mx.float32), hidden) / mx.sqrt(batch.lengths[:, None])


def _later_is_more(hidden: mx.array, batch: Batch) -> mx.array:
    weights = batch.real * mx.arange(1, batch.longest + 1, dtype=mx.float32)
    return _weighted(weights, hidden) / weights.sum(axis=1, keepdims=True)


_POOLED: dict[str, Callable[[mx.array, Batch], mx.array]] = {
    "cls": _first,
    "lasttoken": _last,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_by_root,
    "weightedmean": _later_is_more,
}
