"""Where the server finds a model, and what its clients learn while that cannot be found out."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import hf_overlay
import pytest
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.models.library import Library, Listed

from tests.support.folders import lay_model
from tests.support.processes import SECONDS


def test_an_id_is_located_under_the_spelling_of_the_disk(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the pool knows it for the same model."""
    monkeypatch.setattr("hf_overlay.catalog.spelling._is_same", lambda path, other: path.lower() == other.lower())
    lay_model(models / "org/Qwen3")
    with hf_overlay.open_session([models]) as session:
        library = Library(session, None)
        located = [asyncio.run(library.locate(each)) for each in ("org/qwen3", "org/Qwen3")]
    assert located[0] == located[1]
    assert located[0].id == "org/Qwen3"


def test_without_a_free_descriptor_clients_are_told_to_come_back_and_never_that_a_model_is_gone(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_model(models / "org/mine")
    with hf_overlay.open_session([models]) as session:
        library = Library(session, None)

        def fails(*_: object) -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", fails)
            for asked in (library.locate("org/mine"), library.listed()):
                with pytest.raises(Unavailable, match="too many open files"):
                    asyncio.run(asked)
        assert asyncio.run(library.locate("org/mine")).id == "org/mine"


def test_lists_that_are_asked_for_together_share_one_look_and_none_is_older_than_its_request(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_model(models / "org/first")
    with hf_overlay.open_session([models]) as session:
        library = Library(session, None)
        looks, may_end, look = [], threading.Event(), library._list

        def slowly() -> list[Listed]:
            found = look()
            looks.append(found)
            may_end.wait(SECONDS)
            return found

        monkeypatch.setattr(library, "_list", slowly)

        async def ask() -> list[list[str]]:
            first = asyncio.create_task(library.listed())
            while not looks:
                await asyncio.sleep(0.001)
            lay_model(models / "org/second")
            others = [asyncio.create_task(library.listed()) for _ in range(8)]
            await asyncio.sleep(0.01)
            others[0].cancel()  # a client that leaves takes no answer from the others
            may_end.set()
            return [[each.id for each in await task] for task in (first, *others[1:])]

        assert asyncio.run(ask()) == [["org/first"], *[["org/first", "org/second"]] * 7]
        assert len(looks) == 2
        assert len(asyncio.run(library.listed())) == 2, "and again in another loop"
