"""Routes that an application gets when they are first asked for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from mlx_overlay_server.api.late import Late
from starlette.types import Receive, Scope, Send


@pytest.mark.parametrize(
    ("asked", "completed"),
    [
        (["/"], 0),
        (["/v1/models", "/manage"], 0),
        (["/manage/v1/status"], 1),
        (["/openapi.json", "/manage/v1/status", "/manage/v1/models"], 1),
    ],
)
def test_an_application_is_completed_once_by_the_first_request_for_the_part(asked: list[str], completed: int) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])

    late = Late(app, ("/manage/", "/openapi.json"), lambda: seen.append("completed"))
    nothing: Any = None

    async def ask() -> None:
        for path in asked:
            await late({"type": "http", "path": path}, nothing, nothing)

    asyncio.run(ask())
    assert [each for each in seen if each != "completed"] == asked
    assert seen.count("completed") == completed
    assert not completed or seen[0] == "completed"


def test_a_start_imports_nothing_of_the_api_behind_the_page_nor_of_speech() -> None:
    late = (
        "mlx_overlay_server.api.manage",
        "mlx_overlay_server.api.audio",
        "mlx_audio",
        "soundfile",
    )
    program = f"import sys, mlx_overlay_server.app; print(set({late}) & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"
