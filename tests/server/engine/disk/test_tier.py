"""KV caches on disk never hold up the engine nor fail it, and nothing that was spoilt gets there."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import mlx, restoring
from mlx_overlay_server.engine.commands import Cancel, Load, Prefilled, Submit, Unload
from mlx_overlay_server.engine.disk import store, tier
from mlx_overlay_server.engine.disk.store import Store
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_random_model
from tests.support.stage import Script, Stage, until

PROMPT = tuple(97 + at * at % 26 for at in range(600))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "endless")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tier, "folder", lambda: str(tmp_path / "kv"))
    return tmp_path / "kv"


def _ask(id_: int, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 3) -> Submit:
    return Submit(id_, "m", prompt, Params(temperature=0), max_tokens)


def play(folder: Path, *ids: int, prompt: tuple[int, ...] = PROMPT, **options: Any) -> Stage:
    """Ask the same, one after another."""

    def script(stage: Stage) -> Script:
        yield [Load("m", str(folder))]
        yield from until(lambda: stage.loaded("m"))
        for id_ in ids:
            yield [_ask(id_, prompt)]
            while not stage.is_over(id_):
                yield []

    return Stage(EngineOptions(**options)).play(script)


def cached(stage: Stage, id_: int) -> int:
    return next(item.cached for item in stage.items[id_] if isinstance(item, Prefilled))


def test_without_a_disk_nothing_is_written(place: Path, folder: Path) -> None:
    assert cached(play(folder, 1, 2, kv_disk=0), 2) == len(PROMPT) - 1
    assert not place.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_costs_no_answer(
    code: int, place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("mlx_overlay_server.engine.disk.store._write", fails)
    stage = play(folder, 1, 2)
    assert cached(stage, 2) == len(PROMPT) - 1
    said = [record.message for record in caplog.records if "not written to disk" in record.message]
    assert len(said) == 1
    assert os.strerror(code) in said[0]
    assert not list(place.glob("*.safetensors*"))


def test_what_could_not_be_written_is_at_the_end_where_the_disk_has_room_again(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, attempts = store._write, itertools.count()

    def fails_once(*arguments: Any) -> None:
        if next(attempts) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(store, "_write", fails_once)

    def script(stage: Stage) -> Script:
        yield [Load("m", str(folder))]
        yield from until(lambda: stage.loaded("m"))
        yield [_ask(1)]
        while not stage.stats.disk.failures:
            time.sleep(0.005)
            yield []
        assert not list(place.glob("*.safetensors"))

    Stage(EngineOptions()).play(script)
    assert len(list(place.glob("*.safetensors"))) == 2


def test_a_folder_that_cannot_be_made_costs_no_answer(place: Path, folder: Path) -> None:
    place.write_text("a file")
    assert cached(play(folder, 1, 2), 2) == len(PROMPT) - 1


def test_a_disk_that_does_not_answer_holds_up_nobody_for_long(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    play(folder, 1)
    answers = threading.Event()
    read = Store.read

    def hangs(files: Store, name: str) -> memoryview:
        answers.wait(60)
        return read(files, name)

    monkeypatch.setattr(Store, "read", hangs)
    monkeypatch.setattr(restoring, "SILENT_SECONDS", 0.1)
    try:
        stage = play(folder, 1, 2, prompt=(*PROMPT, 97))
    finally:
        answers.set()
    assert (cached(stage, 1), cached(stage, 2)) == (0, len(PROMPT))
    assert "does not answer" in caplog.text


def test_others_generate_while_one_waits_for_the_disk(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(folder, 1)
    answers = threading.Event()
    read = Store.read

    def waits(files: Store, name: str) -> memoryview:
        assert answers.wait(60)
        return read(files, name)

    monkeypatch.setattr(Store, "read", waits)

    def script(stage: Stage) -> Script:
        yield [Load("m", str(folder))]
        yield from until(lambda: stage.loaded("m"))
        yield [_ask(1), _ask(2, (65, 66, 67)), _ask(3), _ask(4)]
        yield from until(lambda: stage.is_over(2))
        assert not stage.items.get(1)
        yield [Cancel(3)]
        answers.set()
        yield from until(lambda: stage.is_over(1) and stage.is_over(4))
        assert stage.stats.disk.restored == cached(stage, 1)
        yield [_ask(5, PROMPT[::-1]), _ask(6, PROMPT)]
        yield [Unload("m")]
        assert isinstance(stage.items[5][-1], Unavailable)

    stage = Stage(EngineOptions()).play(script)
    assert cached(stage, 1) == 512
    assert cached(stage, 4) >= 512, "what was read for one serves the next"
    assert 3 not in stage.items
    assert not stage.worker._restoring


def test_a_model_that_is_unloaded_meanwhile_leaves_nobody_waiting(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(folder, 1)
    answers = threading.Event()
    monkeypatch.setattr(Store, "read", lambda *_: answers.wait(60))

    def script(stage: Stage) -> Script:
        yield [Load("m", str(folder))]
        yield from until(lambda: stage.loaded("m"))
        yield [_ask(1), _ask(2)]
        yield [Unload("m")]
        assert all(isinstance(stage.items[id_][-1], Unavailable) for id_ in (1, 2))
        answers.set()

    assert not Stage(EngineOptions()).play(script).worker._restoring


def test_what_a_late_error_of_the_gpu_has_spoilt_is_not_written(
    place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:…OutOfMemory).")

    monkeypatch.setattr(mlx, "settle", fails)
    stage = play(folder, 1)
    assert stage.stats.failures == 1
    assert not list(place.glob("*.safetensors*"))


def test_a_kv_cache_that_memory_has_no_room_for_is_not_read(place: Path, folder: Path) -> None:
    play(folder, 1)
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    assert cached(play(folder, 1, cache_bytes=size * 3 // 4), 1) == 256, "as much as there is room for"
    assert cached(play(folder, 1, cache_bytes=size // 4), 1) == 0


# What waits to be written counts as memory --------------------------------------------------------------------------


@pytest.fixture
def blocked(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A writer that waits; call it to let it go."""
    goes = threading.Event()
    write = Store.write

    def waits(*arguments: Any) -> bool:
        assert goes.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Store, "write", waits)
    yield goes.set
    goes.set()


