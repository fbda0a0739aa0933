"""A model that embeds, in the engine: long texts, texts of several requests, and what goes wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.encoding.loaded import LoadedEncoder, Passage
from mlx_overlay_server.engine.commands import Encode, Submit
from mlx_overlay_server.engine.encoding import parts
from mlx_overlay_server.errors import Failed, InvalidRequest, Unavailable
from mlx_overlay_server.settings import EngineOptions

from tests.server.encoding.encoding import encode, load
from tests.server.engine.test_engine import run, say
from tests.support.encoders import VOCABULARY, make_encoder
from tests.support.models import make_model
from tests.support.running import resident


def _passages(*sizes: int) -> tuple[Passage, ...]:
    draw = np.random.default_rng(sum(sizes))
    return tuple(Passage(tuple(draw.integers(4, len(VOCABULARY), size).tolist()), size) for size in sizes)


@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_a_long_text_is_read_in_parts_between_those_of_others(mode: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "m", "qwen3", modes=(mode,))
    whole = load(folder, "embedding", EngineOptions(prefill_step=4096, max_stall_ms=100_000))
    parts = load(folder, "embedding", EngineOptions(prefill_step=64))
    long, short = _passages(400, 300), _passages(*[20] * 3)
    runner_of_parts: Any = parts
    parts.add(Encode(1, "key", long))
    parts.add(Encode(2, "key", short))
    done: dict[int, Any] = {}
    order = []
    for _ in range(200):
        for id_, item in parts.step():
            order.append(id_)
            done[id_] = item
        if not parts.is_busy:
            break
    assert order == [2, 1], "short texts waited for long ones"
    assert not runner_of_parts._long
    np.testing.assert_allclose(done[1].rows, encode(whole, long), atol=1e-4)
    np.testing.assert_allclose(done[2].rows, encode(whole, short), atol=1e-4)


def test_what_is_cancelled_is_read_no_further(tmp_path: Path) -> None:
    runner = load(make_encoder(tmp_path / "m", "qwen3"), "embedding", EngineOptions(prefill_step=64))
    runner.add(Encode(1, "key", _passages(300)))
    runner.add(Encode(2, "key", _passages(5, 6)))
    runner.step()
    runner.cancel(1)
    runner.cancel(7)
    assert [id_ for _ in range(3) if runner.is_busy for id_, _ in runner.step()] == [2]
    assert not runner.is_busy


def test_a_pass_that_fails_costs_its_own_requests_and_no_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds, chats = make_encoder(tmp_path / "m"), make_model(tmp_path / "chats", "I am fine.")
    read = parts.batch_of
    broken: list[bool] = []

    def breaks_once(texts: Any) -> Any:
        if not broken:
            broken.append(True)
            raise MemoryError("no memory for the text: secret")
        return read(texts)

    monkeypatch.setattr("mlx_overlay_server.engine.encoding.runner.batch_of", breaks_once)

    async def use(engine: Any) -> None:
        model, chat = await resident(engine, embeds, task="embedding"), await resident(engine, chats)
        assert isinstance(model, LoadedEncoder)
        told = await asyncio.gather(engine.encode(model, _passages(3)), say(engine, chat), return_exceptions=True)
        assert isinstance(told[0], Failed)
        assert "secret" not in told[0].message
        assert told[1] == "I am fine."
        assert (await engine.encode(model, _passages(3, 4))).shape == (2, 32)
        await engine.warm_up(model)
        assert engine.stats.active == 0
        engine.unload(model)
        with pytest.raises(Unavailable, match="unloaded"):
            await engine.encode(model, _passages(3))

    run(use)


def test_a_model_is_not_asked_for_what_it_does_not_do(tmp_path: Path) -> None:
    async def use(engine: Any) -> None:
        model = await resident(engine, make_encoder(tmp_path / "m"), task="embedding")
        chat = await resident(engine, make_model(tmp_path / "chats", "I am fine."))
        wrong = Submit(engine.new_id(), model.key, (4, 5), Params(), 3)
        (_, item), *_ = await engine.submit([wrong]).take()
        assert isinstance(item, (Failed, InvalidRequest))
        with pytest.raises((Failed, InvalidRequest)):
            await engine.encode(chat, _passages(3))

    run(use)
