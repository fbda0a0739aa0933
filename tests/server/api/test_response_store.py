"""Stored responses are bounded by their number and by their bytes."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_overlay_server.api.responses.store import Store, Stored
from mlx_overlay_server.chat.requests import Image, Message
from mlx_overlay_server.errors import NotFound


def _stored(id_: str, *content: str | Image) -> Stored:
    response: Any = {"id": id_}
    return Stored(response, (Message("user", content),))


def _kept(store: Store, *ids: str) -> list[str]:
    found = []
    for id_ in ids:
        try:
            store.get(id_)
        except NotFound:
            continue
        found.append(id_)
    return found


@pytest.mark.parametrize("content", ["x" * 1000, "é" * 500, Image(b"x" * 1000, "input[0]")])
def test_the_oldest_go_when_all_have_too_many_bytes(content: str | Image) -> None:
    store = Store(100, nbytes=3500)
    for id_ in "abcd":
        store.put(_stored(id_, content))
    assert _kept(store, *"abcd") == ["c", "d"] or _kept(store, *"abcd") == ["b", "c", "d"]
    store.delete("d")
    store.put(_stored("e", content))
    assert "c" in _kept(store, *"abcde"), "a deleted one takes no bytes"


def test_a_response_that_is_larger_than_all_may_be_is_not_kept() -> None:
    store = Store(100, nbytes=3500)
    store.put(_stored("large", "x" * 4000))
    assert _kept(store, "large") == []
    store.put(_stored("small", "x"))
    assert _kept(store, "small") == ["small"]


def test_the_oldest_go_when_there_are_too_many() -> None:
    store = Store(2)
    for id_ in "abc":
        store.put(_stored(id_, "x"))
    assert _kept(store, *"abc") == ["b", "c"]