def test_what_waits_to_be_written_is_counted_until_it_is(blocked: Callable[[], None], folder: Path) -> None:
    def script(stage: Stage) -> Script:
        yield [Load("m", str(folder))]
        yield from until(lambda: stage.loaded("m"))
        yield [_ask(1)]
        yield from until(lambda: stage.is_over(1))
        prefixes: PrefixCache = stage.worker._prefixes
        kept = prefixes.nbytes
        prefixes.trim(0)
        assert (len(prefixes), prefixes.nbytes) == (0, kept)
        blocked()
        while prefixes.nbytes:
            time.sleep(0.005)
            yield []

    stage = Stage(EngineOptions()).play(script)
    assert stage.worker._prefixes.nbytes == 0


def test_more_than_there_is_memory_for_does_not_wait(blocked: Callable[[], None], place: Path, folder: Path) -> None:
    def script(stage: Stage) -> Script:
        yield [Load("m", str(folder))]
        yield from until(lambda: stage.loaded("m"))
        for id_ in range(4):
            yield [_ask(id_, (65 + id_, *PROMPT))]
            yield from until(lambda id_=id_: stage.is_over(id_))  # type: ignore[misc]
        assert stage.worker._prefixes.disk is not None
        assert stage.worker._prefixes.disk.held <= 10**6
        blocked()

    Stage(EngineOptions(cache_bytes=10**6)).play(script)
    assert len(list(place.glob("*.safetensors"))) >= 2  # all four, if the first two are written before the engine ends
