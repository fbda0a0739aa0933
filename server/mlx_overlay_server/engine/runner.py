"""One resident model in the engine: its continuous batch, and beside it the sequences that must run alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import StopSequences

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.alone import LEAST_PIECE, Alone
from mlx_overlay_server.engine.arrays import Tokens
from mlx_overlay_server.engine.commands import Encode, Item, Prefilled, Submit
from mlx_overlay_server.engine.generation import Generation, matcher_of
from mlx_overlay_server.engine.likely import Likely, Row, likeliest
from mlx_overlay_server.engine.looking import NO_LOOK, Look
from mlx_overlay_server.engine.mlx import Cache
from mlx_overlay_server.engine.mlx_batch import Batch
from mlx_overlay_server.engine.pace import Pace
from mlx_overlay_server.engine.prefill import LEAST_SHARED, NOTHING, Pass, Prompt, plan, rank
from mlx_overlay_server.engine.prefix_cache import PrefixCache, agree, common
from mlx_overlay_server.engine.ranks import slowest
from mlx_overlay_server.engine.sampling import Sampler, Sampling, effective, sampler
from mlx_overlay_server.engine.vision import SeeingModel
from mlx_overlay_server.errors import Failed
from mlx_overlay_server.memory import Images
from mlx_overlay_server.settings import EngineOptions

_MOST_STOPS = 4
"""Stops of one prompt: each ends a pass early."""


@dataclass(slots=True)
class _Sequence:
    """A sequence that waits for the batch, or is in it."""

    generation: Generation
    sampler: Sampler
    tokens: Tokens
    """What is read before anything is drawn: the prompt, and after a pause the answer so far."""
    prompt: Prompt
    uid: int | None = None
    """The batch's number for it; None while it is not in the batch."""
    base: int = 0
    """Tokens in its KV cache when it was last put into the batch."""
    cache: Cache | None = None
    """Of what is read, when it was taken out of the batch."""
    drawn: int = 0
    """Tokens of its answer that are in `tokens`: those it had when it was paused last."""
    is_told: bool = False
    """Whether its client knows that the prompt is read."""


