"""Sessions that end in every way at random moments while programs in them download, with every release in turn.

P3: each download completes, is in the real cache after the next start, and is fetched by nobody again. `lost` counts
those that were cut or are fetched again, `held` sessions that stay although nobody uses them; `waited` is how long the
longest end, or next start, took.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from random import Random

from tests.support import endings, hubs
from tests.support.endings import WAYS
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import OVERLAY, eventually, succeed
from tests.support.soak import Row, took

AT_ONCE = 3
"""Downloads, each with a Hub and a home of its own."""


def run(place: Path, seconds: float, random: Random) -> Row:
    """End sessions, in each way in turn."""
    ends = time.monotonic() + seconds
    rows: list[Row] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in count(0, AT_ONCE):
            if rows and time.monotonic() > ends:
                break
            draws = [(each, place / str(each), Random(random.random())) for each in range(number, number + AT_ONCE)]
            rows += pool.map(lambda draw: _end(*draw), draws)
    return Row(
        tried=len(rows),
        lost=sum(row.lost for row in rows),
        waited=max(row.waited for row in rows),
        held=sum(row.held for row in rows),
        broken=tuple(what for row in rows for what in row.broken),
    )


def _end(number: int, place: Path, random: Random) -> Row:
    """One download, whose session ends somewhere in the second in which its large file is sent, or right after."""
    way = list(WAYS)[number % len(WAYS)]
    release = random.choice(hubs.ALL)
    size = random.choice([20_000, 200_000, 2_000_000])
    waited = 0.0
    broken: tuple[str, ...] = ()
    place.mkdir()
    with LoopbackHub() as hub:
        download = endings.make(hub, place / "home", "org/name", release, size=size)
        hub.slow(size, on=endings.LARGE)
        try:
            with WAYS[way](download) as end:
                eventually(download.is_under_way, "the large file is being sent")
                time.sleep(random.uniform(0, 1.1))
                waited = max(_seconds(end), _seconds(lambda: _start_anything(download, random)))
                download.wait()
            _start_anything(download, random)
            download.check_nothing_is_lost()
        except (AssertionError, subprocess.TimeoutExpired) as error:
            broken = (f"{way}, huggingface_hub {release}, {size} bytes: {error}",)
        return Row(1, len(broken), waited, len(download.sessions()), broken)


def _start_anything(download: endings.Download, random: Random) -> None:
    command = random.choice([["clean"], ["run", "--", "true"]])
    succeed([OVERLAY, *command], download.environ)


def _seconds(step: Callable[[], None]) -> float:
    started = time.monotonic()
    step()
    return took(started)
