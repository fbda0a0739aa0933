"""Sequences that run beside the batch, each by itself: seeded, with images, a draft model or unmergeable KV caches."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.commands import Item, Prefilled, PromptScores, Sampled, Submit
from mlx_overlay_server.engine.failures import failure, is_late
from mlx_overlay_server.engine.generation import Generation
from mlx_overlay_server.engine.likely import Row, likeliest, scored
from mlx_overlay_server.engine.mlx import Cache
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.sampling import Matcher, Processor, Sampler, Sampling, sampler
from mlx_overlay_server.engine.vision import SeeingModel
from mlx_overlay_server.errors import Failed, ServerError
from mlx_overlay_server.settings import EngineOptions

PIECE = 256
"""Tokens of a prompt that are read in a step at most."""
LEAST_PIECE = 16
"""Tokens of a piece however little memory it may compute with."""


class Alone:
    """The sequences of one model that run alone.

    Each step gives one token to each that generates, and reads a piece of one prompt: those not read take turns.
    """

    def __init__(
        self,
        loaded: Loaded,
        model: Any,
        draft: Any,
        options: EngineOptions,
        prefixes: PrefixCache,
        stream: Any,
        fits: Callable[[int], int],
    ) -> None:
        """`draft`: the model for speculative decoding, or None; `stream`: the MLX stream of the engine's thread.

        `fits`: (tokens that come before) -> tokens that a pass may read, for the memory that it computes with.
        """
        self._loaded = loaded
        self._model = model
        self._draft = draft
        self._options = options
        self._prefixes = prefixes
        self._stream = stream
        self._fits = fits
        self._running: dict[int, _Running] = {}
        self._paused: dict[int, _Running] = {}
        """Those that wait until there is memory to go on."""

    def __len__(self) -> int:
        return len(self._running)

    def add(self, submit: Submit, sampling: Sampling, matcher: Matcher | None, *, is_seeded: bool) -> None:
        """Start a sequence. Raises what mlx-lm raises on parameters it does not like."""
        # A grammar and a budget keep count of tokens, and cannot take back what a draft model guessed.
        has_draft = self._draft is not None and submit.constraint is None and submit.budget is None
        identity = submit.prompt if submit.shown is None else submit.shown.identity
        may_reuse = (
            submit.keeps_cache
            and not (is_seeded or submit.images or submit.params.prompt_logprobs is not None)
            and has_draft == (self._draft is not None)
        )
        cache, cached = self._prefixes.fetch(self._loaded.key, identity) if may_reuse else (None, 0)
        if cache is not None and cached < self._options.quantized_kv_start and mlx.is_quantised(cache):
            cache, cached = None, 0  # read anew, so short a beginning is not quantised, and says another text
        if cache is None:
            cache = self._new_cache(has_draft=has_draft)
        # The prompt but for its last token is read here, so that is all that mlx-lm's processors see of it.
        unseen, ends = len(submit.prompt) - 1, self._loaded.ends
        generation = Generation(submit, sampling, matcher, cached=cached, unseen=unseen, ends=ends)
        # Of one size for one prompt: a seed promises the same text, and pieces of other sizes would round differently.
        piece = max(LEAST_PIECE, min(PIECE, self._fits(len(submit.prompt))))
        model, embeddings = self._model, None
        if isinstance(model, SeeingModel):
            model = model.sequence(submit.prompt, submit.shown, cache)
            embeddings, piece = model.embeddings, piece if model.in_pieces else len(submit.prompt)
        elif submit.images:
            embeddings = mlx.image_embeddings(model, submit.prompt, submit.images)
        reader = _Reader(model, self._draft if has_draft else None, cache, self._options)
        draw = partial(self._draw, model, generation, sampler(sampling, submit.params.seed), cache, embeddings)
        prefixes = self._prefixes if may_reuse else None
        self._running[submit.id] = _Running(
            self._loaded,
            generation,
            reader,
            embeddings,
            partial(draw, has_draft=has_draft),
            cache,
            prefixes,
            identity,
            piece,
            again=1 if is_seeded else piece,
        )

    def _new_cache(self, *, has_draft: bool) -> Cache:
        """Return an empty KV cache; with a draft model, its layers come last."""
        drafts = make_prompt_cache(self._draft) if has_draft else []
        return [*make_prompt_cache(self._model), *drafts]

    def _draw(
        self,
        model: Any,
        generation: Generation,
        sample: Sampler,
        cache: Cache,
        embeddings: Any,
        tokens: Sequence[int],
        *,
        has_draft: bool,
    ) -> Generator[tuple[Any, ...]]:
        """Return mlx-lm's generator of (token, log probabilities of the vocabulary, …), which reads the last token.

        `tokens`: those of the prompt, and after a pause of the answer so far.
        """
        submit, options = generation.submit, self._options
        size = len(submit.prompt)
        last = mx.array(list(tokens[-1:]))
        shared = {
            "max_tokens": submit.max_tokens - len(tokens) + size,
            "sampler": sample,
            "logits_processors": _preceded(generation.processors, tokens[size - 1 : -1]),
            "prompt_cache": cache,
            "kv_bits": options.kv_bits,
            "kv_group_size": options.kv_group_size,
            "quantized_kv_start": options.quantized_kv_start,
            "stream": self._stream,
        }
        drawn: Generator[tuple[Any, ...]]
        if has_draft:
            drawn = speculative_generate_step(
                last, model, self._draft, num_draft_tokens=options.num_draft_tokens, **shared
            )
        else:
            inputs = None if embeddings is None else embeddings[-1:]
            drawn = generate_step(last, model, input_embeddings=inputs, **shared)
        return drawn

    def cancel(self, id_: int) -> bool:
        """End a sequence and keep its KV cache for later prompts. Returns whether it was running here."""
        if (paused := self._paused.pop(id_, None)) is not None:
            paused.end()
            return True
        running = self._running.pop(id_, None)
        if running is not None:
            running.close()
            running.end()
        return running is not None

    def pause(self, id_: int) -> bool:
        """Free the KV cache of a sequence, which is read again after `resume`; False where it cannot wait."""
        running = self._running.get(id_)
        if running is None or not running.can_wait:
            return False
        running.drop(self._new_cache(has_draft=running.has_draft))
        self._paused[id_] = self._running.pop(id_)
        return True

    def resume(self, id_: int) -> bool:
        """Let a sequence go on that was paused. Returns whether there is one."""
        if (running := self._paused.pop(id_, None)) is None:
            return False
        self._running[id_] = running
        return True

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not read to its end."""
        return any(running.is_reading for running in self._running.values())

    def step(self, *, may_read: bool) -> list[tuple[int, Item]]:
        """Return what each sequence made in one step, as (id, item); those that ended are dropped.

        `may_read`: whether a piece of a prompt may be read.
        """
        made: list[tuple[int, Item]] = []
        for id_, running in list(self._running.items()):
            if running.is_reading:
                if not may_read:
                    continue
                may_read = False
                self._running[id_] = self._running.pop(id_)  # the next piece is another's, if one waits
            try:
                item = running.step()
            except Exception as error:
                if is_late(error):
                    raise
                item = failure(error)  # alone, it harms no other
            if item is None:
                continue
            made.append((id_, item))
            if isinstance(item, ServerError) or (isinstance(item, Sampled) and item.finish is not None):
                self._running.pop(id_).end()
        return made


