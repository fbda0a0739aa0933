"""Sessions that end in every way while a program in them downloads, with every release of huggingface_hub at random.

P3: the download goes on, all of it is in the real cache at the end, and trees that nobody uses are gone. `waited` is
how long the longest next start took, `held` counts sessions that are left.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

from tests.support import endings, hubs
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import eventually
from tests.support.soak import Row, took

BYTES_PER_SECOND = 20_000
"""Of the large file, until its session has ended."""


def run(place: Path, seconds: float, random: Random) -> Row:
    """End one session after the other, and look for its download."""
    tried = lost = held = 0
    waited = 0.0
    broken: list[str] = []
    ends = time.monotonic() + seconds
    with LoopbackHub() as hub:
        while tried == 0 or time.monotonic() < ends:
            way = random.choice([*endings.WAYS])
            release = random.choice([each for each in hubs.ALL if hubs.is_here(each)])
            download = endings.make(hub, place / f"home-{tried}", f"org/name-{tried}", release)
            tried += 1
            try:
                waited = max(waited, _end(download, way, random))
            except AssertionError as error:
                lost += 1
                broken.append(f"{way}, huggingface_hub {release}: {error}")
            held += len(download.sessions())
    return Row(tried, lost, waited, held, tuple(broken))


def _end(download: endings.Download, way: str, random: Random) -> float:
    """Seconds that the next start took. AssertionError when a promise is broken."""
    download.hub.slow(BYTES_PER_SECOND, on=endings.LARGE)
    try:
        with endings.WAYS[way](download) as end:
            eventually(download.is_under_way, "the large file is being sent")
            time.sleep(random.uniform(0, 0.3))
            end()
            started = time.monotonic()
            download.start_anything()
            waited = took(started) / 2  # it starts two
            download.hub.heal()
            download.wait()
    finally:
        download.hub.heal()
    download.start_anything()
    download.check_nothing_is_lost()
    return waited
