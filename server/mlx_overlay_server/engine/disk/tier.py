"""KV caches on disk, as the engine's thread sees them: it hands over what it keeps, and asks for what it lacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_overlay_server.engine import mlx_arrays
from mlx_overlay_server.engine.arrays import Tokens
from mlx_overlay_server.engine.commands import DiskStats
from mlx_overlay_server.engine.disk import blocks
from mlx_overlay_server.engine.disk.blocks import BLOCK, Content, Plan
from mlx_overlay_server.engine.disk.reader import Found, Reader, Reading
from mlx_overlay_server.engine.disk.store import Store
from mlx_overlay_server.engine.disk.writer import Job, Writer
from mlx_overlay_server.engine.mlx import Cache

logger = logging.getLogger("mlx_overlay_server")

FORMAT = "1"
"""Of names and files. What another one has written is not found, and goes as the least recently used."""
SILENT_SECONDS = 5.0
"""A file takes less to read, unless its disk does not answer."""
OPEN_SECONDS = 2.0
"""How long the engine's start waits to know what is on disk: it takes a thousandth of that, or its disk is away."""
_REFRESH_SECONDS = 5.0
"""How often to look at what other servers have written, at most."""


class _Kind(NamedTuple):
    """A kind of KV cache that a model's sequences have."""

    root: str
    layout: str
    make: Callable[[], Cache]
    has_rows: bool
    has_states: bool
    least: int
    """Tokens from which on a sequence has caches of this kind."""


class Sought(NamedTuple):
    """What to read for a prompt."""

    kind: _Kind
    plan: Plan


