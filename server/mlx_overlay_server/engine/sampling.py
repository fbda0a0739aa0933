"""How the next token is chosen: samplers and logits processors for mlx-lm, made for each request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    greedy_sampler,
    make_frequency_penalty,
    make_presence_penalty,
    make_repetition_penalty,
    make_sampler,
)

from mlx_overlay_server.chat.grammar import Budget, Constraint
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine.failures import is_late

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]
Mask = Callable[[int | None, mx.array], mx.array]
"""Called at each step with the last drawn token (None before the first) and the logits; returns the logits with other
values.
"""

_ALL = 1 << 30  # the context size of a penalty, in tokens, that covers every answer
_NEVER = -1e4
_LEAST = 1e-6
"""A temperature or top_p below this is greedy decoding: dividing by it overflows float32."""


class Sampling(NamedTuple):
    """The sampling parameters in effect for a request: its own, with the model's defaults filled in."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float


def effective(params: Params, defaults: Mapping[str, Any], vocab_size: int) -> Sampling:
    """Return a request's sampling parameters: its own, else those of generation_config.json, else OpenAI's defaults."""

    def of(given: float | None, name: str, otherwise: float) -> float:
        default = defaults.get(name)
        return given if given is not None else float(otherwise if default is None else default)

    temperature = of(params.temperature, "temperature", 0.0 if defaults.get("do_sample") is False else 1.0)
    top_p = of(params.top_p, "top_p", 1.0)
    top_k = int(of(params.top_k, "top_k", 0))
    return Sampling(
        temperature=0.0 if temperature < _LEAST or top_p < _LEAST or top_k == 1 else temperature,
        top_p=top_p,
        top_k=top_k if 0 < top_k < vocab_size else 0,
        min_p=of(params.min_p, "min_p", 0.0),
        repetition_penalty=of(params.repetition_penalty, "repetition_penalty", 1.0),
    )


def sampler(sampling: Sampling, seed: int | None) -> Sampler:
    """Return a sampler, which maps log probabilities of shape [batch, vocabulary] to tokens of shape [batch]."""
    if sampling.temperature == 0:
        return greedy_sampler  # type: ignore[no-any-return]
    return _shared(sampling[:4]) if seed is None else _seeded(sampling, seed)


