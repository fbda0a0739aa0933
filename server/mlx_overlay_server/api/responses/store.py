"""Responses that later ones go on from: the newest, for as long as the server runs."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from mlx_overlay_server import errors
from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest

STORED = 1000
"""Responses kept in memory for `previous_response_id`: the newest."""


class Stored(NamedTuple):
    response: Json
    turns: tuple[requests.Message, ...]
    """The conversation up to and with it, instructions left out."""


class Store:
    """The newest responses, for as long as the server runs."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def put(self, stored: Stored) -> None:
        self._kept[stored.response["id"]] = stored
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def get(self, response_id: str) -> Stored:
        """Raises NotFound."""
        found = self._kept.get(response_id)
        if found is None:
            raise errors.NotFound(f"there is no response {response_id!r} here", code="response_not_found")
        return found

    def delete(self, response_id: str) -> None:
        """Raises NotFound."""
        self.get(response_id)
        del self._kept[response_id]

    def turns_of(self, response_id: str | None) -> tuple[requests.Message, ...]:
        """The conversation so far. Raises InvalidRequest."""
        if response_id is None:
            return ()
        try:
            return self.get(response_id).turns
        except errors.NotFound as error:
            raise InvalidRequest(
                error.message, param="previous_response_id", code="previous_response_not_found"
            ) from None
