"""One resident model in the engine: its continuous batch, and beside it the sequences that must run alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.alone import Alone
from mlx_overlay_server.engine.commands import Item, Prefilled, Submit
from mlx_overlay_server.engine.generation import Generation, matcher_of
from mlx_overlay_server.engine.likely import Likely, Row, likeliest
from mlx_overlay_server.engine.mlx import Cache
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.sampling import Sampling, effective, sampler
from mlx_overlay_server.errors import Failed
from mlx_overlay_server.settings import EngineOptions

LONG_PROMPTS = 8
"""Prompts that each read a full prefill step at once. Beyond this many, prompts share one, which bounds memory."""


class Runner:
    """Steps everything that one model generates."""

    def __init__(self, loaded: Loaded, model: Any, draft: Any, options: EngineOptions, prefixes: PrefixCache) -> None:
        """`draft`: the model for speculative decoding, or None; `prefixes` is shared with the other models."""
        self.loaded = loaded
        self._model = model
        self._draft = draft
        self._options = options
        self._prefixes = prefixes
        self._eos = StopSequences([(token,) for token in loaded.tokenizer.eos_token_ids])
        self._stream = mx.default_stream(mx.default_device())
        self._can_batch = draft is None and options.kv_bits is None and mlx.can_batch(model)
        self._can_trim = can_trim_prompt_cache(make_prompt_cache(model))
        self.reset()

    def reset(self) -> None:
        """Drop every sequence; the model stays."""
        self._generator: BatchGenerator | None = None
        self._batched: dict[int, Generation] = {}
        """The batch's sequences, by BatchGenerator's uid."""
        self._uids: dict[int, int] = {}
        """The same: id -> uid."""
        self._unread: set[int] = set()
        """Uids of those whose prompts are not read to the end."""
        self._alone = Alone(self.loaded, self._model, self._draft, self._options, self._prefixes, self._stream)

    def close(self) -> None:
        """Drop the model, too."""
        self.reset()
        self._prefixes.drop(self.loaded.key)
        del self._alone, self._model, self._draft

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._batched or self._alone)

    @property
    def active(self) -> int:
        """Sequences that read their prompts or generate."""
        return len(self._batched) + len(self._alone) - self.waiting

    @property
    def waiting(self) -> int:
        """Sequences that the batch has no room for yet."""
        return max(0, len(self._batched) - self._options.batch_size)

    def add(self, submit: Submit) -> None:
        """Take on a sequence. Raises what mlx-lm raises on parameters it does not like."""
        sampling = effective(submit.params, self.loaded.defaults, self.loaded.vocab_size)
        # A seed promises the same text whatever else runs. A batch and a reused KV cache round differently, so the
        # sequence runs by itself, from its first token.
        is_seeded = submit.params.seed is not None and sampling.temperature > 0
        if not self._can_batch or submit.images or is_seeded:
            self._alone.add(submit, sampling, matcher_of(submit, self.loaded), is_seeded=is_seeded)
        else:
            self._add_to_batch(submit, sampling)

    def _add_to_batch(self, submit: Submit, sampling: Sampling) -> None:
        matcher = matcher_of(submit, self.loaded)
        cache, cached = self._prefixes.fetch(self.loaded.key, submit.prompt)
        prompt = list(submit.prompt)
        # Where a cache cannot be cut later, one is kept of the part that other conversations share.
        cut = submit.system if not self._can_trim and cached < submit.system < len(prompt) else cached
        generation = Generation(submit, sampling, matcher, cached=cached, unseen=0)
        (uid,) = self._batch.insert_segments(
            segments=[[prompt[cached:cut], prompt[cut:]]],
            max_tokens=[submit.max_tokens],
            caches=[cache],
            all_tokens=[prompt[:cached]],
            samplers=[sampler(sampling, None)],
            logits_processors=[generation.processors],
            stop_sequences=[self._eos],
        )
        generation.guarded.read_last = lambda _: self._current.of(uid)
        self._batched[uid] = generation
        self._uids[submit.id] = uid
        self._unread.add(uid)

    @property
    def _batch(self) -> BatchGenerator:
        """The batch, made when it is needed: it raises MLX's wired limit, and restores it when it goes."""
        if self._generator is None:
            self._generator = BatchGenerator(
                self._model,
                completion_batch_size=self._options.batch_size,
                prefill_batch_size=self._options.batch_size,
                prefill_step_size=self._options.prefill_step,
                stream=self._stream,
            )
            self._current = mlx.CurrentTokens(self._generator)
        return self._generator

    def cancel(self, id_: int) -> None:
        """Drop a sequence, keeping the KV cache it has got so far; nothing for one that has ended."""
        if self._alone.cancel(id_) or (uid := self._uids.pop(id_, None)) is None:
            return
        generation = self._batched.pop(uid)
        self._unread.discard(uid)
        for cache, tokens in self._batch.remove([uid], return_prompt_caches=True).values():
            if cache is not None and len(tokens) > generation.cached:
                self._keep(generation, cache, tokens)

    def step(self) -> list[tuple[int, Item]]:
        """Return one token, or one piece of its prompt, for each sequence, as (id, item)."""
        made = self._step_batch() if self._batched else []
        return made + self._alone.step()

    def _step_batch(self) -> list[tuple[int, Item]]:
        share = max(1, min(len(self._unread), self._options.batch_size) // LONG_PROMPTS)
        mlx.set_prefill_step(self._batch, max(1, self._options.prefill_step // share))
        read, drawn = self._batch.next()
        made = [self._read(part) for part in read]
        told = likeliest(
            [Row(row.token, row.logprobs, self._batched[row.uid].wanted(row.finish_reason)) for row in drawn]
        )
        return made + [self._drawn(row, likely) for row, likely in zip(drawn, told, strict=True)]

    def _read(self, part: Any) -> tuple[int, Item]:
        """Note a piece of a prompt that the batch has read: BatchGenerator's response for it."""
        generation = self._batched[part.uid]
        cached, system = generation.cached, generation.submit.system
        if part.end_of_prompt:
            self._unread.discard(part.uid)
        elif part.end_of_segment and not self._can_trim:
            for cache, tokens in self._batch.extract_cache([part.uid]).values():
                if len(tokens) == system:
                    self._keep(generation, cache, tokens)
        done, total = part.progress
        return generation.submit.id, Prefilled(cached + done, cached + total, cached)

    def _drawn(self, row: Any, likely: Likely | None) -> tuple[int, Item]:
        """Note a token that the batch has drawn: BatchGenerator's response for it."""
        generation = self._batched[row.uid]
        id_ = generation.submit.id
        item = generation.item(row.token, likely, row.finish_reason)
        if row.finish_reason is not None:
            self._keep(generation, row.prompt_cache, row.all_tokens)
        elif isinstance(item, Failed):
            self._batch.remove([row.uid])
        else:
            return id_, item
        del self._batched[row.uid], self._uids[id_]
        return id_, item

    def _keep(self, generation: Generation, cache: Cache, tokens: list[int]) -> None:
        self._prefixes.insert(self.loaded.key, tokens, cache, system=generation.submit.system)
