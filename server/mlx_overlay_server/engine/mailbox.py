"""The mailbox in which the results of one request arrive on the event loop."""

from __future__ import annotations

import asyncio

from mlx_overlay_server.engine.commands import Item


class Mailbox:
    """Collects what the engine sends, as (id of the sequence, item), until the request takes it."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Item]] = []
        self._wake: asyncio.Future[None] | None = None

    def put(self, id_: int, item: Item) -> None:
        """Add an item. Call it on the event loop only."""
        self._items.append((id_, item))
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def take(self) -> list[tuple[int, Item]]:
        """Wait until there are items, and return all of them in the order in which they came."""
        while not self._items:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        items, self._items = self._items, []
        return items
