"""One resident model in the engine: its continuous batch, and the sequences that must run alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import (
    BatchGenerator,
    StopSequences,
    generate_step,
    make_text_state_machine,
    speculative_generate_step,
)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.processors import load_processor
from mlx_lm.utils import load_adapters, load_model, load_tokenizer, sharded_load

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import Item, Load, Options, Prefilled, Sampled, Submit
from mlx_overlay_server.engine.prefix_cache import Cache, PrefixCache
from mlx_overlay_server.engine.sampling import Choice, Guarded, Matcher, choice, processors, sampler
from mlx_overlay_server.errors import Failed

LONG_PROMPTS = 8
"""Prompts that are read at the full prefill step at once. More of them share it: what is read takes memory."""
SLICE_BYTES = 1 << 28
"""Weights that are read between two steps of other models."""


def load(command: Load, options: Options, group: Any, prefixes: PrefixCache) -> Iterator[Runner | None]:
    """Load a model slice by slice: None until it is there. Raises what mlx-lm raises."""
    path = Path(command.path)
    config_extra = {"trust_remote_code": options.trust_remote_code}
    draft = None
    if group is not None:
        model, tokenizer, config = sharded_load(
            command.path,
            pipeline_group=group if options.is_pipeline else None,
            tensor_group=None if options.is_pipeline else group,
            return_config=True,
            tokenizer_config=config_extra,
            trust_remote_code=options.trust_remote_code,
        )
    else:
        model, config = load_model(path, lazy=True, trust_remote_code=options.trust_remote_code)
        if command.adapter_path is not None:
            model = load_adapters(model, command.adapter_path)
            model.eval()
        if command.draft_path is not None:
            draft, _ = load_model(Path(command.draft_path), lazy=True, trust_remote_code=options.trust_remote_code)
        with ThreadPoolExecutor(1, "tokenizer") as executor:
            loading = executor.submit(load_tokenizer, path, config_extra, config.get("eos_token_id"))
            for part in _slices([model, *([draft] if draft is not None else [])]):
                mx.eval(part)
                yield None
            while not wait([loading], timeout=0.005).done:
                yield None
            tokenizer = loading.result()
    tokenizer.model_max_length = 1 << 60  # transformers would warn of long prompts in the log; the server refuses them
    tokenizer.encode("")  # the first call may change the tokenizer's settings, later ones come from several threads
    loaded = Loaded(
        key=command.key,
        path=command.path,
        tokenizer=tokenizer,
        machine=make_text_state_machine(tokenizer),
        longest_token=max(map(len, tokenizer.get_vocab()), default=1),
        nbytes=sum(part.nbytes for each in (model, draft) if each is not None for part in _parameters(each)),
        vocab_size=_vocab_size(config, tokenizer),
        context=_context(config),
        defaults=_generation_config(path),
        processor=load_processor(model, config) if group is None else None,
    )
    yield Runner(loaded, model, draft, options, prefixes)


def _parameters(model: Any) -> list[mx.array]:
    return [value for _, value in tree_flatten(model.parameters())]


def _slices(models: Iterable[Any]) -> Iterator[list[mx.array]]:
    part: list[mx.array] = []
    size = 0
    for model in models:
        for value in _parameters(model):
            part.append(value)
            size += value.nbytes
            if size >= SLICE_BYTES:
                yield part
                part, size = [], 0
    yield part


def _vocab_size(config: dict[str, Any], tokenizer: Any) -> int:
    """Columns of the logits."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size or len(tokenizer))


def _context(config: dict[str, Any]) -> int | None:
    for part in (config, config.get("text_config", {})):
        for name in ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions"):
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def _generation_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Sequence:
    """What the runner knows of a sequence beside its tokens."""

    def __init__(self, submit: Submit, cached: int, guarded: Guarded) -> None:
        self.submit = submit
        self.cached = cached
        self.guarded = guarded
        self.wants = submit.params.logprobs

    def sampled(self, token: int, logprobs: mx.array, finish: str | None) -> Item:
        if self.guarded.problem is not None and finish != "stop":
            return Failed(self.guarded.problem)
        if self.wants is None or finish == "stop":
            return Sampled(token, None, (), finish)
        top: tuple[tuple[int, float], ...] = ()
        if self.wants:
            count = min(self.wants, logprobs.shape[-1])
            best = mx.argpartition(-logprobs, kth=count - 1)[:count]
            ids: Any = best.tolist()
            values: Any = logprobs[best].tolist()
            top = tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0])))
        value: Any = logprobs[token].item()
        return Sampled(token, float(value), top, finish)