def _preceded(processors: Sequence[Processor], tokens: Sequence[int]) -> list[Processor]:
    """Return logits processors that are told of some tokens before those that mlx-lm tells them of."""
    if not tokens:
        return list(processors)
    before = mx.array(list(tokens), dtype=mx.uint32)

    def preceded(processor: Processor) -> Processor:
        return lambda seen, logits: processor(mx.concatenate([before, seen.astype(mx.uint32)]), logits)

    return [preceded(each) for each in processors]


class _Reader:
    """Reads prompts into the KV caches of a model, and of its draft model where there is one, as mlx-lm does."""

    def __init__(self, model: Any, draft: Any, cache: Cache, options: EngineOptions) -> None:
        """`cache`: the caches of the model's layers, then the draft model's."""
        self._model = model
        self._draft = draft
        self._cache = cache
        self._options = options

    @property
    def has_draft(self) -> bool:
        """Whether there is a draft model."""
        return self._draft is not None

    def read(self, tokens: Sequence[int], embeddings: Any) -> mx.array:
        """Read tokens, and return the logits after each, not evaluated.

        `embeddings`: what the tokens are for the model when there are images among them, else None.
        """
        given = {} if embeddings is None else {"input_embeddings": embeddings[None]}
        piece = mx.array([list(tokens)])
        count = len(self._cache) if self._draft is None else len(self._model.layers)
        logits: mx.array = self._model(piece, cache=self._cache[:count], **given)
        if self._draft is not None:
            self._draft(piece, cache=self._cache[count:])
        options = self._options
        maybe_quantize_kv_cache(self._cache, options.quantized_kv_start, options.kv_group_size, options.kv_bits)
        mlx.evaluate(self._cache)
        mx.clear_cache()
        return logits[0]


