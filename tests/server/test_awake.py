"""A Mac stays awake while the server has work, by a `caffeinate` that writes down what it is asked."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlx_overlay_server.awake import keep_awake

from tests.support.processes import SECONDS

CAFFEINATE = """#!/bin/sh
trap 'rm HELD; exit 0' TERM
echo "$*" > HELD
while :; do sleep 0.02; done
"""


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that is there while the assertion is held, on what looks like a Mac."""
    held, tool = tmp_path / "held", tmp_path / "bin/caffeinate"
    tool.parent.mkdir()
    tool.write_text(CAFFEINATE.replace("HELD", str(held)))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    return held


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not is_true():
            await asyncio.sleep(0.01)


def test_it_is_held_while_there_is_work_and_no_longer(held: Path) -> None:
    async def live() -> None:
        work: list[str] = []
        task = asyncio.create_task(keep_awake(lambda: bool(work), seconds=0.01))
        for _ in range(2):
            await asyncio.sleep(0.05)
            assert not held.exists(), "nothing to do, and it may not sleep"
            work.append("a request")
            await until(held.exists)
            work.clear()
            await until(lambda: not held.exists())
        work.append("a download")
        await until(held.exists)
        # -i: the sleep of an idle machine alone; -w: no longer than this process lives, even if it is killed
        await until(lambda: held.read_text() == f"-i -w {os.getpid()}\n")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not held.exists(), "the server has ended"

    asyncio.run(live())


def test_where_nothing_can_hold_it_the_server_works_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for platform in ("darwin", "linux"):
        monkeypatch.setattr(sys, "platform", platform)
        asyncio.run(asyncio.wait_for(keep_awake(lambda: True), SECONDS))
