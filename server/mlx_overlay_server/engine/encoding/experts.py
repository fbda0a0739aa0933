"""Units of a layer that are divided among experts, as in nomic-bert's version 2: each token is for the best of them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_overlay_server.engine.encoding.parts import activation


class Experts(nn.Module):
    """Some experts, and the router that says how much each counts for a token."""

    def __init__(self, hidden: int, inner: int, count: int, best: int, act: str) -> None:
        """Make `count` experts, of which each token is for the `best` ones."""
        super().__init__()
        self.best = best
        self.act = activation(act)
        self.router = nn.Linear(hidden, count, bias=False)
        self.w1 = _Projections(count, inner, hidden)
        self.w2 = _Projections(count, hidden, inner)
        self.bias = mx.zeros(hidden)

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])
        shares = mx.softmax(self.router(tokens), axis=-1, precise=True)
        chosen = mx.argpartition(-shares, self.best - 1, axis=-1)[:, : self.best]
        # Rows for the same expert come one after the other, so that its weights are read once for all of them.
        order = mx.argsort(chosen.flatten())
        experts = chosen.flatten()[order]
        inner = self.act(self.w1(tokens[order // self.best], experts))
        made = self.w2(inner, experts)[mx.argsort(order)].reshape(*chosen.shape, -1)
        counted = (made * mx.take_along_axis(shares, chosen, axis=-1)[..., None]).sum(axis=1)
        return (counted + self.bias).reshape(x.shape)


class _Projections(nn.Module):
    """One matrix for each expert."""

    def __init__(self, count: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = mx.zeros((count, rows, columns))

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """Return each row of `x`, projected by the matrix of its expert; `experts` are in order."""
        matrices = self.weight.swapaxes(-1, -2)
        made: mx.array = mx.gather_mm(x[:, None], matrices, rhs_indices=experts, sorted_indices=True)
        return made.squeeze(1)
