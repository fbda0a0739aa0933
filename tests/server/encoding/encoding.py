"""Models that embed or rank, loaded and used in the thread of a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_overlay import Task
from mlx_overlay_server.encoding import texts
from mlx_overlay_server.encoding.loaded import Passage
from mlx_overlay_server.encoding.requests import EmbedRequest, RankRequest
from mlx_overlay_server.engine import mlx  # noqa: F401 - before anything else imports mlx-lm
from mlx_overlay_server.engine.commands import Encode, Encoded, Load
from mlx_overlay_server.engine.encoding import loading
from mlx_overlay_server.engine.encoding.runner import EncodingRunner
from mlx_overlay_server.settings import EngineOptions, Limits

LIMITS = Limits()


def load(folder: Path, task: Task, options: EngineOptions = EngineOptions()) -> EncodingRunner:  # noqa: B008 - frozen
    *_, runner = loading.load(Load("key", str(folder), task=task), options, None)
    assert isinstance(runner, EncodingRunner)
    return runner


def encode(runner: EncodingRunner, passages: Sequence[Passage], id_: int = 1) -> Any:
    """What the model makes of some passages: a row for each."""
    runner.add(Encode(id_, "key", tuple(passages)))
    for _ in range(1000):
        for made, item in runner.step():
            if made == id_:
                assert isinstance(item, Encoded)
                return item.rows
    raise AssertionError("the passages were not read")


def embedded(folder: Path, *given: str) -> Any:
    """The vectors of some texts."""
    runner = load(folder, "embedding")
    return encode(runner, texts.read(runner.loaded, EmbedRequest("m", given), LIMITS))


def ranked(folder: Path, query: str, *documents: str) -> Any:
    """The logits of some documents."""
    runner = load(folder, "reranker")
    return encode(runner, texts.read(runner.loaded, RankRequest("m", query, documents), LIMITS))
