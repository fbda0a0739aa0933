"""One sequence while it is generated: its request, and what is made of each drawn token."""

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
        """`cached`: tokens of the prompt whose KV cache was reused; `ends`: the tokens that end an answer.

        `unseen`: tokens of the prompt that mlx-lm leaves out when it calls logits processors; None: the cached ones.
        """
        self.submit = submit
        self.cached = cached
        left_out = cached if unseen is None else unseen
        changes = processors(submit.params, sampling, submit.prompt, cached=left_out, ends=ends)
        self.guarded = Guarded(changes, submit.budget, matcher)
        self.processors = [self.guarded] if self.guarded else []
        """The logits processors for mlx-lm: at most one, which stands for all of the request's."""

    def wanted(self, finish: str | None) -> int | None:
        """Return how many alternatives to report with a token; None: not even the token's own log probability.

        `finish` is that of Sampled.
        """
        return None if finish == "stop" else self.submit.params.logprobs

    def item(self, token: int, likely: Likely | None, finish: str | None) -> Item:
        """Return the item that reports a token; Failed when one of the request's processors has failed."""
        problem = self.guarded.problem
        if problem is not None and finish != "stop":
            return Failed(problem)
        logprob, top = likely or (None, ())
        return Sampled(token, logprob, top, finish)


def matcher_of(submit: Submit, loaded: Loaded) -> Matcher | None:
    """Return the matcher of a sequence's grammar: the submitted one, or on ranks that have none a new one."""
    if submit.matcher is None and submit.constraint is not None:
        compiled = grammar.compiled(submit.constraint, loaded)
        return Matcher(submit.constraint, compiled, loaded.grammar_tokenizer.vocab_size)
    matcher: Matcher | None = submit.matcher
    return matcher
