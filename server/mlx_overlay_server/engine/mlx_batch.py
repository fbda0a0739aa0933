"""mlx-lm's continuous batch with the parts of its step as calls of their own: a part of `mlx`.

`BatchGenerator.next` draws a token for each sequence, then reads a piece of each prompt, and returns when both are
done. So what was drawn is handed on only after the reading, and a prompt that was read to its end gets its first token
when two more pieces of other prompts were read. Here it begins to generate at once, and nobody's token waits.

mlx-lm has a pass of its own for the last tokens of prompts, which goes through all weights as a decoding step does.
Here they are read in the next decoding step, together with the tokens that others drew.

What the docstring of `mlx` says holds here, too.
"""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch

from mlx_overlay_server.engine.mlx import Cache, leaves
from mlx_overlay_server.engine.mlx_rows import RoomyKVCache, filled, plain, roomy, with_room


class Batch:
    """The sequences of one model that share their steps."""

    def __init__(self, model: Any, *, size: int, prefill_step: int, stream: Any) -> None:
        """`size`: sequences that it has room for; `prefill_step`: tokens of a prompt that are computed at once."""
        self._generator = _generator(
            model,
            completion_batch_size=size,
            prefill_batch_size=size,
            prefill_step_size=prefill_step,
            stream=stream,
        )
        self._generator._prompt_batch = _PromptBatch.empty(model, self._generator.sampler)  # noqa: SLF001
        self._rows = _Rows.empty(model, self._generator.sampler)
        self._rows.most = size
        self._generator._generation_batch = self._rows  # noqa: SLF001
        self._stream = stream
        self._is_smaller = False
        """Whether sequences have left those that generate since the batch was settled."""
        self._tokens: dict[int, int] = {}
        """By number of its sequence, the tokens that the running step reads; empty until one is asked for."""

    def insert(
        self,
        segments: list[list[int]],
        max_tokens: int,
        *,
        cache: Cache | None = None,
        read: list[int] | None = None,
        sampler: Any = None,
        processors: Any = None,
        stops: Any = None,
    ) -> int:
        """Take a sequence in, and return a number for it. Reading pauses after each of its segments.

        `cache` is the KV cache of what was `read` of it already. The sequence must be among those of the next `read`.
        """
        (uid,) = self._generator.insert_segments(
            segments=[segments],
            max_tokens=[max_tokens],
            caches=[cache],
            all_tokens=[read or []],
            samplers=None if sampler is None else [sampler],
            logits_processors=None if processors is None else [processors],
            stop_sequences=None if stops is None else [stops],
        )
        return int(uid)

    def remove(self, uid: int) -> None:
        """Drop a sequence."""
        self._is_smaller = True
        self._generator.remove([uid])

    def take_out(self, uid: int) -> tuple[Cache, list[int]]:
        """Drop a sequence, and return its KV cache and the tokens in that."""
        self._is_smaller = True
        ((cache, tokens),) = self._generator.remove([uid], return_prompt_caches=True).values()
        return cache, list(tokens)

    def extract(self, uid: int) -> tuple[Cache, list[int]]:
        """Return the KV cache of a sequence, which stays, and the tokens in that. A later step changes it."""
        ((cache, tokens),) = self._generator.extract_cache([uid]).values()
        return cache, tokens

    def read(self, tokens: int) -> list[Any]:
        """Read up to so many tokens of each prompt, but for its last token. Returns BatchGenerator's responses."""
        return self._advance(tokens)

    def expect(self, sequences: int) -> None:
        """Note how many sequences generate when all prompts that wait are read: there is room for them from then on."""
        self._rows.expected = min(sequences, self._rows.most)

    def begin(self) -> list[Any]:
        """Let the prompts that are read but for their last tokens generate. Returns BatchGenerator's responses.

        The next `draw` reads these tokens, and the one after it returns what is drawn first.
        """
        return [part for part in self._advance(0) if part.end_of_prompt]

    def wait(self) -> None:
        """Wait for what `draw` has begun: it computes the tokens that the next `draw` returns."""
        mx.synchronize(self._stream)

    def draw(self) -> list[Any]:
        """Draw a token for each sequence that generates. Returns BatchGenerator's responses for those drawn before.

        Call `begin` before, where a prompt has ended.
        """
        self._generator.prefill_step_size = 0
        drawn: list[Any] = self._generator.next()[1]
        self._tokens = {}
        self._is_smaller |= any(row.finish_reason is not None for row in drawn)
        return drawn

    def settle(self) -> None:
        """Let the batch take no more memory than it must, when nobody holds the KV caches of sequences that left it."""
        self._rows.settle(is_smaller=self._is_smaller)
        self._is_smaller = False

    def current(self, uid: int) -> int:
        """Return the token that a sequence drew in the step before, for the logits processors that a step calls.

        The first call in a step fetches the tokens of all sequences from the device, which waits for them.
        """
        if uid not in self._tokens:
            # Asking the arrays that processors get would be a wait for each.
            tokens: Any = self._rows._current_tokens.tolist()  # noqa: SLF001
            self._tokens = dict(zip(self._rows.uids, tokens, strict=True))
        return self._tokens[uid]

    def _advance(self, tokens: int) -> list[Any]:
        """Do what `BatchGenerator.next` does beside drawing: it finds no sequence that generates."""
        generator = self._generator
        # The two halves have no names of their own.
        begun = generator._generation_batch = GenerationBatch.empty(generator.model, generator.sampler)  # noqa: SLF001
        generator.prefill_step_size = tokens
        try:
            told: list[Any] = generator.next()[0]
        finally:
            generator._generation_batch = self._rows  # noqa: SLF001
        if len(begun):
            self._rows.extend(begun)
        return told


