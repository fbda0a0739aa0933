"""Keeps a Mac awake while there is work: when it falls asleep for want of a user, generations and downloads stop.

Only the sleep of an idle machine is held off, and only meanwhile: a closed lid or an empty battery puts it to sleep.
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
"""Seconds between two looks whether there is work; a Mac falls asleep after a minute at the earliest."""


async def keep_awake(has_work: Callable[[], bool], *, seconds: float = LOOK_SECONDS) -> None:
    """Hold macOS's power assertion whenever `has_work` returns True, until this is cancelled; nothing elsewhere."""
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
    """Start what holds the assertion: until it is ended, or this process is gone. None where it cannot be started."""
    with suppress(OSError):
        return subprocess.Popen(
            [tool, "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # without a fork: see children
        )
    return None


def _end(holder: subprocess.Popen[bytes] | None) -> None:
    if holder is not None:
        holder.terminate()
        holder.wait()
