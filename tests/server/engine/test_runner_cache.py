"""Which part of a prompt a sequence takes from an earlier one's KV cache.

Texts cannot show it on tiny models, so these tests look at the numbers of cached and of processed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import KVCache
from mlx_overlay_server.engine.commands import Prefilled, Sampled
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.running import PROMPT, Running

_STEP = 64
_OPTIONS = EngineOptions(prefill_step=_STEP)
SEEDED: dict[str, Any] = {"temperature": 1, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    made = Running(folder, _OPTIONS)
    yield made
    made.runner.close()


# Seeds --------------------------------------------------------------------------------------------------------------


def test_a_seeded_sequence_reuses_no_cache_and_leaves_none(running: Running) -> None:
    """A reused cache rounds differently than a prompt that is read, and a seed promises the same text each time."""
    size = len(PROMPT)
    assert running.read(**SEEDED) == (size, size, 0)
    assert len(running.prefixes) == 0, "a seeded sequence left a cache, which was not made as a batch makes it"
    assert running.read().cached == 0
    assert running.read().cached == size - 1, "nothing to reuse: the test shows nothing"
    assert running.read(**SEEDED) == (size, size, 0)
    assert running.read((*PROMPT, 120, 121), **SEEDED).cached == 0


def test_a_seed_that_nothing_is_drawn_by_keeps_no_one_from_the_cache(running: Running) -> None:
    """Greedy answers are the same with any seed."""
    assert running.read(seed=3).cached == 0
    assert running.read(seed=3).cached == len(PROMPT) - 1


def test_what_was_read_before_a_cancel_is_reused(running: Running) -> None:
    id_ = running.add(max_tokens=1000)
    for _ in range(3):
        running.runner.step()
    running.runner.cancel(id_)
    assert not running.runner.is_busy
    assert running.read().cached == len(PROMPT) - 1


# What conversations share, on caches that cannot be cut ----------------------------------------------------------


@pytest.fixture
def uncuttable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A model whose caches cannot be cut later, as those of sliding windows and of state space models."""
    monkeypatch.setattr(KVCache, "is_trimmable", lambda _: False)
    made = Running(folder, _OPTIONS)
    yield made
    made.runner.close()


def test_where_caches_cannot_be_cut_one_is_kept_of_what_conversations_share(uncuttable: Running) -> None:
    system, other = PROMPT[:8], tuple(range(65, 75))
    assert uncuttable.read(PROMPT, system=len(system)).cached == 0
    assert uncuttable.read((*system, *other), system=len(system)).cached == len(system)
    assert uncuttable.read((*system[:4], *other), system=4).cached == 0, "a part of it cannot be had"


def _progress(running: Running, **more: Any) -> list[int]:
    """How much of a prompt was read after each step."""
    running.add(**more)
    read: list[int] = []
    while running.runner.is_busy:
        read += running.progress().values()
        assert len(read) < 10
    return read


@pytest.mark.parametrize(("system", "stops"), [(0, [20]), (8, [8, 20]), (20, [20])])
def test_where_caches_cannot_be_cut_reading_stops_where_what_is_shared_ends(
    system: int, stops: list[int], uncuttable: Running
) -> None:
    """And nowhere else: each stop is a step that others wait for."""
    assert _progress(uncuttable, system=system) == stops


def test_what_is_shared_and_cached_already_is_no_stop(uncuttable: Running) -> None:
    uncuttable.read(system=8)
    assert _progress(uncuttable, prompt=(*PROMPT[:8], *range(65, 75)), system=8) == [18]


def test_a_conversation_that_goes_on_is_read_from_where_it_stopped(uncuttable: Running) -> None:
    """Past what is shared: no token is read twice."""
    uncuttable.add(system=8, max_tokens=3)
    said: list[int] = []
    while uncuttable.runner.is_busy:
        said += [item.token for _, item in uncuttable.runner.step() if isinstance(item, Sampled)]
    follow = (*PROMPT, *said, *range(65, 75))
    uncuttable.add(follow, system=8)
    told = [item for _, item in uncuttable.runner.step() if isinstance(item, Prefilled)]
    assert told[0].cached >= len(PROMPT)
    assert told[0].total == len(follow)


def test_where_caches_can_be_cut_reading_does_not_stop(running: Running) -> None:
    assert _progress(running, system=8) == [20]
    assert running.read((*PROMPT[:8], *range(65, 75)), system=8).cached == 8
