"""The models that the engine's thread is loading, a slice of each in each of its turns."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.failures import load_failure
from mlx_overlay_server.engine.loads import path_of
from mlx_overlay_server.errors import ServerError

if TYPE_CHECKING:
    from mlx_overlay_server.engine.encoding.runner import EncodingRunner
    from mlx_overlay_server.engine.runner import Runner

    AnyRunner = Runner | EncodingRunner

logger = logging.getLogger("mlx_overlay_server")


class Reports(Protocol):
    """Where the progress and the results of loads go."""

    def reading(self, key: str) -> AbstractContextManager[None]: ...
    def has_read(self, key: str, nbytes: int) -> None: ...
    def settle(self, key: str, result: AnyLoaded | ServerError) -> None: ...


@dataclass(slots=True)
class _Coming:
    slices: Iterator[AnyRunner | int | None]
    nbytes: int
    """Of its weights."""
    has_begun: bool = False
    """Whether it does not wait for memory any more."""


class Incoming:
    """Loads that wait for memory, or go on, by the keys of their models."""

    def __init__(self, reports: Reports) -> None:
        """`reports`: where progress and results go."""
        self._reports = reports
        self._loads: dict[str, _Coming] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._loads))

    def __bool__(self) -> bool:
        return bool(self._loads)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of all of them."""
        return sum(load.nbytes for load in self._loads.values())

    @property
    def begun_bytes(self) -> int:
        """Bytes of the weights of those that do not wait for memory any more."""
        return sum(load.nbytes for load in self._loads.values() if load.has_begun)

    def add(self, key: str, slices: Iterator[AnyRunner | int | None], nbytes: int) -> None:
        """Let a load wait until there is memory for its weights.

        `slices` loads one more of them each time it is advanced, and gives the bytes that were read, or the model.
        """
        self._loads[key] = _Coming(slices, nbytes)

    def has_begun(self, key: str) -> bool:
        """Return whether a load does not wait for memory any more."""
        return self._loads[key].has_begun

    def begin(self, key: str) -> None:
        """Note that a load need not wait for memory any more."""
        self._loads[key].has_begun = True

    def step(self, key: str) -> AnyRunner | None:
        """Load one slice of a model, and return what steps its sequences when it is whole. Raises anything."""
        with self._reports.reading(key):
            made = next(self._loads[key].slices)
        if isinstance(made, int):
            self._reports.has_read(key, made)
            return None
        if made is not None:
            del self._loads[key]
        return made

    def drop(self, key: str) -> bool:
        """Give up a load that nobody waits for any more. Returns whether there was one."""
        return self._loads.pop(key, None) is not None

    def fail(self, key: str, error: BaseException) -> None:
        """Give up a load because of an error."""
        del self._loads[key]
        path = path_of(key)
        logger.warning("cannot load %s: %s", path, str(error).strip() or type(error).__name__)
        self._reports.settle(key, load_failure(error, path))

    def clear(self) -> None:
        """Give up all loads, and say nothing."""
        self._loads.clear()
