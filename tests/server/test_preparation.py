"""What prepares requests: grammars are compiled once, images counted before they are decoded, panics contained."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from mlx_lm.tokenizer_utils import load
from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat.images import placed
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import ChatRequest, Format, Image, Message, TextRequest
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import Failed, InvalidRequest
from mlx_overlay_server.frames import result_of
from mlx_overlay_server.preparation import Preparation, grammars
from mlx_overlay_server.preparation.grammars import Grammars
from mlx_overlay_server.preparer import Process
from mlx_overlay_server.settings import EngineOptions, Limits
from PIL import ImageFile

from tests.support.loaded import loaded
from tests.support.models import make_model
from tests.support.processes import SECONDS
from tests.support.soak.requests import bomb


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(make_model(tmp_path_factory.mktemp("models") / "plain", '{"a": 1}'))


def test_a_grammar_is_compiled_once_for_all_who_want_it() -> None:
    made: list[str] = []

    async def check() -> None:
        await asyncio.sleep(0.01)

    async def main() -> None:
        kept = Grammars()

        async def get(name: str) -> Any:
            return await kept.get(("model", name), check=check, make=lambda: _noted(made, name))

        assert set(await asyncio.gather(*(get("a") for _ in range(5)))) == {"a"}
        assert made == ["a"], "compiled more than once"
        for number in range(grammars.KEPT):
            await get(str(number))
        await get("a")
        assert made.count("a") == 2, "more are kept than may be"
        kept.forget("model")
        await get("a")
        assert made.count("a") == 3, "the grammar of a model that was unloaded is kept"

    asyncio.run(main())


def _noted(made: list[str], name: str) -> str:
    made.append(name)
    return name


def test_one_grammar_serves_all_answers_of_a_request_and_the_next(
    model: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that checks a grammar compiles it, too: here only the server's own work is counted."""
    compiled: list[str] = []
    original = grammar.compiled

    def counted(constraint: Any, model: Loaded) -> Any:
        compiled.append(constraint.grammar)
        return original(constraint, model)

    monkeypatch.setattr(grammar, "compiled", counted)
    request = ChatRequest("org/m", n=8, messages=(Message("user", ("Hi",)),), format=Format({"type": "object"}))

    async def main() -> None:
        preparation = Preparation(Engine(EngineOptions()), Limits())
        preparation.start()
        try:
            for _ in range(2):
                answers = await preparation.answers(model, request)
                matchers = [answer.submit.matcher for answer in answers]
                assert len(set(map(id, matchers))) == 8, "answers share a matcher, which has a state"
        finally:
            await preparation.stop()

    asyncio.run(main())
    assert len(compiled) == 1


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    small, large = (_image(bomb(side), f"images[{side}]") for side in (6000, 9400))
    for images in ((large, large), (small, small, small)):
        with pytest.raises(InvalidRequest, match="pixels together") as caught:
            placed(cast("Loaded", None), "", images)
        assert caught.value.param == images[-1].where


def _image(url: str, where: str) -> Image:
    return Image(base64.b64decode(url.partition(",")[2]), where)


def test_a_panic_is_an_error_of_its_request_and_its_text_is_not_told() -> None:
    class PanicException(BaseException):
        """As pyo3's, which is no Exception."""

    def panic() -> None:
        raise PanicException("byte index 3 is not a char boundary of `my secret`")

    result = result_of(panic)
    assert result.unexpected is not None
    assert result.unexpected.startswith("PanicException at ")
    assert "secret" not in result.unexpected


@pytest.mark.slow
def test_a_process_that_dies_fails_its_request_alone(model: Loaded) -> None:
    async def main() -> None:
        preparation = Preparation(Engine(EngineOptions()), Limits())
        preparation.start()
        try:
            asked = TextRequest(model.path, prompts=("a",))
            await preparation.answers(model, asked)
            lanes = preparation._lanes
            for process in list(lanes._processes):
                process._popen.kill()
            results = await asyncio.gather(
                *(preparation.answers(model, asked) for _ in range(3)), return_exceptions=True
            )
            assert all(isinstance(each, (list, Failed)) for each in results), results
            (answer,) = await preparation.answers(model, asked)
            assert answer.submit.prompt
        finally:
            await preparation.stop()

    asyncio.run(main())


def test_a_model_is_copied_without_what_belongs_to_a_process(model: Loaded) -> None:
    assert model.grammar_tokenizer is not None
    copy: Loaded = pickle.loads(pickle.dumps(model))
    assert copy.tokenizer.encode("Hi!") == model.tokenizer.encode("Hi!")
    assert copy.grammar_tokenizer is not model.grammar_tokenizer


def test_a_tokenizer_that_is_code_of_its_model_prepares_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --trust-remote-code, the tokenizer's class is in a module that only the server has found so far."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = make_model(tmp_path / "own", "Hi")
    plain = loaded(folder)
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(folder, {"trust_remote_code": True}, eos_token_ids=list(plain.tokenizer.eos_token_ids))
    assert type(tokenizer._tokenizer).__name__ == "OwnTokenizer"
    own = dataclasses.replace(plain, tokenizer=tokenizer)

    async def main() -> None:
        preparation = Preparation(Engine(EngineOptions()), Limits())
        preparation.start()
        try:
            (answer,) = await preparation.answers(own, TextRequest("own", prompts=("a",)))
            assert list(answer.submit.prompt) == plain.tokenizer.encode("a")
        finally:
            await preparation.stop()

    asyncio.run(main())


def test_a_model_that_was_unloaded_is_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        preparation = Preparation(Engine(EngineOptions()), Limits())
        preparation.start()
        try:
            brief = loaded(make_model(tmp_path / "brief", "Hi"))
            await preparation.answers(brief, TextRequest("brief", prompts=("a",)))
            assert preparation._lanes._models
            del brief
            async with asyncio.timeout(SECONDS):
                while preparation._lanes._models:
                    gc.collect()
                    await asyncio.sleep(0.01)
        finally:
            await preparation.stop()

    asyncio.run(main())


def test_processes_are_started_without_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork waits for ever in a process that has threads of a BLAS library."""
    started: list[int] = []
    original = os.posix_spawn

    def posix_spawn(*arguments: Any, **options: Any) -> int:
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(os, "posix_spawn", posix_spawn)

    async def main() -> None:
        process = Process()
        assert started == [process.pid]
        await process.ready()
        await process.close()

    asyncio.run(main())
