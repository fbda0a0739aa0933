"""mlx-lm's models as models that embed or rank: what they know of a text is in the hidden states of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.encoding.parts import Batch
from mlx_overlay_server.engine.mlx import Cache


class Causal:
    """A model of mlx-lm, with the methods of the encoders."""

    def __init__(self, model: Any, answers: Sequence[int] = ()) -> None:
        """`answers`: for a model that ranks by what it would say, the tokens for yes and for no. Raises ValueError."""
        mlx.inner_model(model)
        self.model = model
        self._answers = mx.array(list(answers), dtype=mx.int32)

    def make_cache(self) -> Cache:
        """Return an empty KV cache, for a text that is read in parts."""
        return mlx.new_cache(self.model)

    def hidden(self, batch: Batch, cache: Cache | None = None) -> mx.array:
        """Return the last hidden state of each token. Nothing sees what pads a row: it comes after all else."""
        out: mx.array = self.model(batch.tokens, cache)
        return out

    def scores(self, hidden: mx.array, batch: Batch) -> mx.array:
        """Return the logit of each text: that of the head for it, or of yes against no."""
        last = hidden[mx.arange(hidden.shape[0]), batch.lengths - 1]
        if not self._answers.size:
            out: mx.array = self.model.score(last)
            return out
        chosen: mx.array = mlx.logits_of(self.model)(last)[:, self._answers]
        logit: mx.array = chosen[:, :1] - chosen[:, 1:].sum(axis=-1, keepdims=True)
        return logit
