"""Killed at every step, an overlay leaves the user's bytes and the cache whole (P1, P4)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.overlay.users_bytes.world import World, kill_owner
from tests.support import hubs
from tests.support.hubs import HubProcess


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_recovered", [True, False], ids=["then recovered", "then killed again"])
def test_an_owner_killed_at_any_step_loses_nothing_and_leaves_nothing(
    world: World, hub_processes: Callable[[str], HubProcess], is_recovered: bool
) -> None:
    """Before each change to a disk in turn: at recovery, start, two refreshes that change all models, and end."""
    world.keep_only("solo", "org/second", "org/cached", "org/shared")
    for kill_at in range(1, 2000):
        was_killed = kill_owner(world, hub_processes(hubs.INSTALLED), kill_at, refreshes=2)
        if is_recovered:
            assert world.recover() == [], f"killed at step {kill_at}"
            world.check_over()
        if not was_killed:
            break
    else:
        pytest.fail("the owner never came to its end")
    assert kill_at > 50, "the owner did less than a session takes"
    assert world.recover() == []
    world.check_over()
