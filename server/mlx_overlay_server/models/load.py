"""A model in memory, and one on its way there, as the pool keeps them and as lists show them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import NamedTuple

from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.settings import UNTUNED, Tuning


class Extras(NamedTuple):
    """How one model is loaded: with LoRA weights, with a draft model, with options of its own."""

    adapter_path: str | None = None
    draft: str | None = None
    """The id of a smaller model of the same vocabulary."""
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
    """As it was loaded."""


@dataclass(slots=True, eq=False)
class Load:
    """A load of one model, which all requests for it share.

    It looks for the model, which may download it, then waits for room, then loads.
    """

    id: str
    number: int = 0
    path: str = ""
    """Its folder, once that is known."""
    nbytes: int = 0
    since: float = 0
    """When it began to wait for room, in monotonic seconds."""
    has_room: bool = False
    """Whether it has begun to read weights, and takes memory."""
    is_given_up: bool = False
    """Whether the model was to be unloaded before it was there."""
    task: asyncio.Task[Resident | str] | None = None
    """Ends with the model, or with the id that the disk spells otherwise, under which the model is loaded."""
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
        """End the wait for room: there is some."""
        self.has_room = True
        if self._room is not None:
            self._room.set_result(None)

    def refuse(self, error: ServerError) -> None:
        """End the wait for room with an error."""
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
