"""One sequence while it generates: what was asked for, and what becomes of each token drawn for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import Item, Sampled, Submit
from mlx_overlay_server.engine.sampling import Guarded, Matcher, Sampling, processors
from mlx_overlay_server.errors import Failed


class Generation:
    """A sequence that a model generates, in a batch or alone."""

    def __init__(
        self, submit: Submit, sampling: Sampling, matcher: Matcher | None, *, cached: int, unseen: int | None = None
    ) -> None:
        """`cached`: how many tokens of the prompt were reused from an earlier KV cache.

        `unseen`: how many tokens of the prompt mlx-lm leaves out when it calls logits processors; None: those cached.
        """
        self.submit = submit
        self.cached = cached
        steps = processors(
            submit.params,
            sampling,
            submit.prompt,
            cached=cached if unseen is None else unseen,
            matcher=matcher,
            budget=submit.budget,
        )
        self._guarded = Guarded(steps, matcher)
        self.processors = [self._guarded] if steps else []
        """Logits processors for mlx-lm: at most one, which stands for all of the request's."""

    def item(self, token: int, logprobs: mx.array, finish: str | None) -> Item:
        """Return what the event loop gets for a token; Failed when the request's own processors failed.

        `logprobs` are those of the whole vocabulary; `finish` is why the token is the last, as in Sampled.
        """
        problem = self._guarded.problem
        if problem is not None and finish != "stop":
            return Failed(problem)
        wanted = self.submit.params.logprobs
        if wanted is None or finish == "stop":
            return Sampled(token, None, (), finish)
        top: tuple[tuple[int, float], ...] = ()
        if wanted:
            count = min(wanted, logprobs.shape[-1])
            best = mx.argpartition(-logprobs, kth=count - 1)[:count]
            ids: Any = best.tolist()
            values: Any = logprobs[best].tolist()
            top = tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))
        value: Any = logprobs[token].item()
        return Sampled(token, float(value), top, finish)


def matcher_of(submit: Submit, loaded: Loaded) -> Matcher | None:
    """Return what holds an answer to its grammar: the submitted matcher, or one made here on ranks without it."""
    if submit.matcher is None and submit.constraint is not None:
        compiled = grammar.compiled(submit.constraint, loaded)
        return Matcher(submit.constraint, compiled, loaded.grammar_tokenizer.vocab_size)
    matcher: Matcher | None = submit.matcher
    return matcher
