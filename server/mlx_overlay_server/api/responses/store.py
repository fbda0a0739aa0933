"""Responses that later requests continue: the newest ones, for as long as the server runs."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from mlx_overlay_server import errors
from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.api.responses.answers import ItemList, ResponseAnswer
from mlx_overlay_server.api.responses.stream import Pieces
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest

STORED = 1000
"""The number of responses kept in memory for `previous_response_id`."""


STORED_BYTES = 256 * 10**6
"""The bytes that they may have as JSON, all together."""


class Stored(NamedTuple):
    """A response and the conversation that led to it."""

    response: ResponseAnswer
    turns: tuple[requests.Message, ...]
    """The conversation up to and with the response, without instructions."""
    items: tuple[Json, ...] = ()
    """Its input as items, those of earlier responses first."""
    pieces: Pieces = ()
    """The pieces of text in which its stream gave it."""

    @property
    def all_items(self) -> tuple[Json, ...]:
        """The conversation up to and with the response, as items."""
        return (*self.items, *(dict(item) for item in self.response["output"]))


class Store:
    """The newest responses, by their ids."""

    def __init__(self, size: int, nbytes: int = STORED_BYTES) -> None:
        """Keep up to `size` responses, which have up to `nbytes` bytes as JSON all together."""
        self._size = size
        self._nbytes = nbytes
        self._held = 0
        self._kept: OrderedDict[str, Stored] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def put(self, stored: Stored) -> None:
        """Keep a response. The oldest go when there are too many; one that is larger than all may be is not kept."""
        id_ = stored.response["id"]
        self._kept[id_], self._sizes[id_] = stored, _size_of(stored)
        self._held += self._sizes[id_]
        while len(self._kept) > self._size or self._held > self._nbytes:
            self._forget(next(iter(self._kept)))

    def get(self, response_id: str) -> Stored:
        """Find a response. Raises NotFound."""
        found = self._kept.get(response_id)
        if found is None:
            raise errors.NotFound(f"there is no response {response_id!r} here", code="response_not_found")
        return found

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises NotFound."""
        self.get(response_id)
        self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        del self._kept[response_id]
        self._held -= self._sizes.pop(response_id)

    def before(self, response_id: str | None) -> Stored | None:
        """Return the response that a request continues; None: it continues none. Raises InvalidRequest."""
        if response_id is None:
            return None
        try:
            return self.get(response_id)
        except errors.NotFound as error:
            raise InvalidRequest(
                error.message, param="previous_response_id", code="previous_response_not_found"
            ) from None


def _size_of(stored: Stored) -> int:
    """Return how many bytes a response and its conversation have as JSON; an image counts with its own bytes."""
    images: list[int] = []

    def plain(value: object) -> object:
        if isinstance(value, bytes):
            images.append(len(value))
            return None
        return dict(value) if isinstance(value, Mapping) else str(value)

    written = json.dumps([stored.response, [asdict(turn) for turn in stored.turns]], default=plain, ensure_ascii=False)
    return len(written.encode("utf-8", "replace")) + sum(images)


def page_of(items: Sequence[Json], *, after: str | None, limit: int, is_reversed: bool) -> ItemList:
    """Return `limit` items after the one with the id `after`, the last ones first where that is asked for.

    Raises InvalidRequest for an id that none has.
    """
    ordered = list(reversed(items)) if is_reversed else list(items)
    if after is not None:
        start = next((at for at, item in enumerate(ordered, 1) if item["id"] == after), None)
        if start is None:
            raise InvalidRequest(f"there is no item {after!r} here", param="after")
        ordered = ordered[start:]
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(ordered) > limit,
    }
