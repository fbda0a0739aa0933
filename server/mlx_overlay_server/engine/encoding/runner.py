"""One resident model in the engine that embeds or ranks: it reads texts in passes of about the same length."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_overlay_server.encoding.loaded import LoadedEncoder, Passage
from mlx_overlay_server.engine.commands import Encode, Encoded, Item, Submit
from mlx_overlay_server.engine.encoding.causal import Causal
from mlx_overlay_server.engine.encoding.parts import Batch, batch_of
from mlx_overlay_server.engine.encoding.pooling import Pooling
from mlx_overlay_server.engine.encoding.queue import Place, Queue
from mlx_overlay_server.engine.mlx import Cache
from mlx_overlay_server.engine.pace import Pace
from mlx_overlay_server.memory import Images
from mlx_overlay_server.settings import EngineOptions

Row = npt.NDArray[np.float32]

LEAST_PART = 256
"""Tokens of a part of a text that is read in parts: of fewer, the parts would cost more than they are worth."""
LEAST_LANE = 64
"""Tokens for each core that reads a part of a pass: of fewer, it would cost more than it is worth."""
MOST_LANES = 4
"""Cores that read the texts of one pass together, at most."""


class Model(Protocol):
    """An encoder, or a model of mlx-lm."""

    def hidden(self, batch: Batch) -> mx.array: ...
    def scores(self, hidden: mx.array, batch: Batch) -> mx.array: ...


@cache
def other_streams() -> tuple[Any, ...]:
    """Return the streams beside the usual one in which a processor reads texts: MLX has a thread for each stream."""
    if mx.default_device() != mx.Device(mx.cpu):
        return ()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(min(MOST_LANES, cores) - 1))


@dataclass(slots=True)
class _Request:
    """A request some of whose texts are not read yet."""

    texts: tuple[Passage, ...]
    rows: dict[int, Row]
    """What was made of those that are read, by their index."""


@dataclass(slots=True)
class _Long:
    """A text that is read in parts, since it is longer than a pass."""

    place: Place
    text: Passage
    cache: Cache = field(default_factory=list)
    """Made with the first part."""
    done: int = 0
    parts: list[mx.array] = field(default_factory=list)
    """The hidden states of what is read."""


class EncodingRunner:
    """Reads all texts that one model embeds or ranks."""

    def __init__(
        self,
        loaded: LoadedEncoder,
        model: Model,
        pooling: Pooling | None,
        options: EngineOptions,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`pooling`: how the model embeds; None: it ranks. `clock` gives seconds."""
        self.loaded = loaded
        self._model = model
        self._pooling = pooling
        self._clock = clock
        self._pace = Pace(options.prefill_step, options.max_stall_ms / 1000)
        self.reset()

    def reset(self) -> None:
        """Drop every request; the model stays."""
        self._queue = Queue()
        self._requests: dict[int, _Request] = {}
        self._long: deque[_Long] = deque()
        """Texts that are read in parts, one after the other."""
        self._is_long_next = False

    def close(self) -> None:
        """Drop the model, too."""
        self.reset()
        del self._model, self._pooling

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    @property
    def active(self) -> int:
        """Requests whose texts are being read."""
        return len(self._requests)

    @property
    def generating(self) -> int:
        """Sequences that get a token in each step: none."""
        return 0

    @property
    def waiting(self) -> int:
        """Requests that there is no room for: none, since their texts take turns."""
        return 0

    def runs_alone(self, _: Encode | Submit) -> bool:
        """Return that no text runs beside a batch."""
        return False

    def images(self, _: Encode | Submit) -> Images:
        """Return what images take: there are none."""
        return Images()

    def add(self, command: Encode | Submit) -> None:
        """Take on a request. Raises ValueError for one that is not for such a model."""
        if not isinstance(command, Encode):
            raise ValueError("the model generates no text")
        self._requests[command.id] = _Request(command.texts, {})
        self._queue.add(command.id, [len(text.tokens) for text in command.texts])

    def pause(self, id_: int) -> bool:  # noqa: ARG002 - a request holds no memory from step to step
        """Free the memory of a request: there is none."""
        return False

    def cancel(self, id_: int) -> None:
        """Drop a request; nothing for one that has ended."""
        self._requests.pop(id_, None)
        self._queue.drop(id_)
        self._long = deque(long for long in self._long if long.place[0] != id_)

    def step(self) -> list[tuple[int, Item]]:
        """Read some texts, and return the results of the requests that are done with it, as (id, item).

        A text that is read in parts and all others take turns.
        """
        is_long = bool(self._long) and (self._is_long_next or not self._queue)
        self._is_long_next = not is_long
        if is_long:
            return self._read_part(self._long[0])
        room = self._room(0)
        chosen = self._queue.next(room)
        texts = [self._text(place) for place in chosen]
        if isinstance(self._model, Causal) and len(texts[0].tokens) > max(room, LEAST_PART):
            self._long.append(_Long(chosen[0], texts[0]))
            return self._read_part(self._long[0])
        started = self._clock()
        rows = self._read(texts)
        self._pace.note_read(len(texts) * len(texts[0].tokens), 0, self._clock() - started)
        return self._note(chosen, rows)

    def _read(self, texts: list[Passage]) -> Row:
        """Return the vector, or the score, of each text, computed; on a processor, by several of its cores."""
        tokens = sum(len(text.tokens) for text in texts)
        lanes = 1
        if not isinstance(self._model, Causal):
            lanes = min(1 + len(other_streams()), len(texts), 1 + tokens // LEAST_LANE)
        made = []
        for lane in range(lanes):
            with mx.stream(other_streams()[lane - 1]) if lane else nullcontext():
                batch = batch_of(texts[lane::lanes])
                made.append(self._computed(self._model.hidden(batch), batch))
        mx.eval(made)
        rows = np.empty((len(texts), made[0].shape[-1]), np.float32)
        for lane, part in enumerate(made):
            rows[lane::lanes] = np.array(part)
        return rows

    def _read_part(self, long: _Long) -> list[tuple[int, Item]]:
        """Read the next part of a text, and make its vector of all parts after the last."""
        assert isinstance(self._model, Causal)  # noqa: S101 - only theirs can be read in parts
        started = self._clock()
        long.cache = long.cache or self._model.make_cache()
        size = max(self._room(long.done), LEAST_PART)
        part = Passage(long.text.tokens[long.done : long.done + size], long.text.first)
        hidden = self._model.hidden(batch_of([part]), long.cache)
        mx.eval(hidden, [layer.state for layer in long.cache])
        long.parts.append(hidden)
        self._pace.note_read(len(part.tokens), long.done, self._clock() - started)
        long.done += len(part.tokens)
        if long.done < len(long.text.tokens):
            return []
        self._long.popleft()
        return self._note(
            [long.place], np.array(self._computed(mx.concatenate(long.parts, axis=1), batch_of([long.text])))
        )

    def _room(self, context: int) -> int:
        """Return the tokens that a pass may read. Sequences of other models may wait for it, so it is kept short."""
        return self._pace.room(context, is_decoding=True)

    def _text(self, place: Place) -> Passage:
        return self._requests[place[0]].texts[place[1]]

    def _computed(self, hidden: mx.array, batch: Batch) -> mx.array:
        """Return the vector, or the score, of each text of a batch."""
        made = self._model.scores(hidden, batch) if self._pooling is None else self._pooling(hidden, batch)
        return made.astype(mx.float32)

    def _note(self, chosen: list[Place], rows: Row) -> list[tuple[int, Item]]:
        made: list[tuple[int, Item]] = []
        for (id_, index), row in zip(chosen, rows, strict=True):
            request = self._requests[id_]
            request.rows[index] = row
            if len(request.rows) == len(request.texts):
                del self._requests[id_]
                made.append((id_, Encoded(np.stack([request.rows[at] for at in range(len(request.texts))]))))
        return made
