"""Answers that clients may ask for again: the newest ones, for as long as the server runs, and lists of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

from typing_extensions import TypedDict

from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.errors import InvalidRequest, NotFound

T = TypeVar("T")

COUNT = 1000
"""The number of answers of one kind that are kept in memory."""
NBYTES = 256 * 10**6
"""The bytes that they may have as JSON, all together."""


class Page(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Newest(Generic[T]):
    """The newest answers of one kind, by their ids."""

    def __init__(self, kind: str, count: int = COUNT, nbytes: int = NBYTES) -> None:
        """Keep up to `count` answers, which have up to `nbytes` bytes all together; `kind` is what errors call them."""
        self._kind = kind
        self._count = count
        self._nbytes = nbytes
        self._held = 0
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def put(self, id_: str, answer: T, nbytes: int) -> None:
        """Keep an answer. The oldest go when there are too many; one that is larger than all may be is not kept."""
        self._kept[id_] = answer
        self._held += nbytes - self._sizes.get(id_, 0)
        self._sizes[id_] = nbytes
        while len(self._kept) > self._count or self._held > self._nbytes:
            self._forget(next(iter(self._kept)))

    def get(self, id_: str) -> T:
        """Find an answer. Raises NotFound."""
        if id_ not in self._kept:
            raise NotFound(f"there is no {self._kind} {id_!r} here", code=f"{self._kind.replace(' ', '_')}_not_found")
        return self._kept[id_]

    def delete(self, id_: str) -> None:
        """Forget an answer. Raises NotFound."""
        self.get(id_)
        self._forget(id_)

    def all(self) -> list[T]:
        """Return all answers, the oldest first."""
        return list(self._kept.values())

    def _forget(self, id_: str) -> None:
        del self._kept[id_]
        self._held -= self._sizes.pop(id_)


def page_of(items: Sequence[Json], *, after: str | None, limit: int, is_reversed: bool) -> Page:
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