class _PromptBatch(PromptProcessingBatch):  # type: ignore[misc]
    """The sequences of a batch whose prompts are being read. They join and leave in the middle of a step."""

    def extend(self, batch: Any) -> None:
        super().extend(batch)
        _settle(self.prompt_cache)

    def filter(self, keep: list[int]) -> None:
        super().filter(keep)
        _settle(self.prompt_cache)

    def extract_cache(self, idx: int) -> Cache:
        cache: Cache = super().extract_cache(idx)
        _settle(cache)
        return cache

    def generate(self, tokens: list[list[int]]) -> GenerationBatch:
        """Return the sequences with the last token of each, which they read when they have joined the others."""
        if not any(self.tokens):  # without a KV cache they cannot join
            return super().generate(tokens)
        last = mx.array([token for (token,) in tokens], dtype=mx.uint32)
        return _Joining(
            self.model,
            self.uids,
            last,
            self.prompt_cache,
            self.tokens,
            self.samplers,
            self.fallback_sampler,
            self.logits_processors,
            self.stop_sequences,
            self.max_tokens,
        )


class _Joining(GenerationBatch):  # type: ignore[misc]
    """Sequences that join those that generate. What they read next is the last token of their prompts."""

    _matchers: list[Any]

    def _step(self) -> tuple[list[int], list[Any]]:
        """Compute nothing, though mlx-lm would: in its first step, a sequence gives the token that it reads."""
        self._next_logprobs = [None] * len(self)
        self._num_tokens = [-1] * len(self)
        self._matchers = [_MatcherOfAnswer(matcher) for matcher in self._matchers]
        return [], []


