"""Responses that later requests continue: the newest ones, for as long as the server runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

from pydantic import TypeAdapter

from mlx_overlay_server import errors
from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.api.newest import COUNT, NBYTES, Newest
from mlx_overlay_server.api.responses.answers import ResponseAnswer
from mlx_overlay_server.api.responses.items import Item, ItemReference
from mlx_overlay_server.api.responses.stream import Pieces
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest


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

    def __init__(self, count: int = COUNT, nbytes: int = NBYTES) -> None:
        """Keep up to `count` responses, which have up to `nbytes` bytes as JSON all together."""
        self._kept: Newest[Stored] = Newest("response", count, nbytes)

    def put(self, stored: Stored) -> None:
        """Keep a response. The oldest go when there are too many; one that is larger than all may be is not kept."""
        self._kept.put(stored.response["id"], stored, _size_of(stored))

    def get(self, response_id: str) -> Stored:
        """Find a response. Raises NotFound."""
        return self._kept.get(response_id)

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises NotFound."""
        self._kept.delete(response_id)

    def resolved(self, given: str | Sequence[Item]) -> str | list[Item]:
        """Return a request's input with stored items in place of references to them; a reference to no item stays."""
        if isinstance(given, str):
            return given
        return [self._referred(item) if isinstance(item, ItemReference) else item for item in given]

    def _referred(self, reference: ItemReference) -> Item:
        for stored in reversed(self._kept.all()):
            for item in stored.all_items:
                if item["id"] == reference.id:
                    return _items().validate_python(item)
        return reference

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


@functools.cache
def _items() -> TypeAdapter[Item]:
    return TypeAdapter(Item)


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
