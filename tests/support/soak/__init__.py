"""`make soak`: campaigns that break things at random for a given time, and count what came of it.

A campaign is a module here with a function `run(place, seconds, random)`, which gives a Row. `place` is an empty
folder, for homes, caches and models; `random` decides everything that is left to chance, so that the same seed draws
the same faults. What a campaign starts, it ends.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from random import Random
from typing import NamedTuple

CAMPAIGNS = ("kills", "endings", "folders", "hangs", "connections", "requests", "queues", "caches", "memory")
"""The modules here that are campaigns, in the order in which they run. A new one joins by its name."""

SHORT: tuple[str, ...] = ("kills", "endings", "folders", "hangs", "connections", "requests", "queues")
"""Those that CI runs for a few seconds: all but those that fail because of a fault that is known and not yet mended."""


class Row(NamedTuple):
    """What came of one campaign."""

    tried: int
    """How often something was broken, killed or asked."""
    lost: int = 0
    """Downloads, answers, models that should have been there afterwards and were not."""
    waited: float = 0.0
    """Seconds that somebody who had nothing to do with it waited at most for an answer."""
    held: int = 0
    """What was still held in the end by nobody: sessions, connections, MiB of memory. The campaign says which."""
    broken: tuple[str, ...] = ()
    """Each promise that was broken, with what happened, in one line."""


def run(name: str, place: Path, seconds: float, seed: int) -> Row:
    """Run one campaign; what it asserts in vain is a broken promise like those that it reports."""
    campaign = importlib.import_module(f"{__name__}.{name}")
    place.mkdir(parents=True)
    try:
        row: Row = campaign.run(place, seconds, Random(f"{seed} {name}"))
    except AssertionError as error:
        row = Row(tried=0, lost=0, broken=(f"the campaign ended early: {error}",))
    return row


def took(started: float) -> float:
    """Seconds since a moment of time.monotonic."""
    return time.monotonic() - started