@lru_cache(maxsize=256)
def _shared(key: tuple[float, float, int, float]) -> Sampler:
    """Return one sampler for equal parameters: BatchGenerator samples rows together only if they share it."""
    temperature, top_p, top_k, min_p = key
    sample = make_sampler(temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    # In float16, dividing log probabilities by a low temperature overflows to infinities, which are all equal.
    return lambda logprobs: sample(logprobs.astype(mx.float32))


def _seeded(sampling: Sampling, seed: int) -> Sampler:
    """Return a sampler with a random state of its own, so that its draws do not depend on other requests."""
    key = mx.random.key(seed % (1 << 64))

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        logprobs = logprobs.astype(mx.float32)
        if 0 < sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if sampling.top_k:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        return mx.random.categorical(logprobs * (1 / sampling.temperature), key=now)

    return sample


def processors(
    params: Params,
    sampling: Sampling,
    prompt: Sequence[int],
    *,
    cached: int = 0,
    ends: Iterable[int] = (),
) -> list[Processor]:
    """Return the logits processors of a request, in the order in which they run, before masks and the sampler.

    mlx-lm calls a processor with the tokens so far; the first `cached` tokens of the prompt may be missing there.
    Presence and frequency penalties count the answer alone, as OpenAI's and vLLM's do. The repetition penalty counts
    the prompt, too. `ends` are the tokens that end an answer.
    """
    seen = len(prompt) - cached
    made: list[Processor] = []
    if params.logit_bias:
        tokens = mx.array(list(params.logit_bias))
        # OpenAI's -100 bans a token, however likely it is. Not infinity: a grammar may leave nothing but banned tokens.
        values = mx.array([_NEVER if bias <= -100 else bias for bias in params.logit_bias.values()])
        made.append(lambda _, logits: logits.at[:, tokens].add(values.astype(logits.dtype)))
    if sampling.repetition_penalty != 1:
        repeat = make_repetition_penalty(sampling.repetition_penalty, params.repetition_context or _ALL)
        missing = mx.array(list(prompt[:cached]), dtype=mx.int32)
        made.append(lambda so_far, logits: repeat(mx.concatenate([missing, so_far.astype(mx.int32)]), logits))
    if params.presence_penalty:
        present = make_presence_penalty(params.presence_penalty, _ALL)
        made.append(lambda so_far, logits: present(so_far[seen:], logits))
    if params.frequency_penalty:
        frequent = make_frequency_penalty(params.frequency_penalty, _ALL)
        made.append(lambda so_far, logits: frequent(so_far[seen:], logits))
    if params.min_tokens and (stops := list(ends)):
        made.append(_longer(seen + params.min_tokens, mx.array(stops)))
    return made


def _longer(size: int, ends: mx.array) -> Processor:
    """Return a processor that bans the tokens of `ends` while there are fewer than `size` tokens.

    A grammar that allows nothing else may still end the answer.
    """
    return lambda so_far, logits: logits.at[:, ends].add(_NEVER) if so_far.shape[0] < size else logits


def last_of(tokens: mx.array) -> int:
    """Return the last of a sequence's tokens, and wait until it is computed."""
    last: Any = tokens[-1].item()
    return int(last)


class Guarded:
    """All logits processors and masks of a request as one. An error in them ends that request alone, not its batch."""

    def __init__(self, changes: Sequence[Processor], budget: Budget | None, matcher: Matcher | None) -> None:
        self._changes = changes
        self._matcher = matcher
        self._masks: list[Mask] = [] if budget is None else [ReasoningBudget(budget)]
        if matcher is not None:
            self._masks.append(matcher)
        self._is_first = True
        self._error: str | None = None
        self.read_last: Callable[[mx.array], int] = last_of
        """Returns the last of a sequence's tokens. It waits for the device, so it is called once for all masks; a batch
        replaces it by a function that reads the last tokens of all its sequences at once.
        """

    def __bool__(self) -> bool:
        return bool(self._changes or self._masks)

    def draw_again(self) -> None:
        """Make the next call repeat the last one, after whose token others were drawn that have been dropped."""
        self._is_first = True

    @property
    def problem(self) -> str | None:
        """Why the sequence cannot go on; None while it can."""
        if self._matcher is not None and self._matcher.problem is not None:
            return f"the answer cannot follow its grammar any more: {self._matcher.problem}"
        return self._error

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        try:
            for change in self._changes:
                logits = change(tokens, logits)
            if self._masks:
                last = None if self._is_first else self.read_last(tokens)
                self._is_first = False
                for mask in self._masks:
                    logits = mask(last, logits)
        except Exception as error:
            if is_late(error):  # reading the last token waits for the device, which may report an error of other work
                raise
            # Any other error concerns this row alone; the other rows of the batch go on.
            self._error = f"the engine failed: {type(error).__name__}"
        return logits


class ReasoningBudget:
    """A mask that limits reasoning to a number of tokens, and then forces its closing mark."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._left: int | None = budget.tokens if budget.is_open else None
        """Tokens that the open reasoning block may still take; None: no block is open."""
        self._last: tuple[int, ...] = ()

    def __call__(self, last: int | None, logits: mx.array) -> mx.array:
        if last is not None:
            self._accept(last)
        if self._left is None or self._left > 0:
            return logits
        ends = self._budget.ends
        forced = mx.arange(logits.shape[-1]) == ends[_begun(self._last, ends)]
        return mx.where(forced, logits, -float("inf"))

    def _accept(self, token: int) -> None:
        opens, ends = self._budget.opens, self._budget.ends
        self._last = (*self._last, token)[-max(len(opens), len(ends)) :]
        if self._left is None and self._last[-len(opens) :] == opens:
            self._left = self._budget.tokens
        elif self._left is not None and self._last[-len(ends) :] == ends:
            self._left = None
        elif self._left is not None:
            self._left = max(0, self._left - 1)


def _begun(tokens: tuple[int, ...], mark: tuple[int, ...]) -> int:
    """Return how many tokens of a mark are there already: with how many of its first ones the tokens end."""
    return next(size for size in range(len(mark) - 1, -1, -1) if not size or tokens[-size:] == mark[:size])


class Matcher:
    """A mask of every token which the grammar does not allow next."""

    def __init__(self, constraint: Constraint, matcher: Any, vocab_size: int) -> None:
        """`matcher` is a copy, of its own, of the grammar that `chat.grammar.compiled` returned."""
        from llguidance.numpy import allocate_token_bitmask

        self._matcher = matcher
        self._unless = constraint.unless
        self._ends = constraint.after or constraint.ends
        self._stops = [token for token in constraint.stops if token < vocab_size]
        self._is_free = bool(constraint.after)
        self._mask = allocate_token_bitmask(1, vocab_size)
        self._accepted = 0
        self._last: tuple[int, ...] = ()
        self.problem: str | None = None
        """Why the answer cannot follow the grammar any more; None while it can."""

    def __call__(self, last: int | None, logits: mx.array) -> mx.array:
        if last is not None:
            self._accept(last)
        if self._is_free:
            return self._without_end(logits)
        if self.problem is not None:
            return logits
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask, 0)
        if self._matcher.is_error():
            self.problem = self._matcher.get_error().splitlines()[0]
            return logits
        allowed = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: logits.shape[-1]].astype(bool)
        allowed = np.pad(
            allowed, (0, logits.shape[-1] - len(allowed))
        )  # logits may have more columns than there are tokens
        if self._accepted == 0 and self._unless is not None:
            allowed[self._unless] = True
        return mx.where(mx.array(allowed), logits, -float("inf"))

    def _without_end(self, logits: mx.array) -> mx.array:
        """Return logits with which reasoning cannot end the answer, whose constrained part is still to come.

        The weight of the end token moves to the next token of the reasoning's closing mark. A model that wants to stop
        then closes its reasoning; if the end were only banned, it would ramble on.
        """
        if not self._stops:
            return logits
        stops = mx.array(self._stops)
        weight = mx.max(logits[:, stops], axis=-1)
        logits = logits.at[:, stops].add(-float("inf"))
        return logits.at[:, self._ends[_begun(self._last, self._ends)]].maximum(weight)

    def _accept(self, token: int) -> None:
        self._accepted += 1
        if self._is_free:
            self._last = (*self._last, token)[-len(self._ends) :]
            self._is_free = self._last != self._ends
        elif self._accepted == 1 and token == self._unless and self._ends:
            self._is_free = True
        elif not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            self.problem = self._matcher.get_error().splitlines()[0]
