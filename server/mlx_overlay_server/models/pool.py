"""Keeps models in memory: joins loads of one model, keeps to a memory budget, unloads idle models.

Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.errors import ServerError, Unavailable
from mlx_overlay_server.models.library import Located

logger = logging.getLogger("mlx_overlay_server")


class Source(Protocol):
    """The part of the library that the pool uses."""

    async def locate(self, model_id: str) -> Located: ...


class Loader(Protocol):
    """The part of the engine that the pool uses."""

    async def load(self, path: str, *, adapter_path: str | None = None, draft_path: str | None = None) -> Loaded: ...
    def unload(self, model: Loaded) -> None: ...


class Extras(NamedTuple):
    """What is loaded together with a model: LoRA weights and a draft model."""

    adapter_path: str | None = None
    draft: str | None = None
    """The id of a smaller model of the same vocabulary."""


@dataclass(slots=True)
class Resident:
    """A model in memory."""

    id: str
    model: Loaded
    used: float
    """When it was last used, in monotonic seconds."""


class Pool:
    """The models in memory: hands them out, and loads and unloads them as needed."""

    def __init__(
        self,
        source: Source,
        loader: Loader,
        *,
        budget: int,
        idle_ttl: float = 0,
        pinned: tuple[str, ...] = (),
        extras: Mapping[str, Extras] | None = None,
    ) -> None:
        """`budget`: bytes that weights may take; `idle_ttl`: seconds until an idle model is unloaded, 0: never.

        `pinned`: ids that are never unloaded; `extras`: what is loaded together with an id.
        """
        self._source = source
        self._loader = loader
        self._budget = budget
        self._idle_ttl = idle_ttl
        self._pinned = frozenset(pinned)
        self._extras = extras or {}
        self._resident: dict[str, Resident] = {}
        self._users: Counter[str] = Counter()
        """How many requests use a model or wait for it: while there are any, it is not unloaded."""
        self._loading: dict[str, asyncio.Task[Resident]] = {}
        self._reserved = 0
        self._room = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def resident(self) -> list[str]:
        """Ids of models in memory, sorted."""
        return sorted(self._resident)

    @property
    def loading(self) -> list[str]:
        """Ids of models on their way into memory, sorted."""
        return sorted(self._loading)

    @property
    def nbytes(self) -> int:
        """Bytes that the weights of the resident models take."""
        return sum(each.model.nbytes for each in self._resident.values())

    def is_resident(self, model_id: str) -> bool:
        """Return whether a model is in memory, so that a request for it can start at once."""
        return model_id in self._resident

    @asynccontextmanager
    async def use(self, model_id: str) -> AsyncIterator[Loaded]:
        """Give a loaded model, which is not unloaded while the context is open. Raises ServerError."""
        self._users[model_id] += 1  # before anything is awaited: it must not be unloaded between load and use
        try:
            resident = self._resident.get(model_id) or await self._load(model_id)
            yield resident.model
        finally:
            self._users[model_id] -= 1
            if not self._users[model_id]:
                del self._users[model_id]  # ids are what clients send: they must not pile up
            if (left := self._resident.get(model_id)) is not None:
                left.used = time.monotonic()
            self._notify()

    async def sweep(self) -> None:
        """Unload models that were idle for too long, for as long as the server runs."""
        while self._idle_ttl:
            await asyncio.sleep(min(self._idle_ttl / 4, 10))
            now = time.monotonic()
            for each in self._idle():
                if now - each.used >= self._idle_ttl:
                    self._unload(each, "idle")

    def abort(self) -> None:
        """Cancel loads that still run; whoever waits for them gets Unavailable."""
        for task in self._loading.values():
            task.cancel()

    async def close(self) -> None:
        """Cancel loads that still run, and wait until they have ended."""
        self.abort()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    async def _load(self, model_id: str) -> Resident:
        """Load a model once, however many requests wait for it; the load continues when they leave."""
        task = self._loading.get(model_id)
        if task is None:
            task = asyncio.create_task(self._load_once(model_id))
            self._loading[model_id] = task
            task.add_done_callback(lambda _: self._loaded(model_id))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Unavailable("the server is shutting down") from None
            raise

    def _loaded(self, model_id: str) -> None:
        task = self._loading.pop(model_id)
        if not task.cancelled():
            task.exception()  # whoever waited has got it; asyncio warns of errors that nobody has read
        self._notify()

    async def _load_once(self, model_id: str) -> Resident:
        extras = self._extras.get(model_id, Extras())
        located = await self._source.locate(model_id)
        draft = await self._source.locate(extras.draft) if extras.draft is not None else None
        nbytes = located.nbytes + (draft.nbytes if draft is not None else 0)
        started = time.monotonic()
        await self._make_room(model_id, nbytes)
        try:
            model = await self._loader.load(
                located.path, adapter_path=extras.adapter_path, draft_path=draft.path if draft is not None else None
            )
        finally:
            self._reserved -= nbytes
        resident = Resident(model_id, model, time.monotonic())
        self._resident[model_id] = resident
        logger.info("loaded %s from %s in %.1f s", model_id, located.path, time.monotonic() - started)
        return resident

    async def _make_room(self, model_id: str, nbytes: int) -> None:
        """Reserve memory by unloading idle models, least recently used first. Raises Unavailable if it never fits."""
        async with self._room:  # one at a time: two must not count the same bytes as free
            while self.nbytes + self._reserved + nbytes > self._budget:
                pinned = sum(each.model.nbytes for each in self._resident.values() if each.id in self._pinned)
                if pinned + nbytes > self._budget:
                    held = f", of which pinned models hold {_gb(pinned)}" if pinned else ""
                    raise Unavailable(
                        f"{model_id} needs {_gb(nbytes)} and the memory budget is {_gb(self._budget)}{held}; "
                        "raise --memory-budget",
                        code="model_too_large",
                    )
                idle = self._idle()
                if idle:
                    self._unload(min(idle, key=lambda each: each.used), f"room for {model_id}")
                else:
                    self._changed.clear()
                    await self._changed.wait()
            self._reserved += nbytes

    def _idle(self) -> list[Resident]:
        return [each for each in self._resident.values() if not self._users[each.id] and each.id not in self._pinned]

    def _unload(self, resident: Resident, why: str) -> None:
        del self._resident[resident.id]
        self._loader.unload(resident.model)
        logger.info("unloaded %s (%s)", resident.id, why)

    def _notify(self) -> None:
        self._changed.set()


async def preload(pool: Pool, model_ids: tuple[str, ...]) -> None:
    """Load models before they are asked for. Failures are logged; a request for such a model tries again."""
    for model_id in model_ids:
        try:
            async with pool.use(model_id):
                pass
        except ServerError as error:
            logger.error("%s: %s", model_id, error.message)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
