"""API keys with names: who they let in, to which models, and how often."""

from __future__ import annotations

import pytest
from mlx_overlay_server.access import CURRENT, Access, check_model, digest
from mlx_overlay_server.errors import Forbidden, Overloaded, Unauthorized
from mlx_overlay_server.settings import Key, Settings

ANN = Key(name="ann", digest=digest(b"of-ann"), models=("org/a",), rate=2)
BOB = Key(name="bob", digest=digest(b"of-bob"))


def test_each_key_is_known_and_no_other() -> None:
    access = Access(lambda: Settings(api_key="main", keys=(ANN, BOB)))
    assert not access.is_open
    assert [access.key(each) for each in (b"of-ann", b"of-bob", b"main")] == [ANN, BOB, None]
    for wrong in (b"", b"ann", ANN.digest.encode(), b"of-ann "):
        with pytest.raises(Unauthorized):
            access.key(wrong)


def test_without_keys_it_is_open_and_with_one_in_the_file_it_is_not() -> None:
    assert Access(Settings).is_open
    assert not Access(lambda: Settings(api_key="main")).is_open
    access = Access(lambda: Settings(keys=(BOB,)))
    assert not access.is_open
    with pytest.raises(Unauthorized):
        access.key(b"")


def test_a_rate_counts_the_requests_of_the_last_minute() -> None:
    now = 1000.0
    access = Access(Settings, clock=lambda: now)
    access.count(ANN)
    now += 30
    access.count(ANN)
    with pytest.raises(Overloaded, match="'ann' may send 2 requests in a minute; wait 30 seconds"):
        access.count(ANN)
    now += 29.9
    with pytest.raises(Overloaded, match="wait 1 seconds"):
        access.count(ANN)
    now += 0.1
    access.count(ANN)
    for _ in range(1000):
        access.count(BOB)


def test_a_key_is_for_its_models_by_any_of_their_names() -> None:
    token = CURRENT.set(ANN)
    try:
        check_model("alias", "org/a")
        with pytest.raises(Forbidden, match="'ann' is not for org/b") as caught:
            check_model("org/b")
        assert caught.value.code == "model_not_allowed"
        CURRENT.set(BOB)
        check_model("org/b")
    finally:
        CURRENT.reset(token)
    check_model("anything")
