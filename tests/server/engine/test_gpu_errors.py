"""An error of the GPU may belong to another model than the one that gets it: nobody goes on with what it has spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_overlay_server.chat.grammar import Constraint
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import alone, mlx
from mlx_overlay_server.engine.commands import Load, Sampled
from mlx_overlay_server.engine.runner import Runner
from mlx_overlay_server.errors import ServerError, Unavailable
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_model, make_random_model
from tests.support.stage import Script, Stage, sequence, until

_METAL = "[METAL] Command buffer execution failed: "
MEMORY = _METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
TIME = _METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
ALLOCATION = "[malloc] Unable to allocate 34359738368 bytes."
ALONE = Params(temperature=1, seed=3)


@pytest.fixture(scope="module")
def says(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "says", "I am one.")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "endless")


class Breaks:
    """What stands in for `Runner.step`: the next step of a model raises, once it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.next: tuple[str, str] | None = None
        """The key of the model, and the error's text."""
        step = Runner.step

        def breaks(runner: Runner) -> Any:
            if self.next is not None and runner.loaded.key == self.next[0]:
                text, self.next = self.next[1], None
                raise RuntimeError(text)
            return step(runner)

        monkeypatch.setattr(Runner, "step", breaks)


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Breaks:
    return Breaks(monkeypatch)


def _last(stage: Stage, id_: int) -> ServerError:
    last = stage.items[id_][-1]
    assert isinstance(last, ServerError), last
    return last


@pytest.mark.parametrize(("text", "code"), [(MEMORY, "gpu_out_of_memory"), (TIME, "gpu_timeout")])
def test_a_late_error_ends_the_sequences_of_all_models_and_all_loads(
    text: str, code: str, says: Path, endless: Path, breaks: Breaks
) -> None:
    def script(stage: Stage) -> Script:
        yield [Load("a", str(says)), Load("b", str(endless))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(1, "a")]
        yield from until(lambda: stage.is_over(1))
        assert stage.stats.cache_entries == 1
        yield [sequence(2, "b", max_tokens=10**6), sequence(3, "b", max_tokens=10**6, params=ALONE)]
        yield from until(lambda: stage.has_begun(2) and stage.has_begun(3))
        breaks.next = ("a", text)
        yield [sequence(4, "a"), Load("c", str(endless))]
        yield from until(lambda: breaks.next is None)
        yield []
        for id_ in (2, 3, 4):
            error = _last(stage, id_)
            assert isinstance(error, Unavailable)
            assert error.code == code
        load = stage.settled["c"]
        assert isinstance(load, Unavailable)
        assert load.code == code
        assert stage.stats.cache_entries == 0, "a kept KV cache may hold anything"
        assert (stage.stats.failures, stage.stats.active) == (1, 0)
        yield [sequence(5, "a"), sequence(6, "b", max_tokens=3), Load("c", str(says))]
        del stage.settled["c"]
        yield from until(lambda: stage.is_over(5) and stage.is_over(6) and stage.loaded("c"))

    stage = Stage(EngineOptions()).play(script)
    assert [type(item) for item in (stage.items[5][-1], stage.items[6][-1])] == [Sampled, Sampled]
    assert not isinstance(stage.settled["c"], ServerError)


