"""Keeps a Mac awake while there is work, since generation and downloads stop when it falls asleep.

Only the sleep of an idle machine is prevented. A closed lid or an empty battery still puts it to sleep.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

LOOK_SECONDS = 5.0
"""Seconds between two looks at whether there is work. A Mac falls asleep after a minute at the earliest."""


async def keep_awake(has_work: Callable[[], bool], *, seconds: float = LOOK_SECONDS) -> None:
    """Hold macOS's power assertion while `has_work` returns True, until this is cancelled. Elsewhere, do nothing."""
    tool = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if tool is None:
        return
    holder: subprocess.Popen[bytes] | None = None
    try:
        while True:
            if not has_work():
                _end(holder)
                holder = None
            elif holder is None or holder.poll() is not None:
                holder = _start(tool)
            await asyncio.sleep(seconds)
    finally:
        _end(holder)


def _start(tool: str) -> subprocess.Popen[bytes] | None:
    """Start the program that holds the assertion until it, or this process, ends; None where it cannot be started."""
    with suppress(OSError):
        return subprocess.Popen(
            [tool, "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # without a fork: see `children`
        )
    return None


def _end(holder: subprocess.Popen[bytes] | None) -> None:
    if holder is not None:
        holder.terminate()
        holder.wait()
