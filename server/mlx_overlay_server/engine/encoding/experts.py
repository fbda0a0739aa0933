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
        self.shape = (count, inner, hidden)
        self.act = activation(act)
        self.router = nn.Linear(hidden, count, bias=False)
        self.w1, self.w2 = mx.zeros((count * inner, hidden)), mx.zeros((count * inner, hidden))
        self.bias = mx.zeros(hidden)

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])
        shares = mx.softmax(self.router(tokens), axis=-1, precise=True)
        chosen = mx.argpartition(-shares, self.best - 1, axis=-1)[:, : self.best]
        counted = mx.take_along_axis(shares, chosen, axis=-1)
        # A processor multiplies large matrices much faster than many small ones, even though most of it is for nothing.
        made = self.by_all if mx.default_device() == mx.Device(mx.cpu) else self.by_best
        return (made(tokens, chosen, counted) + self.bias).reshape(x.shape)

    def by_all(self, tokens: mx.array, chosen: mx.array, shares: mx.array) -> mx.array:
        """Return what the chosen experts make of each token, times their shares; all experts compute it."""
        counts = mx.put_along_axis(mx.zeros((len(tokens), self.shape[0]), shares.dtype), chosen, shares, axis=-1)
        inner = self.act(tokens @ self.w1.T).reshape(-1, *self.shape[:2]) * counts[..., None]
        return inner.reshape(len(tokens), -1) @ self.w2

    def by_best(self, tokens: mx.array, chosen: mx.array, shares: mx.array) -> mx.array:
        """Return the same; only the chosen experts compute it."""
        # Rows for the same expert come one after the other, so that its weights are read once for all of them.
        order = mx.argsort(chosen.flatten())
        experts = chosen.flatten()[order]
        first, last = self.w1.reshape(self.shape).swapaxes(-1, -2), self.w2.reshape(self.shape)
        inner = self.act(mx.gather_mm(tokens[order // self.best, None], first, None, experts, sorted_indices=True))
        made = mx.gather_mm(inner, last, None, experts, sorted_indices=True).squeeze(1)
        return (made[mx.argsort(order)].reshape(*chosen.shape, -1) * shares[..., None]).sum(axis=1)