def test_who_got_the_last_token_in_the_turn_of_a_late_error_gets_it(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Runner.step
    ended: list[int] = []

    def breaks(runner: Runner) -> Any:
        if runner.loaded.key == "b" and ended:
            raise RuntimeError(MEMORY)
        made = step(runner)
        ended.extend(id_ for id_, item in made if isinstance(item, Sampled) and item.finish is not None)
        return made

    monkeypatch.setattr(Runner, "step", breaks)

    def script(stage: Stage) -> Script:
        yield [Load("a", str(endless)), Load("b", str(endless))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(1, "a", max_tokens=2), sequence(2, "b", max_tokens=10**6)]
        yield from until(lambda: stage.is_over(1) and stage.is_over(2))

    stage = Stage(EngineOptions()).play(script)
    assert [type(stage.items[id_][-1]) for id_ in (1, 2)] == [Sampled, Unavailable]


def test_a_late_error_while_a_request_is_taken_on_loses_no_other_command(
    says: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Runner.add

    def breaks(runner: Runner, submit: Any) -> None:
        if submit.id == 2:
            raise RuntimeError(MEMORY)
        add(runner, submit)

    monkeypatch.setattr(Runner, "add", breaks)

    def script(stage: Stage) -> Script:
        yield [Load("a", str(says))]
        yield from until(lambda: stage.loaded("a"))
        yield [sequence(1, "a"), sequence(2, "a"), sequence(3, "a")]
        yield from until(lambda: all(stage.is_over(id_) for id_ in (1, 2, 3)))

    stage = Stage(EngineOptions()).play(script)
    assert [type(stage.items[id_][-1]) for id_ in (1, 2, 3)] == [Unavailable, Unavailable, Sampled]


def test_a_sequence_that_runs_alone_passes_a_late_error_on(endless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*arguments: Any, **options: Any) -> Any:
        drawn = generate_step(*arguments, **options)
        yield next(drawn)
        raise RuntimeError(TIME)

    monkeypatch.setattr(alone, "generate_step", breaks)

    def script(stage: Stage) -> Script:
        yield [Load("a", str(endless))]
        yield from until(lambda: stage.loaded("a"))
        yield [sequence(1, "a", max_tokens=10**6), sequence(2, "a", max_tokens=10**6, params=ALONE)]
        yield from until(lambda: stage.is_over(1) and stage.is_over(2))

    stage = Stage(EngineOptions()).play(script)
    assert [_last(stage, id_).code for id_ in (1, 2)] == ["gpu_timeout", "gpu_timeout"]


@pytest.mark.parametrize("params", [Params(temperature=0), ALONE], ids=["in the batch", "alone"])
def test_memory_that_cannot_be_had_ends_only_those_who_asked_for_it(
    params: Params, endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an error is raised at once, by what asked: no other model has any part in it."""
    step, drawn = Runner._step_batch, alone._Running._run

    def breaks(runner: Runner, *, may_read: bool) -> Any:
        if runner.loaded.key == "a":
            raise RuntimeError(ALLOCATION)
        return step(runner, may_read=may_read)

    def breaks_alone(running: alone._Running) -> Any:
        if running._loaded.key == "a":
            raise RuntimeError(ALLOCATION)
        yield from drawn(running)

    monkeypatch.setattr(Runner, "_step_batch", breaks)
    monkeypatch.setattr(alone._Running, "_run", breaks_alone)

    def script(stage: Stage) -> Script:
        yield [Load("a", str(endless)), Load("b", str(endless))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(1, "a", params=params), sequence(2, "b", max_tokens=5)]
        yield from until(lambda: stage.is_over(1) and stage.is_over(2))

    stage = Stage(EngineOptions()).play(script)
    assert (_last(stage, 1).status, _last(stage, 1).code) == (503, "gpu_out_of_memory")
    assert isinstance(stage.items[2][-1], Sampled)


def test_a_batch_that_fails_takes_the_kept_prefixes_of_its_model_along(
    says: Path, endless: Path, breaks: Breaks
) -> None:
    """One of them may be among what was not computed."""

    def script(stage: Stage) -> Script:
        yield [Load("a", str(says)), Load("b", str(says))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(1, "a"), sequence(2, "b")]
        yield from until(lambda: stage.is_over(1) and stage.is_over(2))
        assert stage.stats.cache_entries == 2
        breaks.next = ("a", "no matter what")
        yield [sequence(3, "a")]
        yield from until(lambda: stage.is_over(3))
        assert stage.stats.cache_entries == 1

    Stage(EngineOptions()).play(script)


class _Breaks:
    """A grammar's matcher that has to wait for the GPU, which has failed meanwhile."""

    problem = None

    def __call__(self, *_: Any) -> Any:
        raise RuntimeError(MEMORY)


@pytest.mark.parametrize("params", [Params(temperature=0), ALONE], ids=["in the batch", "alone"])
def test_a_late_error_in_a_request_s_own_grammar_is_not_its_alone(params: Params, endless: Path) -> None:
    def script(stage: Stage) -> Script:
        yield [Load("a", str(endless)), Load("b", str(endless))]
        yield from until(lambda: stage.loaded("a", "b"))
        yield [sequence(1, "b", max_tokens=10**6)]
        yield from until(lambda: stage.has_begun(1))
        yield [sequence(2, "a", params=params, constraint=Constraint("{}"), matcher=_Breaks())]
        yield from until(lambda: stage.is_over(1) and stage.is_over(2))

    stage = Stage(EngineOptions()).play(script)
    assert [_last(stage, id_).code for id_ in (1, 2)] == ["gpu_out_of_memory"] * 2


def test_errors_that_mlx_keeps_are_dropped_before_anybody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, list[str]] = {}

    def synchronize(stream: str) -> None:
        if kept[stream]:
            raise RuntimeError(kept[stream].pop())

    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "default_stream", lambda device: "gpu" if device == mx.gpu else "cpu")
    monkeypatch.setattr(mx, "synchronize", synchronize)
    kept |= {"gpu": [MEMORY], "cpu": [MEMORY]}
    mlx.drain()
    assert kept == {"gpu": [], "cpu": []}
    kept |= {"gpu": [MEMORY] * 5}
    mlx.drain()  # a GPU that goes on failing holds nobody up
    assert len(kept["gpu"]) == 3
