"""Responses that later requests continue: the newest ones, for as long as the server runs."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from mlx_overlay_server import errors
from mlx_overlay_server.api.responses.answers import ResponseAnswer
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest

STORED = 1000
"""The number of responses kept in memory for `previous_response_id`."""


class Stored(NamedTuple):
    """A response and the conversation that led to it."""

    response: ResponseAnswer
    turns: tuple[requests.Message, ...]
    """The conversation up to and with the response, without instructions."""


class Store:
    """The newest responses, by their ids."""

    def __init__(self, size: int) -> None:
        """Keep up to `size` responses."""
        self._size = size
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def put(self, stored: Stored) -> None:
        """Keep a response; the oldest goes when there are too many."""
        self._kept[stored.response["id"]] = stored
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def get(self, response_id: str) -> Stored:
        """Find a response. Raises NotFound."""
        found = self._kept.get(response_id)
        if found is None:
            raise errors.NotFound(f"there is no response {response_id!r} here", code="response_not_found")
        return found

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises NotFound."""
        self.get(response_id)
        del self._kept[response_id]

    def turns_of(self, response_id: str | None) -> tuple[requests.Message, ...]:
        """Return the conversation that a request continues; None: nothing. Raises InvalidRequest."""
        if response_id is None:
            return ()
        try:
            return self.get(response_id).turns
        except errors.NotFound as error:
            raise InvalidRequest(
                error.message, param="previous_response_id", code="previous_response_not_found"
            ) from None
