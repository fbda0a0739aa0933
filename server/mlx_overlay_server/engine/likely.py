"""Log probabilities of drawn tokens and of the likeliest alternatives, for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_overlay_server.engine.commands import Scored


class Row(NamedTuple):
    """A drawn token, and how many alternatives its request asks for."""

    token: int
    logprobs: mx.array
    """The log probabilities of the whole vocabulary, already computed."""
    wanted: int | None
    """How many of the likeliest tokens to return; None: not even the drawn token's own log probability."""


class Likely(NamedTuple):
    """The log probability of a drawn token, and those of the likeliest tokens in its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token, log probability), likeliest first."""


def likeliest(rows: Sequence[Row]) -> list[Likely | None]:
    """Return the log probabilities that each row asks for; None for rows that ask for none.

    One evaluation serves all rows. It runs on the CPU's stream, because on the GPU's it would wait for the step that is
    queued there already.
    """
    asking = [row for row in rows if row.wanted is not None]
    if not asking:
        return [None] * len(rows)
    most = min(max(row.wanted or 0 for row in asking), asking[0].logprobs.shape[-1])
    with mx.stream(mx.cpu):
        table = mx.stack([row.logprobs for row in asking]).astype(mx.float32)
        ids = mx.array([[row.token] for row in asking])
        if most:
            best = mx.argpartition(-table, kth=most - 1, axis=-1)[:, :most]
            ids = mx.concatenate([ids, best.astype(ids.dtype)], axis=-1)
        values = mx.take_along_axis(table, ids, axis=-1)
        mx.eval(ids, values)
    plain: list[Any] = [ids.tolist(), values.tolist()]
    made = iter([_likely(row.wanted or 0, *each) for row, *each in zip(asking, *plain, strict=True)])
    return [None if row.wanted is None else next(made) for row in rows]


_SCORED_AT_ONCE = 32
"""Rows of logits that are scored at once, which bounds memory: one row of 256,000 tokens takes a megabyte."""


def scored(logits: mx.array, tokens: Sequence[int], wanted: int) -> list[Scored]:
    """Return each token's log probability and rank by its row of logits, and the `wanted` likeliest tokens."""
    made: list[Scored] = []
    for start in range(0, len(tokens), _SCORED_AT_ONCE):
        ids = mx.array([[token] for token in tokens[start : start + _SCORED_AT_ONCE]])
        rows = logits[start : start + _SCORED_AT_ONCE].astype(mx.float32)
        table = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        own = mx.take_along_axis(table, ids, axis=-1)
        ranks = mx.sum(table > own, axis=-1) + 1
        most = min(wanted, table.shape[-1])
        if most:
            best = mx.argpartition(-table, kth=most - 1, axis=-1)[:, :most]
            ids = mx.concatenate([ids, best.astype(ids.dtype)], axis=-1)
        values = mx.take_along_axis(table, ids, axis=-1)
        mx.eval(ids, values, ranks)
        plain: list[Any] = [ids.tolist(), values.tolist(), ranks.tolist()]
        for row_ids, row_values, rank in zip(*plain, strict=True):
            made.append(Scored(row_values[0], rank, _likely(wanted, row_ids, row_values).top))
    return made


def _likely(count: int, ids: list[int], values: list[float]) -> Likely:
    best = sorted(zip(ids[1:], values[1:], strict=True), key=lambda pair: (-pair[1], pair[0]))
    return Likely(values[0], tuple(best[:count]))
