"""Sequences that run beside the batch, each by itself: seeded, with images, a draft model or unmergeable KV caches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import make_prompt_cache

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.commands import Item, Prefilled, Sampled, Submit
from mlx_overlay_server.engine.generation import Generation
from mlx_overlay_server.engine.likely import Row, likeliest
from mlx_overlay_server.engine.mlx import Cache
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.sampling import Matcher, Sampling, sampler
from mlx_overlay_server.errors import Failed
from mlx_overlay_server.settings import EngineOptions


class Alone:
    """The sequences of one model that run alone. Each step gives each of them one token."""

    def __init__(
        self, loaded: Loaded, model: Any, draft: Any, options: EngineOptions, prefixes: PrefixCache, stream: Any
    ) -> None:
        """`draft`: the model for speculative decoding, or None; `stream`: the MLX stream of the engine's thread."""
        self._loaded = loaded
        self._model = model
        self._draft = draft
        self._options = options
        self._prefixes = prefixes
        self._stream = stream
        self._running: dict[int, _Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def add(self, submit: Submit, sampling: Sampling, matcher: Matcher | None, *, is_seeded: bool) -> None:
        """Start a sequence. Raises what mlx-lm raises on parameters it does not like."""
        # A grammar and a budget keep count of tokens, and cannot take back what a draft model guessed.
        has_draft = self._draft is not None and submit.constraint is None and submit.budget is None
        may_reuse = not is_seeded and not submit.images and has_draft == (self._draft is not None)
        cache, cached = self._prefixes.fetch(self._loaded.key, submit.prompt) if may_reuse else (None, 0)
        if cache is None:
            cache = make_prompt_cache(self._model)
            if has_draft:
                cache += make_prompt_cache(self._draft)
        unseen = len(submit.prompt) - 1 if has_draft else None  # speculative decoding shows processors no prompt
        generation = Generation(submit, sampling, matcher, cached=cached, unseen=unseen)
        drawn = self._drawn(generation, sampling, cache, has_draft=has_draft)
        prefixes = self._prefixes if may_reuse else None
        self._running[submit.id] = _Running(self._loaded, generation, drawn, cache, prefixes)

    def _drawn(
        self, generation: Generation, sampling: Sampling, cache: Cache, *, has_draft: bool
    ) -> Iterator[tuple[Any, ...]]:
        """Return mlx-lm's generator of (token, log probabilities of the vocabulary, …)."""
        submit, options = generation.submit, self._options
        rest = list(submit.prompt[generation.cached :])
        shared = {
            "max_tokens": submit.max_tokens,
            "sampler": sampler(sampling, submit.params.seed),
            "logits_processors": generation.processors,
            "prompt_cache": cache,
            "prefill_step_size": options.prefill_step,
            "kv_bits": options.kv_bits,
            "kv_group_size": options.kv_group_size,
            "quantized_kv_start": options.quantized_kv_start,
            "stream": self._stream,
        }
        drawn: Iterator[tuple[Any, ...]]
        if has_draft:
            drawn = speculative_generate_step(
                mx.array(rest), self._model, self._draft, num_draft_tokens=options.num_draft_tokens, **shared
            )
        else:
            embeddings = mlx.image_embeddings(self._model, rest, submit.images) if submit.images else None
            drawn = generate_step(mx.array(rest), self._model, input_embeddings=embeddings, **shared)
        return drawn

    def cancel(self, id_: int) -> bool:
        """End a sequence and keep its KV cache for later prompts. Returns whether it was running here."""
        running = self._running.pop(id_, None)
        if running is not None:
            running.close()
        return running is not None

    def step(self) -> list[tuple[int, Item]]:
        """Return what each sequence made in one step, as (id, item); those that ended are dropped."""
        made: list[tuple[int, Item]] = []
        for id_, running in list(self._running.items()):
            try:
                item = next(running.items)
            except Exception as error:  # noqa: BLE001 - alone, it harms no other
                item = Failed(f"the engine failed: {type(error).__name__}")
            made.append((id_, item))
            if isinstance(item, Failed) or (isinstance(item, Sampled) and item.finish is not None):
                del self._running[id_]
        return made


class _Running:
    """One sequence that runs alone; `items` gives the next item each time it is advanced."""

    def __init__(
        self,
        loaded: Loaded,
        generation: Generation,
        drawn: Iterator[tuple[Any, ...]],
        cache: Cache,
        prefixes: PrefixCache | None,
    ) -> None:
        """`prefixes`: where the KV cache is kept at the end; None: it must not be reused."""
        self._loaded = loaded
        self._generation = generation
        self._drawn = drawn
        self._cache = cache
        self._prefixes = prefixes
        self._tokens = list(generation.submit.prompt)
        self.items = self._run()

    def _run(self) -> Iterator[Item]:
        submit, cached = self._generation.submit, self._generation.cached
        yield Prefilled(cached, len(submit.prompt), cached)
        eos = self._loaded.tokenizer.eos_token_ids
        for count, (token, logprobs, *_) in enumerate(self._drawn, 1):
            token = int(token)
            finish = "stop" if token in eos else "length" if count >= submit.max_tokens else None
            if count == 1:
                yield Prefilled(len(submit.prompt), len(submit.prompt), cached)
            (likely,) = likeliest([Row(token, logprobs, self._generation.wanted(finish))])
            item = self._generation.item(token, likely, finish)
            if finish is not None or isinstance(item, Failed):
                self.close()
                yield item
                return
            self._tokens.append(token)
            yield item

    def close(self) -> None:
        """End the sequence and keep its KV cache, where its kind can be cut to the tokens it has read."""
        size = mlx.close_alone(self._drawn, self._cache if self._prefixes is not None else [], len(self._tokens))
        if self._prefixes is not None and size is not None:
            system = self._generation.submit.system
            self._prefixes.insert(self._loaded.key, self._tokens[:size], self._cache, system=system)
