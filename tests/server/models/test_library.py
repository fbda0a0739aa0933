"""Where the server finds a model, and what its clients learn while that cannot be found out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import hf_overlay
import pytest
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.models.library import Library

from tests.support.folders import lay_model


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
