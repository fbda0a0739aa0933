"""One sequence while it generates: what was asked for, and what becomes of each token drawn for it."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import Item, Sampled, Submit
from mlx_overlay_server.engine.likely import Likely
from mlx_overlay_server.engine.sampling import Guarded, Matcher, Sampling, processors
from mlx_overlay_server.errors import Failed


class Generation:
    """A sequence that a model generates, in a batch or alone."""

    def __init__(
        self,
        submit: Submit,
        sampling: Sampling,
        matcher: Matcher | None,
        *,
        cached: int,
        unseen: int | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        """`cached`: how many tokens of the prompt were reused from an earlier KV cache; `ends`: those that end answers.

        `unseen`: how many tokens of the prompt mlx-lm leaves out when it calls logits processors; None: those cached.
        """
        self.submit = submit
        self.cached = cached
        left_out = cached if unseen is None else unseen
        changes = processors(submit.params, sampling, submit.prompt, cached=left_out, ends=ends)
        self.guarded = Guarded(changes, submit.budget, matcher)
        self.processors = [self.guarded] if self.guarded else []
        """Logits processors for mlx-lm: at most one, which stands for all of the request's."""

    def wanted(self, finish: str | None) -> int | None:
        """Return how many of the likeliest tokens a token's item shall name; None: not even its own probability.

        `finish` is why the token is the last, as in Sampled.
        """
        return None if finish == "stop" else self.submit.params.logprobs

    def item(self, token: int, likely: Likely | None, finish: str | None) -> Item:
        """Return what the event loop gets for a token; Failed when the request's own processors failed."""
        problem = self.guarded.problem
        if problem is not None and finish != "stop":
            return Failed(problem)
        logprob, top = likely or (None, ())
        return Sampled(token, logprob, top, finish)


def matcher_of(submit: Submit, loaded: Loaded) -> Matcher | None:
    """Return what holds an answer to its grammar: the submitted matcher, or one made here on ranks without it."""
    if submit.matcher is None and submit.constraint is not None:
        compiled = grammar.compiled(submit.constraint, loaded)
        return Matcher(submit.constraint, compiled, loaded.grammar_tokenizer.vocab_size)
    matcher: Matcher | None = submit.matcher
    return matcher
