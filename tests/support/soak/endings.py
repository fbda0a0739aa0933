"""P3 at random: sessions end in every way at random moments while programs download, and nothing may be lost.

python -m tests.support.soak.endings --count 200
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.support import endings, hubs
from tests.support.endings import WAYS
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import OVERLAY, eventually, succeed

AT_ONCE = 3
"""Downloads, each with a Hub and a home of its own."""


class Row(NamedTuple):
    """The outcome of all downloads whose session ended in one way."""

    way: str
    tried: int
    lost: int
    """Downloads that were cut, or that a plain program has to make again."""
    waited: float
    """The longest time in seconds that an end, or the next start, took."""
    held: int
    """Sessions that stayed although nobody used them any more."""


class _Try(NamedTuple):
    way: str
    trouble: str | None
    waited: float
    held: int


def run(*, count: int | None = None, seconds: float | None = None, seed: int = 0) -> list[Row]:
    """Try `count` downloads, or as many as begin within `seconds`; what went wrong is printed to stderr."""
    began = time.monotonic()
    random = Random(seed)

    def numbers() -> Iterator[int]:
        number = 0
        while number != count and (seconds is None or time.monotonic() - began < seconds):
            yield number
            number += 1

    tries: list[_Try] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ways = list(WAYS)
        waiting = []
        for number in numbers():
            waiting.append(pool.submit(_try, ways[number % len(ways)], random.random()))
            if len(waiting) >= AT_ONCE:
                tries.append(waiting.pop(0).result())
        tries += [each.result() for each in waiting]
    return [_row(way, [each for each in tries if each.way == way]) for way in ways]


def _row(way: str, tries: list[_Try]) -> Row:
    for each in tries:
        if each.trouble is not None:
            print(f"{way}: {each.trouble}", file=sys.stderr)
    lost = sum(each.trouble is not None for each in tries)
    waited = max((each.waited for each in tries), default=0.0)
    return Row(way, len(tries), lost, waited, sum(each.held for each in tries))


def _try(way: str, seed: float) -> _Try:
    """One download: its session ends somewhere in the second in which its large file is sent."""
    random = Random(seed)
    release = random.choice(hubs.ALL)
    size = random.choice([20_000, 200_000, 2_000_000])
    waited = 0.0
    trouble = None
    with TemporaryDirectory() as top, LoopbackHub() as hub:
        download = endings.make(hub, Path(top, "home"), "org/name", release, size=size)
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
            trouble = f"huggingface_hub {release}, {size} bytes: {error}"
        return _Try(way, trouble, waited, len(download.sessions()))


def _start_anything(download: endings.Download, random: Random) -> None:
    command = random.choice([["clean"], ["run", "--", "true"]])
    succeed([OVERLAY, *command], download.environ)


def _seconds(step: endings.End) -> float:
    began = time.monotonic()
    step()
    return time.monotonic() - began


def main() -> int:
    """Print a row a way; 1 when anything was lost or left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = run(count=options.count, seconds=options.seconds, seed=options.seed)
    for row in rows:
        print(f"{row.way:28}  tried {row.tried:4}  lost {row.lost:3}  waited {row.waited:5.1f} s  held {row.held:3}")
    return int(any(row.lost or row.held for row in rows))


if __name__ == "__main__":
    sys.exit(main())
