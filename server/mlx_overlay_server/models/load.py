"""Models in memory and loads under way, as the pool keeps them and as lists show them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple

from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.settings import UNTUNED, Tuning


class Extras(NamedTuple):
    """What is loaded together with a model: LoRA weights, a draft model, and options of the engine of its own."""

    adapter_path: str | None = None
    """A folder of LoRA weights."""
    draft: str | None = None
    """The id of a draft model for speculative decoding."""
    tuning: Tuning = UNTUNED


PLAIN = Extras()


@dataclass(slots=True)
class Resident:
    """A model in memory."""

    id: str
    model: AnyLoaded
    number: int
    """The number of its load."""
    used: float
    """When it was last used, in monotonic seconds."""
    extras: Extras = PLAIN
    """What it was loaded with."""


@dataclass(slots=True, eq=False)
class Loading:
    """A model that is being loaded, for all requests that wait for it.

    First its folder is found, for which the model may be downloaded. Then it waits for room in memory. Then its weights
    are read.
    """

    id: str
    number: int = 0
    """Its place in the order in which loads began to wait for room."""
    key: str | None = None
    """The key under which the engine loads it, once its folder is known."""
    nbytes: int = 0
    """Bytes of its weights, and of the draft model's."""
    since: float = 0
    """When it began to wait for room, in monotonic seconds."""
    has_room: bool = False
    """Whether its weights are being read, so that it takes memory."""
    is_given_up: bool = False
    """Whether somebody has unloaded the model before it was in memory."""
    task: asyncio.Task[Resident | str] | None = None
    """Returns the model in memory; or its id as the disk spells it, where that is not `id`: it is loaded under that."""
    _room: asyncio.Future[None] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for room."""
        return self._room is not None and not self._room.done()

    def wait(self, number: int) -> asyncio.Future[None]:
        """Begin to wait for room, and return what to await."""
        self.number, self.since = number, time.monotonic()
        self._room = asyncio.get_running_loop().create_future()
        return self._room

    def begin(self) -> None:
        """End the wait, because there is room now."""
        self.has_room = True
        if self._room is not None:
            self._room.set_result(None)

    def refuse(self, error: ServerError) -> None:
        """End the wait with an error."""
        if self._room is not None:
            self._room.set_exception(error)


class Occupant(NamedTuple):
    """A model that is in memory, or on its way there, as lists show it."""

    id: str
    is_resident: bool
    nbytes: int
    """Bytes of its weights; 0 while they are not known."""
    users: int
    """Requests that use it or wait for it."""
    idle_seconds: float | None
    """Seconds since it was last used; None while it is in use, or not in memory yet."""
    is_waiting: bool = False
    """Whether its load waits for room."""
    read: int = 0
    """Bytes of its weights that its load has read."""
