"""Keeps models in memory: shares loads between requests, keeps weights within a budget, unloads idle models.

The rules for which load begins next, and which models leave for it, are in `room`; this module carries them out.
Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from mlx_overlay_server import memory
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.errors import Conflict, ServerError, Unavailable
from mlx_overlay_server.models import room
from mlx_overlay_server.models.library import Located
from mlx_overlay_server.models.load import PLAIN, Extras, Loading, Occupant, Resident

logger = logging.getLogger("mlx_overlay_server")


class Source(Protocol):
    """The part of the library that the pool uses."""

    async def locate(self, model_id: str) -> Located: ...


class Loader(Protocol):
    """The part of the engine that the pool uses."""

    def new_key(self, path: str) -> str: ...
    async def load(self, command: Load) -> AnyLoaded: ...
    def unload(self, model: AnyLoaded) -> None: ...
    def bytes_read(self, key: str) -> int: ...


class Pool:
    """The models in memory. It loads and unloads them as requests need them."""

    def __init__(
        self,
        source: Source,
        loader: Loader,
        *,
        budget: int | Callable[[], Awaitable[int]],
        idle_ttl: float = 0,
        pinned: tuple[str, ...] = (),
        extras: Mapping[str, Extras] | None = None,
    ) -> None:
        """`budget`: bytes that weights may take, or a function that returns them once the machine is known.

        `idle_ttl`: seconds after which an idle model is unloaded, 0: never. `pinned`: ids of models that are never
        unloaded. `extras`: what is loaded together with a model, by its id.
        """
        self._source = source
        self._loader = loader
        self._find_budget = budget if callable(budget) else None
        self._budget = 0 if callable(budget) else budget
        self._idle_ttl = idle_ttl
        self._idle_ttls: dict[str, float] = {}
        """The same for models that have a value of their own, by id."""
        self._pinned = frozenset(pinned)
        self._arranged: frozenset[str] = frozenset()
        """The ids that `arrange` has pinned."""
        self._extras = dict(extras or {})
        self._resident: dict[str, Resident] = {}
        self._users: Counter[str] = Counter()
        """How many requests use a model or wait for it. A model that has any is not unloaded."""
        self._loads: dict[str, Loading] = {}
        """The loads that requests can join, by the model's id."""
        self._tasks: dict[asyncio.Task[Resident | str], Loading] = {}
        """All loads that have not ended, including those that were cancelled."""
        self._numbers = itertools.count()

    @property
    def resident(self) -> list[str]:
        """Ids of models in memory, sorted."""
        return sorted(self._resident)

    @property
    def loading(self) -> list[str]:
        """Ids of models on their way into memory, sorted."""
        return sorted(self._loads)

    @property
    def pinned(self) -> frozenset[str]:
        """The ids of models that are never unloaded by themselves."""
        return self._pinned

    @property
    def budget(self) -> int | None:
        """Bytes that weights may take; None until the machine is known."""
        return self._budget or None

    @property
    def occupants(self) -> list[Occupant]:
        """All models that are in memory or being loaded, sorted by id."""
        now = time.monotonic()
        there = [
            Occupant(
                each.id,
                is_resident=True,
                nbytes=each.model.nbytes,
                users=self._users[each.id],
                idle_seconds=None if self._users[each.id] else now - each.used,
            )
            for each in self._resident.values()
        ]
        coming = [
            Occupant(
                load.id,
                is_resident=False,
                nbytes=load.nbytes,
                users=self._users[load.id],
                idle_seconds=None,
                is_waiting=load.is_waiting,
                read=self._loader.bytes_read(load.key) if load.key is not None else 0,
            )
            for load in self._loads.values()
        ]
        return sorted(there + coming)

    @property
    def nbytes(self) -> int:
        """Bytes that the weights of the resident models take."""
        return sum(each.model.nbytes for each in self._resident.values())

    def model(self, model_id: str) -> AnyLoaded | None:
        """Return a model that is in memory; None: it is not."""
        resident = self._resident.get(model_id)
        return resident.model if resident is not None else None

    @asynccontextmanager
    async def use(self, model_id: str) -> AsyncIterator[AnyLoaded]:
        """Give a loaded model, which stays in memory while this context is open. Raises ServerError."""
        # Before the first await, so that the model is not unloaded between its load and its use.
        self._users[model_id] += 1
        try:
            found = self._resident.get(model_id) or await self._load(model_id)
            if isinstance(found, Resident):
                yield found.model
            else:
                async with self.use(found) as model:
                    yield model
        finally:
            self._users[model_id] -= 1
            if not self._users[model_id]:
                del self._users[model_id]  # clients choose the ids, which must not pile up
            if (left := self._resident.get(model_id)) is not None:
                left.used = time.monotonic()
                self._drop_if_outdated(left)
            self._leave(model_id)

    async def load(self, model_id: str, *, pin: bool = False) -> None:
        """Load a model unless it is in memory. Raises ServerError."""
        async with self.use(model_id):
            if pin:
                self.pin(model_id)

    def unload(self, model_id: str, *, force: bool = False) -> None:
        """Unload a model, or cancel its load, and unpin it; do nothing where it is not in memory.

        Raises Conflict for a model that requests use. With `force`, they end with an error instead.
        """
        if (users := self._users[model_id]) and not force:
            requests = "1 request" if users == 1 else f"{users} requests"
            raise Conflict(
                f"{model_id} is in use by {requests}; stop them first, or unload it with `force`", code="model_busy"
            )
        self.unpin(model_id)
        if (load := self._loads.get(model_id)) is not None:
            load.is_given_up = True
            self._cancel(load)
        if (resident := self._resident.get(model_id)) is not None:
            self._unload(resident, "by hand")
            self._admit()

    def pin(self, model_id: str) -> None:
        """Keep a model in memory once it is loaded."""
        self._pinned |= {model_id}

    def unpin(self, model_id: str) -> None:
        """Let a model be unloaded again to make room, or when it is idle."""
        self._pinned -= {model_id}
        self._admit()

    async def sweep(self) -> None:
        """Unload models that have been idle for too long. This runs as long as the server does."""
        while True:
            times = [seconds for seconds in (self._idle_ttl, *self._idle_ttls.values()) if seconds]
            await asyncio.sleep(min(10, *(seconds / 4 for seconds in times)) if times else 10)
            now = time.monotonic()
            for each in self._idle():
                seconds = self._idle_ttls.get(each.id, self._idle_ttl)
                if seconds and now - each.used >= seconds:
                    self._unload(each, "idle")

    def arrange(self, *, extras: Mapping[str, Extras], pinned: Collection[str], idle_ttls: Mapping[str, float]) -> None:
        """Take over what the configuration says of single models, by the names under which they are loaded.

        A model whose extras have changed is unloaded once no request uses it; its next load takes the new ones.
        """
        self._extras = dict(extras)
        for each in list(self._resident.values()):
            self._drop_if_outdated(each)
        self._pinned = (self._pinned - self._arranged) | frozenset(pinned)
        self._arranged = frozenset(pinned)
        self._idle_ttls = dict(idle_ttls)
        self._admit()

    def abort(self) -> None:
        """Cancel all loads. Whoever waits for them gets Unavailable."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel all loads, and wait until they have ended."""
        self.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _load(self, model_id: str) -> Resident | str:
        """Load a model once, however many requests wait for it. Returns the model, or the id under which to load it."""
        load = self._loads.get(model_id)
        if load is None:
            load = self._loads[model_id] = Loading(model_id)
            load.task = asyncio.create_task(self._run(load))
            self._tasks[load.task] = load
            load.task.add_done_callback(self._ended)
        assert load.task is not None  # noqa: S101 - set above
        try:
            return await asyncio.shield(load.task)
        except asyncio.CancelledError:
            if load.task.cancelled() and load.is_given_up:
                raise Unavailable(f"the load of {model_id} was cancelled by hand", code="model_unloaded") from None
            if load.task.cancelled():
                raise Unavailable("the server is shutting down") from None
            raise

    def _leave(self, model_id: str) -> None:
        """Cancel a load that nobody waits for any more, unless its weights are being read already.

        In that case it goes on until another load needs its room.
        """
        load = self._loads.get(model_id)
        if load is not None and not load.has_room and not self._users[model_id]:
            self._cancel(load)
        self._admit()

    def _cancel(self, load: Loading) -> None:
        """Cancel a load. A later request for its model begins another one."""
        if self._loads.get(load.id) is load:
            del self._loads[load.id]
        if load.task is not None:
            load.task.cancel()

    def _ended(self, task: asyncio.Task[Resident | str]) -> None:
        load = self._tasks.pop(task)
        if self._loads.get(load.id) is load:
            del self._loads[load.id]
        if not task.cancelled():
            task.exception()  # mark the error as read, or asyncio warns of it; whoever waited has got it
        self._admit()

    async def _run(self, load: Loading) -> Resident | str:
        extras = self._extras.get(load.id, PLAIN)
        located = await self._source.locate(load.id)
        if located.id != load.id:  # the disk spells the id otherwise: one model must not be in memory twice
            self._is_given_for(load.id, located.id)
            return located.id
        draft = await self._source.locate(extras.draft) if extras.draft is not None else None
        load.key = self._loader.new_key(located.path)
        load.nbytes = located.nbytes + (draft.nbytes if draft is not None else 0)
        if self._find_budget is not None:
            self._budget = await self._find_budget()
        has_room = load.wait(next(self._numbers))
        self._admit()
        await has_room
        model = await self._loader.load(
            Load(
                load.key,
                located.path,
                extras.adapter_path,
                draft.path if draft is not None else None,
                located.task,
                load.nbytes,
                extras.tuning,
            )
        )
        load.has_room = False  # from here on, the resident model counts instead
        resident = Resident(load.id, model, load.number, time.monotonic(), extras)
        self._resident[load.id] = resident
        logger.info("loaded %s from %s in %.1f s", load.id, located.path, time.monotonic() - load.since)
        return resident

    def _is_given_for(self, given: str, model_id: str) -> None:
        """Apply pins and extras that were given for one spelling of an id to the id as the disk spells it."""
        if given in self._pinned:
            self._pinned |= {model_id}
        if given in self._extras:
            self._extras.setdefault(model_id, self._extras[given])

    def _admit(self) -> None:
        """Let those loads begin that have room, or get it by unloading, by the rules of `room`."""
        while True:
            held = self._held()
            self._refuse(room.pinned_bytes(held))
            waiting = {load.number: load for load in self._loads.values() if load.is_waiting}
            queue = [room.Waiting(load.id, load.nbytes, load.number, load.since) for load in waiting.values()]
            plan = room.plan(sorted(queue, key=lambda each: each.number), held, self._budget, time.monotonic())
            if plan is None:
                return
            if given_up := [each.number for each in plan.leaving if each.is_loading]:
                self._give_up(given_up, plan.load.id)
                return  # when they have ended, this method is called again
            for each in plan.leaving:
                self._unload(self._resident[each.id], f"room for {plan.load.id}")
            waiting[plan.load.number].begin()

    def _refuse(self, pinned: int) -> None:
        """End waiting loads that can never fit beside the pinned models."""
        for load in self._loads.values():
            if load.is_waiting and pinned + load.nbytes > self._budget:
                held = f", of which pinned models hold {_gb(pinned)}" if pinned else ""
                load.refuse(
                    Unavailable(
                        f"{load.id} needs {_gb(load.nbytes)} and the memory budget is {_gb(self._budget)}{held}; "
                        + memory.advice(),
                        code="model_too_large",
                    )
                )

    def _held(self) -> list[room.Held]:
        """Return everything that takes room: models in memory, and loads whose weights are being read."""
        resident = [
            room.Held(
                each.id,
                each.model.nbytes,
                each.number,
                each.used,
                is_busy=bool(self._users[each.id]),
                is_pinned=each.id in self._pinned,
                is_loading=False,
            )
            for each in self._resident.values()
        ]
        loading = [
            room.Held(
                load.id,
                load.nbytes,
                load.number,
                load.since,
                is_busy=bool(self._users[load.id]) and self._loads.get(load.id) is load,
                is_pinned=load.id in self._pinned,
                is_loading=True,
            )
            for load in self._tasks.values()
            if load.has_room
        ]
        return resident + loading

    def _give_up(self, numbers: Collection[int], other: str) -> None:
        """Cancel loads that nobody waits for, to make room for the model `other`."""
        for load in list(self._loads.values()):
            if load.has_room and load.number in numbers:
                logger.info("cancelled the load of %s, which nobody waits for, to make room for %s", load.id, other)
                self._cancel(load)

    def _drop_if_outdated(self, resident: Resident) -> None:
        """Unload a model whose extras have changed since it was loaded, unless requests use it."""
        if not self._users[resident.id] and resident.extras != self._extras.get(resident.id, PLAIN):
            self._unload(resident, "the configuration has changed")

    def _idle(self) -> list[Resident]:
        return [each for each in self._resident.values() if not self._users[each.id] and each.id not in self._pinned]

    def _unload(self, resident: Resident, why: str) -> None:
        del self._resident[resident.id]
        self._loader.unload(resident.model)
        logger.info("unloaded %s (%s)", resident.id, why)


async def preload(
    pool: Pool, model_ids: tuple[str, ...], warm_up: Callable[[AnyLoaded], Awaitable[None]] | None = None
) -> None:
    """Load models before requests ask for them, and call `warm_up` with each.

    Errors are logged. The next request for such a model tries again.
    """
    for model_id in model_ids:
        try:
            async with pool.use(model_id) as model:
                if warm_up is not None:
                    await warm_up(model)
        except ServerError as error:
            logger.error("%s: %s", model_id, error.message)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