class _MatcherOfAnswer:
    """A matcher of stop sequences that passes over one token, the last of the prompt."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def advance(self, token: int) -> bool:  # noqa: ARG002
        self.advance = self._matcher.advance  # type: ignore[method-assign]  # of all tokens that follow
        return False


class _Rows(GenerationBatch):  # type: ignore[misc]
    """The sequences of a batch that generate. Where memory is plenty, there is room for more of them."""

    prompt_cache: Cache
    most: int
    """Sequences that there ever are."""
    expected: int = 0
    """Sequences that there will be soon."""

    def next(self) -> list[Any]:
        return [row for row in super().next() if row.logprobs is not None]  # others gave the last token of a prompt

    def extend(self, batch: Any) -> None:
        if not self.prompt_cache:
            batch.prompt_cache = roomy(batch.prompt_cache)
        self._choose(batch)
        self._make_room(len(self) + len(batch))
        super().extend(batch)
        if batch.prompt_cache is not self.prompt_cache:
            batch.prompt_cache.clear()  # or what joins would be there twice until all of it is copied
        _settle(self.prompt_cache)

    def _choose(self, batch: Any) -> None:
        """Have no room where memory is short, before others join: arrays with room are there beside what joins them."""
        both = (self, batch)
        row = max(sum(layer.nbytes for layer in each.prompt_cache) // max(1, len(each)) for each in both)
        needed = 2 * row * sum(map(len, both))
        is_short = mx.get_active_memory() + needed > mx.get_memory_limit()
        self.prompt_cache = plain(self.prompt_cache) if is_short else roomy(self.prompt_cache)

    def _make_room(self, rows: int) -> None:
        """Make room for those that are expected, or at least for a quarter more, where so many rows are too many."""
        layers = with_room(self.prompt_cache)
        if not layers or rows <= layers[0].capacity:
            return
        wanted = min(max(self.expected, rows + rows // 4), self.most)
        growth = wanted / layers[0].capacity  # beside which there must be two further copies, or `settle` would undo it
        if _has_memory(self.prompt_cache, times=3 * growth - 1):
            for layer in layers:
                layer.resize(wanted)

    def filter(self, keep: list[int]) -> None:
        super().filter(filled(keep))
        if not keep:
            self._current_tokens = None  # or those of the last step would stay
            self._current_logprobs: list[Any] = []

    def settle(self, *, is_smaller: bool) -> None:
        """Let the sequences take no more memory than they must.

        `is_smaller`: whether others have left, whose KV caches nobody holds any more.
        """
        is_short = not _has_memory(self.prompt_cache, times=2)
        rows = len(self) if is_short else max(len(self), self.expected)
        for layer in with_room(self.prompt_cache):
            if layer.is_too_large(rows) or (is_short and layer.has_room):
                layer.resize(rows)
        if is_smaller:
            _settle(self.prompt_cache)


def _has_memory(cache: Cache, *, times: float) -> bool:
    """Return whether memory has room for so many further copies of a KV cache."""
    nbytes: int = sum(layer.nbytes for layer in cache)
    return mx.get_active_memory() + times * nbytes <= mx.get_memory_limit()


def _settle(cache: Cache) -> None:
    """Compute KV caches that sequences have joined or left, where memory has no room for a second copy of them.

    mlx-lm makes new arrays for all sequences then, and computes those of all layers together, with the next step. Here
    it is done array by array: each frees what it is made from.
    """
    if _has_memory(cache, times=2):
        return
    for leaf in leaves(cache):
        for name in ("keys", "values"):
            array = getattr(leaf, name, None)
            if isinstance(array, mx.array) and not isinstance(leaf, RoomyKVCache):  # which does so by itself
                setattr(leaf, name, mx.contiguous(array))  # the tokens without those that were longer
                del array
                mx.eval(getattr(leaf, name))


def _generator(model: Any, **options: Any) -> Any:
    """Return a BatchGenerator that leaves the wired limit alone.

    By itself it sets the limit, and when it goes it restores the one that it found: in the middle of what another
    model computes, which MLX forbids, and to nothing at all where it was the first of several.
    """
    generate: Any = importlib.import_module("mlx_lm.generate")  # the package has a function of that name
    original = generate.maybe_set_recommended_wired_limit
    generate.maybe_set_recommended_wired_limit = lambda: None  # "no limit was set": then it restores none, either
    try:
        return BatchGenerator(model, **options)
    finally:
        generate.maybe_set_recommended_wired_limit = original