class _Running:
    """One sequence that runs alone."""

    def __init__(
        self,
        loaded: Loaded,
        generation: Generation,
        reader: _Reader,
        embeddings: Any,
        draw: Callable[[Sequence[int]], Generator[tuple[Any, ...]]],
        cache: Cache,
        prefixes: PrefixCache | None,
        identity: Sequence[int],
        piece: int,
        again: int,
    ) -> None:
        """`embeddings`: of a prompt with images, else None; `draw`: tokens -> mlx-lm's generator, which reads the last.

        `prefixes`: where the KV cache is kept at the end; None: it must not be reused. `identity`: what the prompt is
        known by there. `piece`: tokens of the prompt that are read in a step at most. `again`: tokens of the answer
        that are read at once after a pause; one by one they are rounded as they were when they were drawn.
        """
        self._loaded = loaded
        self._generation = generation
        self._reader = reader
        self._embeddings = embeddings
        self._draw = draw
        self._drawn = draw(self._generation.submit.prompt)
        self._cache = cache
        self._prefixes = prefixes
        self._tokens = list(identity)
        self._piece = piece
        self._again = again
        self._done = generation.cached
        """Tokens of the prompt that are read, but for its last."""
        self._missing: deque[tuple[int, int]] = deque()
        """The pieces, from one token to another, that were in the KV cache before a pause and are not any more."""
        self._items = self._run()

    @property
    def has_draft(self) -> bool:
        """Whether a draft model guesses ahead."""
        return self._reader.has_draft

    @property
    def can_wait(self) -> bool:
        """Whether it can be paused: what a seed draws by is known only as long as no guess is dropped."""
        return not self.has_draft or self._generation.submit.params.seed is None

    @property
    def is_reading(self) -> bool:
        """Whether the next step reads a piece of the prompt, or of what was read before a pause."""
        return bool(self._missing) or self._done < len(self._generation.submit.prompt) - 1

    def step(self) -> Item | None:
        """Return the next item; None where something was read again."""
        if self._missing:
            start, end = self._missing.popleft()
            self._read(start, end)
            return None
        return next(self._items)

    def drop(self, empty: Cache) -> None:
        """Free the KV cache, in whose place comes an empty one; the next steps read again what was in it."""
        prompt = self._generation.submit.prompt
        size, end = len(prompt), len(self._tokens)
        cuts = [*range(0, self._done, self._piece), self._done]
        if end > size:
            if self.has_draft:  # its generator holds parts of the cache, and guesses: another one goes on
                self._drawn.close()
                self._drawn = self._draw([*prompt, *self._tokens[size:]])
                end -= 1
            cuts += [size, *range(size + self._again, end, self._again), end]
        self._missing = deque(itertools.pairwise(sorted({*cuts})))
        self._cache[:] = empty

    def end(self) -> None:
        """Let go of the KV cache, which would else stay until Python looks for cycles."""
        self._items.close()

    def _read(self, start: int, end: int) -> mx.array:
        """Read tokens of the prompt, or of the answer, and return the logits after each."""
        prompt = self._generation.submit.prompt
        tokens = prompt[start:end] if start < len(prompt) else self._tokens[start:end]
        embeddings = self._embeddings[start:end] if self._embeddings is not None and start < len(prompt) else None
        return self._reader.read(tokens, embeddings)

    def _run(self) -> Generator[Item]:
        submit, cached = self._generation.submit, self._generation.cached
        size = len(submit.prompt)
        yield Prefilled(self._done, size, cached)
        while (start := self._done) < size - 1:
            end = min(start + self._piece, size - 1)
            logits = self._read(start, end)
            self._done = end
            if (wanted := submit.params.prompt_logprobs) is not None:
                yield PromptScores(tuple(scored(logits, submit.prompt[start + 1 : end + 1], wanted)))
            del logits
            yield Prefilled(end, size, cached)
        eos = self._loaded.tokenizer.eos_token_ids
        for count, (token, logprobs, *_) in enumerate(iter(lambda: next(self._drawn), None), 1):
            token = int(token)
            self._tokens.append(token)
            finish = "stop" if token in eos else "length" if count >= submit.max_tokens else None
            if count == 1:
                yield Prefilled(len(submit.prompt), len(submit.prompt), cached)
            (likely,) = likeliest([Row(token, logprobs, self._generation.wanted(finish))])
            item = self._generation.item(token, likely, finish)
            if finish is not None or isinstance(item, Failed):
                self._tokens.pop()
                self.close()
                yield item
                return
            yield item

    def close(self) -> None:
        """End the sequence and keep its KV cache, where its kind can be cut to the tokens it has read."""
        size = mlx.close_alone(self._drawn, self._cache if self._prefixes is not None else [], len(self._tokens))
        if self._prefixes is not None and size is not None:
            system = self._generation.submit.system
            self._prefixes.insert(self._loaded.key, self._tokens[:size], self._cache, system=system)
