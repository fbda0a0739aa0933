"""The garbage collector passes over what stays, and frees what nothing refers to when it is told to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from mlx_overlay_server import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class _Ring:
    def __init__(self) -> None:
        self.self = self


def test_what_was_there_is_out_of_the_collectors_sight_until_it_is_told_to_free_it() -> None:
    ring = _Ring()
    dead = weakref.ref(ring)
    garbage.begin()
    assert not any(each is ring for each in gc.get_objects()), "a full pass would go through it"
    del ring
    gc.collect()
    assert dead() is not None
    garbage.collect()
    assert dead() is None, "a model in a cycle of references would stay in memory after it was unloaded"


def test_what_survives_is_out_of_sight_again() -> None:
    kept = [_Ring()]
    garbage.collect()
    assert not any(each is kept for each in gc.get_objects())
