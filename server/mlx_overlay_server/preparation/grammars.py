"""Compiled grammars, kept for later requests with the same schema."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

KEPT = 32
"""How many compiled grammars are kept. Large ones take some megabytes each."""

Key = tuple[str, str]
"""(key of the model, grammar)."""


class Grammars:
    """Compiles each grammar once, however many requests need it, and keeps the ones used last."""

    def __init__(self) -> None:
        self._compiled: OrderedDict[Key, Any] = OrderedDict()
        self._compiling: dict[Key, asyncio.Lock] = {}

    async def get(self, key: Key, *, check: Callable[[], Awaitable[Any]], make: Callable[[], Any]) -> Any:
        """Return a compiled grammar, of which each answer uses a copy. Raises what `check` and `make` raise.

        `check` finds out whether the grammar compiles within the time limit. Then `make` compiles it, in a thread.
        """
        lock = self._compiling.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                if key not in self._compiled:
                    await check()
                    self._compiled[key] = await asyncio.to_thread(make)
                    while len(self._compiled) > KEPT:
                        self._compiled.popitem(last=False)
                self._compiled.move_to_end(key)
                return self._compiled[key]
        finally:
            if not lock.locked():
                self._compiling.pop(key, None)

    def forget(self, model: str) -> None:
        """Drop the grammars of a model that has been unloaded."""
        for key in [key for key in self._compiled if key[0] == model]:
            del self._compiled[key]