class Runner:
    """Steps everything that one model generates."""

    def __init__(
        self,
        loaded: Loaded,
        model: Any,
        draft: Any,
        options: EngineOptions,
        prefixes: PrefixCache,
        *,
        fits: Callable[[int], int] = lambda _: 1 << 30,
        look: Look = NO_LOOK,
        group: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`draft`: the model for speculative decoding, or None; `prefixes` is shared with the other models.

        `fits`: (tokens that come before) -> tokens that a pass may read, for the memory that it computes with.
        `look`: what it takes to look at images.
        `group`: MLX's group of the ranks that run the same, or None; `clock` gives seconds.
        """
        self.loaded = loaded
        self._model = model
        self._draft = draft
        self._options = options
        self._prefixes = prefixes
        self._eos = StopSequences([(token,) for token in loaded.tokenizer.eos_token_ids])
        self._stream = mx.default_stream(mx.default_device())
        self._can_batch = draft is None and options.kv_bits is None and mlx.can_batch(model)
        self._can_trim = mlx.can_cut(model)
        self._fits = fits
        self._look = look
        self._group = group
        self._clock = clock
        self._pace = Pace(options.prefill_step, options.max_stall_ms / 1000)
        self.reset()

    def reset(self) -> None:
        """Drop every sequence; the model stays."""
        if isinstance(self._model, SeeingModel):
            self._model.seen.forget()  # some of it may be among what was not computed
        self._made: Batch | None = None
        self._sequences: dict[int, _Sequence] = {}
        """By id, those that are in the batch or wait for it."""
        self._ids: dict[int, int] = {}
        """The batch's number -> id, of those in the batch."""
        self._unread: dict[int, Prompt] = {}
        """By id, the prompts that are not read to the end, or that are and whose sequence is not in the batch yet."""
        self._paused: dict[int, _Sequence] = {}
        """By id, the sequences that wait until there is memory to go on."""
        self._is_alone_next = False
        self._read = 0
        """Tokens of prompts that were read so far."""
        self._alone = Alone(
            self.loaded, self._model, self._draft, self._options, self._prefixes, self._stream, self._fits
        )

    def close(self) -> None:
        """Drop the model, too."""
        self.reset()
        self._prefixes.drop(self.loaded.key)
        if self._prefixes.disk is not None:
            self._prefixes.disk.forget(self.loaded.key)
        del self._alone, self._model, self._draft

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._alone)

    @property
    def active(self) -> int:
        """Sequences that read their prompts or generate."""
        return len(self._sequences) + len(self._alone) - self.waiting

    @property
    def generating(self) -> int:
        """Sequences that get a token in each step."""
        return len(self._sequences) - len(self._unread) + len(self._alone)

    @property
    def waiting(self) -> int:
        """Sequences that the batch has no room for yet."""
        return max(0, len(self._sequences) - self._options.batch_size)

    def add(self, submit: Submit | Encode) -> None:
        """Take on a sequence, or a paused one again. Raises what mlx-lm raises on parameters it does not like."""
        if (paused := self._paused.pop(submit.id, None)) is not None:
            self._enter(paused)
            return
        if self._alone.resume(submit.id):
            return
        if isinstance(submit, Encode):
            raise ValueError("the model neither embeds nor ranks")
        sampling = self._sampling(submit)
        if self.runs_alone(submit):
            is_seeded = _is_seeded(submit, sampling)
            self._alone.add(submit, sampling, matcher_of(submit, self.loaded), is_seeded=is_seeded)
        else:
            self._add_to_batch(submit, sampling)

    def runs_alone(self, submit: Submit | Encode) -> bool:
        """Return whether a sequence runs beside the batch."""
        if isinstance(submit, Encode):
            return False
        is_scored = submit.params.prompt_logprobs is not None  # which a batch does not compute
        return not self._can_batch or bool(submit.images) or is_scored or _is_seeded(submit, self._sampling(submit))

    def images(self, submit: Submit | Encode) -> Images:
        """Return what the images of a prompt take."""
        if isinstance(submit, Encode) or not (submit.images or submit.shown):
            return Images()
        shown = submit.shown.arrays.items() if submit.shown is not None else ()
        pixels = [array for name, array in shown if "pixel" in name]
        return self._look.takes(len(submit.prompt), (*submit.images, *pixels))

    def _sampling(self, submit: Submit) -> Sampling:
        return effective(submit.params, self.loaded.defaults, self.loaded.vocab_size)

    def _add_to_batch(self, submit: Submit, sampling: Sampling) -> None:
        if not submit.prompt or submit.max_tokens <= 0:
            raise ValueError("nothing to read, or nothing to generate")
        generation = Generation(submit, sampling, matcher_of(submit, self.loaded), cached=0, ends=self.loaded.ends)
        tokens = np.asarray(submit.prompt, dtype=np.int64)
        prompt = Prompt(submit.id, len(tokens), rank=0)
        self._enter(_Sequence(generation, sampler(sampling, None), tokens, prompt))

    def _enter(self, sequence: _Sequence) -> None:
        """Let a sequence wait until its tokens are read."""
        submit, prompt, tokens = sequence.generation.submit, sequence.prompt, sequence.tokens
        self._share(prompt, tokens)
        prompt.done = self._known(tokens)
        prompt.rank = rank(self._read, prompt.size - prompt.done)
        if not self._can_trim and prompt.done < submit.system < prompt.size:  # what is kept later cannot be cut there
            prompt.stops.append(submit.system)
        self._sequences[submit.id] = sequence
        self._unread[submit.id] = prompt

    def pause(self, id_: int) -> bool:
        """Free the memory of a sequence, whose tokens are read again after `add`; False where its kind cannot wait."""
        if (sequence := self._sequences.get(id_)) is None:
            return self._alone.pause(id_)
        if sequence.uid is not None and id_ in self._unread:
            self._drop(sequence, sequence.uid)
        elif sequence.uid is not None:
            tokens = self._take_out(sequence, sequence.uid)
            sequence.drawn += len(tokens) - len(sequence.tokens)
            sequence.tokens = np.asarray(tokens, dtype=np.int64)
        sequence.generation.guarded.draw_again()
        sequence.cache = None
        sequence.prompt = Prompt(id_, len(sequence.tokens), rank=0)
        self._paused[id_] = self._sequences.pop(id_)
        self._unread.pop(id_, None)
        return True

    def _share(self, prompt: Prompt, tokens: Tokens) -> None:
        """Note what a new prompt has in common with others, and keep the KV cache of what is read of it already."""
        best: tuple[int, _Sequence | None] = (0, None)
        for other in self._sequences.values():
            if not agree(tokens, other.tokens, at=LEAST_SHARED - 1):
                continue
            shared = min(common(tokens, other.tokens), prompt.size - 1, other.prompt.size - 1)
            if shared < LEAST_SHARED:
                continue
            if shared > other.prompt.done and self._can_share(prompt, other, shared):
                prompt.shared[other.prompt.id] = other.prompt.shared[prompt.id] = shared
            if other.prompt.has_begun:
                best = max(best, (min(shared, other.prompt.done), other), key=lambda pair: pair[0])
        size, source = best
        if source is not None and size - self._known(tokens) >= LEAST_SHARED:
            self._keep_head(source, size)

    def _can_share(self, prompt: Prompt, other: _Sequence, size: int) -> bool:
        """Return whether two prompts can share so many tokens: a KV cache that cannot be cut is kept exactly there."""
        if self._can_trim:
            return True
        both = (prompt.stops, other.prompt.stops)
        if any(size not in stops and len(stops) >= _MOST_STOPS for stops in both):
            return False
        for stops in both:
            if size not in stops:
                stops.append(size)
        if other.uid is not None:
            self._take_out(other, other.uid)  # the batch would read past the stop
        return True

    def _keep_head(self, sequence: _Sequence, size: int) -> None:
        """Keep the KV cache of the first `size` tokens that a sequence has read, where it can be cut."""
        if not self._can_trim:
            return
        cache, count = sequence.cache, sequence.prompt.done
        if sequence.uid is not None:
            cache, tokens = self._batch.extract(sequence.uid)
            count = len(tokens)
        if cache is not None and (part := mlx.head(cache, dropping=count - size)) is not None:
            self._keep(sequence, part, sequence.tokens[:size].tolist())

    def _known(self, tokens: Tokens) -> int:
        """Return how many tokens at a prompt's start need not be read."""
        return self._prefixes.known(self.loaded.key, tokens)

    @property
    def _batch(self) -> Batch:
        """The batch, made when it is needed."""
        if self._made is None:
            options = self._options
            self._made = Batch(
                self._model, size=options.batch_size, prefill_step=options.prefill_step, stream=self._stream
            )
        return self._made

    def cancel(self, id_: int) -> None:
        """Drop a sequence, keeping the KV cache it has got so far; nothing for one that has ended."""
        if self._paused.pop(id_, None) is not None:
            return
        if self._alone.cancel(id_) or (sequence := self._sequences.pop(id_, None)) is None:
            return
        is_unread = self._unread.pop(id_, None) is not None
        tokens: list[int] = sequence.tokens[: sequence.prompt.done].tolist()
        if sequence.uid is not None and is_unread and not self._prefixes.would_keep(self.loaded.kv.nbytes(len(tokens))):
            self._drop(sequence, sequence.uid)  # taking it out copies it
        elif sequence.uid is not None:
            tokens = self._take_out(sequence, sequence.uid)
        if sequence.cache is not None and len(tokens) > sequence.generation.cached:
            self._keep(sequence, sequence.cache, tokens)

    def step(self) -> list[tuple[int, Item]]:
        """Return a token for each sequence that generates, and what was read of prompts, as (id, item).

        Where the batch has prompts to read, and sequences beside it as well, they take turns: all others wait for it.
        """
        self._is_alone_next = self._alone.is_reading and not (self._unread and self._is_alone_next)
        made = self._step_batch(may_read=not self._is_alone_next) if self._sequences else []
        if self._made is not None:  # by now nothing that the step has made holds what the batch was before
            self._made.settle()
        return made + self._alone.step(may_read=self._is_alone_next)

    def _step_batch(self, *, may_read: bool) -> list[tuple[int, Item]]:
        """Read of the prompts, if that may be, and then draw a token for each sequence that generates."""
        self._batch.expect(len(self._sequences))
        chosen = self._arrange() if may_read and self._unread else NOTHING
        started = self._clock()
        made, reading = self._read_prompts(chosen) if chosen.ids else ([], 0.0)
        if len(self._sequences) == len(self._unread):
            return made
        drawn = self._batch.draw()
        if drawn:
            # What it takes to join the batch counts, too: where that is much, more prompts are read, and join, at once.
            seconds = slowest(self._clock() - started - reading, self._group)
            self._pace.note_decode(seconds, len(self._sequences) - len(self._unread))
        told = likeliest([self._row(row) for row in drawn])
        return made + [self._note_drawn(row, likely) for row, likely in zip(drawn, told, strict=True)]

    def _arrange(self) -> Pass:
        """Plan what is read next, and have the batch hold these prompts and no others: it reads of all in it."""
        decoding = len(self._sequences) - len(self._unread)
        chosen = plan(
            self._unread.values(),
            slots=self._options.batch_size - decoding,
            room=partial(self._room, is_decoding=decoding > 0),
        )
        for id_ in self._unread.keys() - set(chosen.ids):
            if (uid := self._sequences[id_].uid) is not None:
                self._take_out(self._sequences[id_], uid)
        for id_ in chosen.ids:
            if self._sequences[id_].uid is None:
                self._put_in(self._sequences[id_])
            if self._sequences[id_].prompt.left == 0:
                del self._unread[id_]
        return chosen

    def _read_prompts(self, chosen: Pass) -> tuple[list[tuple[int, Item]], float]:
        """Read what was planned. A prompt that is read to its end generates from now on.

        Returns what came of it, and the seconds that reading alone took.
        """
        self._batch.wait()  # or reading would seem to take as long as what is drawn meanwhile does, too
        started = self._clock()
        made = [item for part in self._batch.read(chosen.tokens) for item in self._note_read(part)]
        seconds = self._clock() - started
        self._pace.note_read(chosen.size, chosen.context, slowest(seconds, self._group))
        if any(id_ not in self._unread for id_ in chosen.ids):
            made += [item for part in self._batch.begin() for item in self._note_read(part)]
        return made, seconds

    def _room(self, context: int, *, is_decoding: bool) -> int:
        """Return how many tokens a pass may read after so many others."""
        return min(self._pace.room(context, is_decoding=is_decoding), max(LEAST_PIECE, self._fits(context)))

    def _put_in(self, sequence: _Sequence) -> None:
        """Put a sequence into the batch: a new one, or one that was taken out."""
        generation, submit = sequence.generation, sequence.generation.submit
        sequence.prompt.has_begun = True
        cache, done = sequence.cache, sequence.prompt.done
        tokens: list[int] = sequence.tokens.tolist()
        if cache is None:
            cache, done = self._prefixes.fetch(self.loaded.key, tokens)
            sequence.prompt.done = done
            if not sequence.is_told:
                generation.cached = done
        uid = self._batch.insert(
            sequence.prompt.segments(tokens),
            submit.max_tokens - sequence.drawn,
            cache=cache,
            read=tokens[:done],
            sampler=sequence.sampler,
            processors=generation.processors,
            stops=self._eos,
        )
        generation.guarded.read_last = lambda _: self._batch.current(uid)
        sequence.uid, sequence.base, sequence.cache = uid, done, None
        self._ids[uid] = submit.id

    def _drop(self, sequence: _Sequence, uid: int) -> None:
        """Drop a sequence from the batch, with its KV cache."""
        self._batch.remove(uid)
        del self._ids[uid]
        sequence.uid = None

    def _take_out(self, sequence: _Sequence, uid: int) -> list[int]:
        """Take a sequence out of the batch, with its KV cache. Returns the tokens in that."""
        cache, tokens = self._batch.take_out(uid)
        del self._ids[uid]
        sequence.uid, sequence.cache = None, cache
        return tokens

    def _note_read(self, part: Any) -> list[tuple[int, Item]]:
        """Note a piece of a prompt that the batch has read: BatchGenerator's response for it."""
        sequence = self._sequences[self._ids[part.uid]]
        prompt, generation = sequence.prompt, sequence.generation
        done = sequence.base + part.progress[0]
        before, prompt.done = prompt.done, done
        self._read += done - before
        if done in prompt.stops:
            prompt.stops.remove(done)
            self._keep(sequence, *self._batch.extract(part.uid))
        if done >= prompt.size - 1:
            self._unread.pop(prompt.id, None)
        self._hand_on(sequence, before)
        if sequence.is_told:
            return []
        sequence.is_told = done == prompt.size
        return [(prompt.id, Prefilled(done, prompt.size, generation.cached))]

    def _hand_on(self, sequence: _Sequence, before: int) -> None:
        """Keep what a prompt has read since it had `before` tokens and others wait for, and tell them."""
        prompt = sequence.prompt
        sizes = {id_: size for id_, size in prompt.shared.items() if before < size <= prompt.done}
        waiting = [id_ for id_ in sizes if id_ in self._unread and not self._unread[id_].has_begun]
        if waiting:
            self._keep_head(sequence, max(sizes[id_] for id_ in waiting))
        for id_ in waiting:
            self._unread[id_].done = self._known(self._sequences[id_].tokens)

    def _row(self, row: Any) -> Row:
        generation = self._sequences[self._ids[row.uid]].generation
        return Row(row.token, row.logprobs, generation.wanted(row.finish_reason))

    def _note_drawn(self, row: Any, likely: Likely | None) -> tuple[int, Item]:
        """Note a token that the batch has drawn: BatchGenerator's response for it."""
        id_ = self._ids[row.uid]
        sequence = self._sequences[id_]
        item = sequence.generation.item(row.token, likely, row.finish_reason)
        if row.finish_reason is not None:
            self._keep(sequence, row.prompt_cache, row.all_tokens)
        elif isinstance(item, Failed):
            self._batch.remove(row.uid)
        else:
            return id_, item
        del self._sequences[id_], self._ids[row.uid]
        return id_, item

    def _keep(self, sequence: _Sequence, cache: Cache, tokens: list[int]) -> None:
        submit = sequence.generation.submit
        if submit.keeps_cache:
            self._prefixes.insert(self.loaded.key, tokens, cache, system=submit.system)


def _is_seeded(submit: Submit, sampling: Sampling) -> bool:
    """Return whether a seed promises the same text whatever else runs.

    A batch and a reused KV cache round differently, so the sequence runs by itself, from its first token.
    """
    return submit.params.seed is not None and sampling.temperature > 0