class Runner:
    """Steps everything that one model generates."""

    def __init__(self, loaded: Loaded, model: Any, draft: Any, options: Options, prefixes: PrefixCache) -> None:
        self.loaded = loaded
        self._model = model
        self._draft = draft
        self._options = options
        self._prefixes = prefixes
        self._eos = StopSequences([(token,) for token in loaded.tokenizer.eos_token_ids])
        self._stream = mx.default_stream(mx.default_device())
        self._can_batch = (
            draft is None and options.kv_bits is None and all(hasattr(c, "merge") for c in make_prompt_cache(model))
        )
        self._can_trim = all(c.is_trimmable() for c in make_prompt_cache(model))
        self.reset()

    def reset(self) -> None:
        """Drop every sequence; the model stays."""
        self._shared: BatchGenerator | None = None
        self._sequences: dict[int, _Sequence] = {}
        """Of the shared batch, by BatchGenerator's uid."""
        self._uids: dict[int, int] = {}
        self._alone: dict[int, _Alone] = {}
        self._unread: set[int] = set()
        """Of the shared batch: those whose prompts are not read to the end, by uid."""

    def close(self) -> None:
        """Drop the model, too."""
        self.reset()
        self._prefixes.drop(self.loaded.key)
        del self._model, self._draft

    @property
    def is_busy(self) -> bool:
        return bool(self._sequences or self._alone)

    @property
    def active(self) -> int:
        return len(self._sequences) + len(self._alone) - self.waiting

    @property
    def waiting(self) -> int:
        return max(0, len(self._sequences) - self._options.batch_size)

    def add(self, submit: Submit) -> None:
        """Take on a sequence. Raises what mlx-lm raises on parameters it does not like."""
        chosen = choice(submit.params, self.loaded.defaults, self.loaded.vocab_size)
        matcher: Matcher | None = submit.matcher
        if matcher is None and submit.constraint is not None:
            matcher = Matcher(submit.constraint, self.loaded.grammar_tokenizer)
        # A seed promises the same text whatever else runs. A batch and a reused KV cache round differently, so the
        # sequence runs by itself, from its first token.
        is_seeded = submit.params.seed is not None and chosen.temperature > 0
        if not self._can_batch or submit.images or is_seeded:
            self._alone[submit.id] = self._start_alone(submit, chosen, matcher, may_reuse=not is_seeded)
            return
        cache, cached = self._prefixes.fetch(self.loaded.key, submit.prompt)
        prompt = list(submit.prompt)
        # Where a cache cannot be cut later, one is kept of the part that other conversations share.
        cut = submit.system if not self._can_trim and cached < submit.system < len(prompt) else cached
        steps = processors(submit.params, chosen, prompt, matcher=matcher, budget=submit.budget)
        guarded = Guarded(steps, matcher)
        (uid,) = self._batch.insert_segments(
            segments=[[prompt[cached:cut], prompt[cut:]]],
            max_tokens=[submit.max_tokens],
            caches=[cache],
            all_tokens=[prompt[:cached]],
            samplers=[sampler(chosen, None)],
            logits_processors=[[guarded] if steps else []],
            stop_sequences=[self._eos],
        )
        self._sequences[uid] = _Sequence(submit, cached, guarded)
        self._uids[submit.id] = uid
        self._unread.add(uid)

    @property
    def _batch(self) -> BatchGenerator:
        if self._shared is None:
            self._shared = BatchGenerator(
                self._model,
                completion_batch_size=self._options.batch_size,
                prefill_batch_size=self._options.batch_size,
                prefill_step_size=self._options.prefill_step,
                stream=self._stream,
            )
        return self._shared

    def cancel(self, id_: int) -> None:
        """Drop a sequence, keeping the KV cache it has got so far."""
        if (alone := self._alone.pop(id_, None)) is not None:
            alone.close()
        elif (uid := self._uids.pop(id_, None)) is not None:
            sequence = self._sequences.pop(uid)
            self._unread.discard(uid)
            for cache, tokens in self._batch.remove([uid], return_prompt_caches=True).values():
                if cache is not None and len(tokens) > sequence.cached:
                    self._keep(sequence, cache, tokens)

    def step(self) -> list[tuple[int, Item]]:
        """One token, or one piece of its prompt, for each sequence."""
        made: list[tuple[int, Item]] = []
        if self._sequences:
            self._step_batch(made)
        for id_, alone in list(self._alone.items()):
            try:
                item = next(alone.items)
            except Exception as error:  # noqa: BLE001 - alone, it harms no other
                item = Failed(f"the engine failed: {type(error).__name__}")
            made.append((id_, item))
            if isinstance(item, Failed) or (isinstance(item, Sampled) and item.finish is not None):
                del self._alone[id_]
        return made

    def _step_batch(self, made: list[tuple[int, Item]]) -> None:
        share = max(1, min(len(self._unread), self._options.batch_size) // LONG_PROMPTS)
        self._batch.prefill_step_size = max(1, self._options.prefill_step // share)
        prompts, sampled = self._batch.next()
        for part in prompts:
            sequence = self._sequences[part.uid]
            if part.end_of_prompt:
                self._unread.discard(part.uid)
            done, total = part.progress
            made.append(
                (sequence.submit.id, Prefilled(sequence.cached + done, sequence.cached + total, sequence.cached))
            )
            if part.end_of_segment and not part.end_of_prompt and not self._can_trim:
                for cache, tokens in self._batch.extract_cache([part.uid]).values():
                    if len(tokens) == sequence.submit.system:
                        self._keep(sequence, cache, tokens)
        for row in sampled:
            sequence = self._sequences[row.uid]
            item = sequence.sampled(row.token, row.logprobs, row.finish_reason)
            made.append((sequence.submit.id, item))
            if row.finish_reason is not None:
                self._keep(sequence, row.prompt_cache, row.all_tokens)
            elif isinstance(item, Failed):
                self._batch.remove([row.uid])
            else:
                continue
            del self._sequences[row.uid], self._uids[sequence.submit.id]

    def _keep(self, sequence: _Sequence, cache: Cache, tokens: list[int]) -> None:
        self._prefixes.insert(self.loaded.key, tokens, cache, system=sequence.submit.system)

    def _start_alone(self, submit: Submit, chosen: Choice, matcher: Matcher | None, *, may_reuse: bool) -> _Alone:
        cache, cached = None, 0
        # A grammar and a budget keep count of tokens, and cannot take back what a draft model guessed.
        has_draft = self._draft is not None and submit.constraint is None and submit.budget is None
        may_reuse = may_reuse and not submit.images and has_draft == (self._draft is not None)
        if may_reuse:
            cache, cached = self._prefixes.fetch(self.loaded.key, submit.prompt)
        if cache is None:
            cache = make_prompt_cache(self._model)
            if has_draft:
                cache += make_prompt_cache(self._draft)
        rest = list(submit.prompt[cached:])
        options = self._options
        unseen = len(submit.prompt) - 1 if has_draft else cached  # speculative decoding shows processors no prompt
        steps = processors(submit.params, chosen, submit.prompt, cached=unseen, matcher=matcher, budget=submit.budget)
        guarded = Guarded(steps, matcher)
        shared = {
            "max_tokens": submit.max_tokens,
            "sampler": sampler(chosen, submit.params.seed),
            "logits_processors": [guarded] if steps else [],
            "prompt_cache": cache,
            "prefill_step_size": options.prefill_step,
            "kv_bits": options.kv_bits,
            "kv_group_size": options.kv_group_size,
            "quantized_kv_start": options.quantized_kv_start,
            "stream": self._stream,
        }
        if has_draft:
            drawn = speculative_generate_step(
                mx.array(rest), self._model, self._draft, num_draft_tokens=options.num_draft_tokens, **shared
            )
        else:
            embeddings = None
            if submit.images:
                embeddings = self._model.embed_inputs(mx.array(rest), pixel_values=list(submit.images))
                mx.eval(embeddings)
            drawn = generate_step(mx.array(rest), self._model, input_embeddings=embeddings, **shared)
        keep = self._prefixes if may_reuse else None
        return _Alone(self.loaded, _Sequence(submit, cached, guarded), drawn, cache, keep)


class _Alone:
    """A sequence that runs by itself."""

    def __init__(
        self,
        loaded: Loaded,
        sequence: _Sequence,
        drawn: Iterator[tuple[Any, ...]],
        cache: Cache,
        keep: PrefixCache | None,
    ) -> None:
        self._loaded = loaded
        self._sequence = sequence
        self._drawn = drawn
        self._cache = cache
        self._keep = keep
        self._tokens = list(sequence.submit.prompt)
        self.items = self._run()

    def _run(self) -> Iterator[Item]:
        submit, cached = self._sequence.submit, self._sequence.cached
        yield Prefilled(cached, len(submit.prompt), cached)
        eos = self._loaded.tokenizer.eos_token_ids
        for count, (token, logprobs, *_) in enumerate(self._drawn, 1):
            token = int(token)
            finish = "stop" if token in eos else "length" if count >= submit.max_tokens else None
            if count == 1:
                yield Prefilled(len(submit.prompt), len(submit.prompt), cached)
            item = self._sequence.sampled(token, logprobs, finish)
            if finish is not None or isinstance(item, Failed):
                self.close()
                yield item
                return
            self._tokens.append(token)
            yield item

    def close(self) -> None:
        """End it, keeping its KV cache."""
        self._drawn.close()  # type: ignore[attr-defined]  # a generator: speculative decoding rewinds its caches now
        if self._keep is None or not self._cache:
            return
        if not all(hasattr(layer, "offset") and layer.is_trimmable() for layer in self._cache):
            return
        size = min(*(layer.offset for layer in self._cache), len(self._tokens))
        for layer in self._cache:  # a draft model's may be a token ahead
            layer.trim(layer.offset - size)
        self._keep.insert(self._loaded.key, self._tokens[:size], self._cache, system=self._sequence.submit.system)
