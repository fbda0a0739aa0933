"""A model's folder comes from anywhere: whatever is in it, the engine answers, soon, and others are not harmed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import folder, loading, loads, tokenizers
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import ServerError, Unavailable
from mlx_overlay_server.settings import EngineOptions

from tests.server.engine.test_engine import say
from tests.support.models import make_model
from tests.support.processes import SECONDS
from tests.support.running import resident

SAYS = "I am well."

Spoil = Callable[[Path], object]


def run(use: Callable[[Engine], Awaitable[None]], **options: Any) -> None:
    """Use an engine whose loads are given up after a second without progress, or as `options` say."""

    async def main() -> None:
        engine = Engine(EngineOptions(**{"load_seconds": 1, **options}))
        engine.start()
        try:
            async with asyncio.timeout(SECONDS):
                await use(engine)
        finally:
            await engine.stop()
        assert not engine.is_stuck

    asyncio.run(main())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", SAYS)


@pytest.fixture
def well(tmp_path: Path) -> Path:
    return make_model(tmp_path / "well", SAYS)


def _pipe(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return spoil


def _link(name: str, target: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return spoil


def _socket(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        descriptor = os.open(model, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as listening:
            try:
                os.chdir(descriptor)  # a socket's path may have 100 bytes
                listening.bind(name)
            finally:
                os.close(descriptor)

    return spoil


def _huge(name: str) -> Spoil:
    def spoil(model: Path) -> None:
        with (model / name).open("ab") as file:
            file.truncate(folder.MAX_CONFIG_BYTES + 1)  # sparse

    return spoil


def _template_pipe(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    os.mkfifo(model / "additional_chat_templates" / "x.jinja")


HOSTILE: list[tuple[str, Spoil, str]] = [
    ("weights that are a pipe", _pipe("model-x.safetensors"), "model-x.safetensors is not a regular file"),
    ("a tokenizer that is a pipe", _pipe("tokenizer.json"), "tokenizer.json is not a regular file"),
    ("a template that is a pipe", _pipe("chat_template.jinja"), "chat_template.jinja is not a regular file"),
    ("a template in a folder that is a pipe", _template_pipe, "x.jinja is not a regular file"),
    ("endless sampling defaults", _link("generation_config.json", "/dev/zero"), "is not a regular file"),
    ("an endless tokenizer", _link("tokenizer_config.json", "/dev/zero"), "is not a regular file"),
    ("a tokenizer that is a socket", _socket("tokenizer.json"), "is not a regular file"),
    ("a huge tokenizer", _huge("tokenizer.json"), "not weights may have 128"),
    ("huge sampling defaults", _huge("generation_config.json"), "not weights may have 128"),
]


@pytest.mark.parametrize(("spoil", "reason"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_what_is_no_file_is_refused_with_the_reason_and_harms_no_other(
    spoil: Spoil, reason: str, model: Path, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    spoil(model)

    async def use(engine: Engine) -> None:
        with pytest.raises(Unavailable, match=reason) as caught:
            await resident(engine, model)
        assert caught.value.code == "model_load_failed"
        assert str(model) not in caught.value.message
        assert await say(engine, await resident(engine, well)) == SAYS

    run(use)


def test_a_draft_and_an_adapter_are_looked_at_as_well(model: Path, well: Path) -> None:
    _pipe("tokenizer.model")(model)

    async def use(engine: Engine) -> None:
        for extra in ("draft_path", "adapter_path"):
            extras: dict[str, Any] = {extra: str(model)}
            with pytest.raises(Unavailable, match=r"tokenizer\.model is not a regular file"):
                await resident(engine, well, **extras)

    run(use)


def test_links_to_files_and_files_that_nobody_opens_are_no_reason(model: Path, well: Path) -> None:
    (model / "tokenizer.json").rename(model.parent / "elsewhere")
    (model / "tokenizer.json").symlink_to(model.parent / "elsewhere")
    (model / "vocab.txt").symlink_to("nowhere")
    (model / "folder.json").mkdir()
    os.mkfifo(model / "README.md")

    async def use(engine: Engine) -> None:
        assert await say(engine, await resident(engine, model)) == SAYS

    run(use)


@pytest.mark.parametrize(
    "written",
    [
        {"temperature": "hot", "top_p": [1], "top_k": {}, "min_p": True, "repetition_penalty": "no"},
        {"temperature": float("nan"), "top_p": float("inf"), "top_k": 10**400, "min_p": -1, "repetition_penalty": 0},
        {"eos_token_id": {"a": 1}, "do_sample": "yes"},
        {"eos_token_id": ["</s>"]},
    ],
)
def test_sampling_defaults_of_wrong_types_are_ignored_with_a_line_in_the_log(
    written: dict[str, Any], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "generation_config.json").write_text(json.dumps(written))
    caplog.set_level(logging.WARNING, "mlx_overlay_server")

    async def use(engine: Engine) -> None:
        loaded = await resident(engine, model)
        assert loaded.defaults == {}
        assert await say(engine, loaded) == SAYS

    run(use)
    for name in written.keys() - {"do_sample"}:
        assert f"{name} is ignored" in caplog.text


def test_sampling_defaults_that_are_meant_stay(model: Path) -> None:
    written = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.1, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(written | {"bos_token_id": 1, "top_k": 20}))
    assert folder.sampling_defaults(model) == written


# Loads that do not end ------------------------------------------------------------------------------------------------


class Hang:
    """A call that hangs for the path of one model until it is released, as on a disk that does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, path: Path) -> None:
        self.has_begun = threading.Event()
        self.released = threading.Event()
        real = getattr(owner, name)

        def call(where: Any, *arguments: Any, **options: Any) -> Any:
            if Path(where) == path:
                self.has_begun.set()
                self.released.wait(SECONDS)
            return real(where, *arguments, **options)

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("owner", "name"), [(folder, "check"), (tokenizers, "load_tokenizer")])
def test_a_load_without_progress_is_given_up_and_others_go_on_meanwhile(
    owner: Any, name: str, model: Path, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Hang(monkeypatch, owner, name, model)

    async def use(engine: Engine) -> None:
        stuck = asyncio.create_task(resident(engine, model))
        assert await say(engine, await resident(engine, well)) == SAYS
        assert hang.has_begun.is_set()
        with pytest.raises(Unavailable, match="could not be read within 1 s"):
            await stuck

    run(use)
    hang.released.set()


def test_a_load_that_is_cancelled_leaves_nothing_and_costs_nobody(
    model: Path, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Hang(monkeypatch, tokenizers, "load_tokenizer", model)
    settled: list[str] = []
    settle = Engine.settle

    def noted(self: Engine, key: str, result: Loaded | ServerError) -> None:
        settled.append(key)
        settle(self, key, result)

    monkeypatch.setattr(Engine, "settle", noted)

    async def use(engine: Engine) -> None:
        stuck = asyncio.create_task(resident(engine, model))
        while not hang.has_begun.is_set():
            await asyncio.sleep(0.01)
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
        loaded: Loaded = await resident(engine, well)  # by now the worker has dropped the other
        hang.released.set()
        assert await say(engine, loaded) == SAYS
        assert settled == [loaded.key], "a load that was cancelled went on"

    run(use, load_seconds=3600)


def test_an_engine_stops_at_once_while_a_load_hangs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = Hang(monkeypatch, folder, "check", model)
    began = []

    async def use(engine: Engine) -> None:
        stuck = asyncio.create_task(resident(engine, model))
        while not hang.has_begun.is_set():
            await asyncio.sleep(0.01)
        stuck.cancel()
        began.append(time.monotonic())

    run(use, load_seconds=3600)
    assert time.monotonic() - began[0] < SECONDS / 2, "it waited for the load"
    hang.released.set()


def test_an_engine_held_by_a_disk_says_so_and_lets_nobody_wait(
    model: Path, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "HELD_SECONDS", 0.3)
    hang = Hang(monkeypatch, loading, "load_model", model)

    async def use(engine: Engine) -> None:
        loaded = await resident(engine, well)
        stuck = asyncio.create_task(resident(engine, model))
        while not hang.has_begun.is_set():
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(say(engine, loaded))
        while (held := engine.held) is None:
            await asyncio.sleep(0.01)
        assert held.path == str(model)
        for each in (stuck, waiting):
            with pytest.raises(Unavailable, match="waits for a disk that does not answer"):
                await each
        with pytest.raises(Unavailable, match="waits for a disk that does not answer"):
            await say(engine, loaded)
        hang.released.set()
        while engine.held:
            await asyncio.sleep(0.01)
        assert await say(engine, loaded) == SAYS

    run(use)