class Tier:
    """The KV caches on disk, of all models. Only the engine's thread may use it."""

    def __init__(self, folder: str, cap: int, budget: int, notify: Callable[[], None]) -> None:
        """`cap`: bytes on disk; `budget`: bytes in memory, of one KV cache or of several that wait to be written.

        `notify` is called, by other threads, when something is read or written.
        """
        self._store = Store(folder, cap)
        self._budget = budget
        self._writer = Writer(self._store, notify)
        self._reader = Reader(self._store, self._writer.remove, notify)
        if not self._writer.is_open.wait(OPEN_SECONDS):
            logger.warning("%s does not answer: KV caches that it holds are not used until it does", folder)
        self._kinds: dict[str, tuple[_Kind, ...]] = {}
        """The key of a model -> the kinds of KV caches that its sequences have."""
        self._staged: list[Job] = []
        self._refreshed_at = 0.0
        self._silent: Reading | None = None
        """What was given up on, until it is over: then the disk answers again."""
        self._restored = 0

    def register(
        self,
        key: str,
        identity: Sequence[str],
        make: Callable[[], Cache],
        *,
        bits: int | None,
        group_size: int,
        start: int,
    ) -> None:
        """Note a model. `identity`: what tells it from others; `make` makes an empty KV cache for it.

        `bits`, `group_size` and `start` say how its KV caches are quantised, and from which token on.
        """
        made = [_kind(identity, (), make)]
        if bits is not None:
            how = (str(bits), str(group_size), str(start))

            def quantised() -> Cache:
                return mlx_arrays.quantised(make(), bits=bits, group_size=group_size)

            try:
                made = [_kind(identity, how, quantised, least=start), _kind(identity, how, make)]
            except (NotImplementedError, ValueError):  # a kind that mlx-lm does not quantise, either
                made = []
        self._kinds[key] = tuple(made)

    def forget(self, key: str) -> None:
        """Forget a model; what was kept of it stays."""
        self._kinds.pop(key, None)

    def stage(self, key: str, tokens: Tokens, cache: Cache) -> Job | None:
        """Have a KV cache written, which is evaluated and does not change any more, at the next `release`.

        None if it is not: it cannot be, it is too short, or too much waits to be written already.
        """
        layout = mlx_arrays.layout(cache)
        kind = next((each for each in self._kinds.get(key, ()) if each.layout == layout), None)
        size = len(tokens)
        if kind is None or size < BLOCK or (parts := mlx_arrays.taken_apart(cache, size)) is None:
            return None
        chain = blocks.chain(kind.root, tokens)
        state = None
        if kind.has_states:
            tail = blocks.rows(parts.rows, size - size % BLOCK, size) if size % BLOCK else {}
            state = Content({**tail, **parts.arrays}, parts.outline)
        nbytes = sum(layer.nbytes for layer in cache)
        if self._writer.pending + nbytes > self._budget:
            return None
        job = Job(key, chain, parts.rows, state, nbytes)
        self._staged.append(job)
        return job

    @property
    def has_staged(self) -> bool:
        """Whether something is staged."""
        return bool(self._staged)

    def release(self) -> None:
        """Write what is staged. Call it when nothing that was computed before can turn out to be wrong any more."""
        for job in self._staged:
            self._writer.put(job)
        self._staged.clear()

    def discard(self, key: str) -> None:
        """Give up what is staged of a model."""
        self._staged = [job for job in self._staged if job.key != key]

    @property
    def held(self) -> int:
        """Bytes of KV caches that are in memory only until they are written."""
        return self._writer.held

    def touch(self, key: str, tokens: Tokens) -> None:
        """Note that a sequence was used."""
        for kind in self._kinds.get(key, ()) if len(tokens) >= BLOCK else ():
            self._writer.touch(blocks.chain(kind.root, tokens))

    def seek(self, key: str, prompt: Sequence[int], known: int) -> Sought | None:
        """Return what to read for a prompt of which `known` tokens are in memory; None: nothing that is worth it."""
        if len(prompt) - known <= BLOCK or (self._silent is not None and not self._silent.is_over):
            return None
        tokens = np.asarray(prompt[:-1], dtype=np.int64)  # one at least is left to read
        best: Sought | None = None
        for kind in self._kinds.get(key, ()):
            if not len(self._store):
                break
            names = blocks.chain(kind.root, tokens)
            plan = blocks.plan(
                names, self._store, has_rows=kind.has_rows, has_states=kind.has_states, budget=self._budget
            )
            if plan is not None and plan.size >= max(kind.least, known + BLOCK, best.plan.size if best else 0):
                best = Sought(kind, plan)
        if best is None and time.monotonic() - self._refreshed_at > _REFRESH_SECONDS:
            self._refreshed_at = time.monotonic()
            self._writer.refresh()
        return best

    def read(self, sought: Sought) -> Reading:
        """Begin to read."""
        return self._reader.ask(sought.plan)

    def give_up(self, reading: Reading) -> None:
        """Wait no longer for a disk that does not answer: until it does, nothing is read from it."""
        self._silent = reading
        logger.warning("the disk with the kept KV caches does not answer; prompts are read without it")

    def put_together(self, sought: Sought, found: Found, made: dict[str, mx.array]) -> Cache:
        """Return the KV cache of what was found. `made`: its arrays, as MLX's."""
        self._restored += found.size
        return mlx_arrays.put_together(sought.kind.make(), found.size, made, found.outline or {})

    @property
    def stats(self) -> DiskStats:
        """What is kept, and what became of it."""
        store, writer = self._store, self._writer
        return DiskStats(store.nbytes, len(store), store.cap, writer.written, self._restored, writer.failures)

    def close(self, seconds: float) -> None:
        """Write what is left, for so many seconds at most."""
        self._reader.close()
        self._writer.close(seconds)


def folder() -> str:
    """Return the folder of the KV caches that are kept on disk."""
    from platformdirs import user_cache_path

    return str(user_cache_path("mlx-omni-server", appauthor=False) / "kv")


def _kind(identity: Sequence[str], how: Sequence[str], make: Callable[[], Cache], *, least: int = 0) -> _Kind:
    empty = make()
    layout = mlx_arrays.layout(empty)
    root = blocks.root(FORMAT, version("mlx"), version("mlx-lm"), *identity, *how, layout)
    return _Kind(root, layout, make, mlx_arrays.has_rows(empty), mlx_arrays.has_states(empty), least)
