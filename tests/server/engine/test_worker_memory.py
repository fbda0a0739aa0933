"""What the engine remembers of a sequence is gone once it has ended, however it ends: a server runs for months.

The worker runs in the test's own thread, on commands that a script hands it, so that nothing depends on time.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_overlay_server.chat.grammar import Constraint
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import (
    Cancel,
    Command,
    Item,
    Load,
    Prefilled,
    ReadTokenizer,
    Sampled,
    Stats,
    Stop,
    Submit,
    Unload,
)
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.worker import Worker
from mlx_overlay_server.errors import Failed, ServerError, Unavailable
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_model, make_random_model
from tests.support.running import resident
from tests.support.stage import Script as StageScript
from tests.support.stage import Stage, sequence, until

KEY = "0:model"
ID = 7_000_001
"""Like no number of any other kind."""
_STEPS = 500


class Script:
    """The other side of the worker: commands, each handed over when the one before has had its effect."""

    def __init__(self, commands: Sequence[Command], options: EngineOptions, until: Callable[[Script], bool]) -> None:
        self.options = options
        self.read_tokenizer: ReadTokenizer | None = None
        self.items: list[Item] = []
        self.settled: AnyLoaded | ServerError | None = None
        self._commands = list(commands)
        self._until = until
        self._turns = 0

    def take(self, seconds: float) -> list[Command]:
        self._turns += 1
        assert self._turns < _STEPS, f"nothing ends the sequence; it was told {self.items[-3:]}"
        if self.settled is None and self._turns > 1:
            return []
        if self._commands and (self._turns == 1 or isinstance(self._commands[0], Submit) or self._until(self)):
            return [self._commands.pop(0)]
        return [Stop()] if not self._commands and self._until(self) else []

    def wake(self) -> None:
        pass

    def post(self, items: list[tuple[int, Item]], stats: Stats) -> None:
        self.items += [item for id_, item in items if id_ == ID]

    def has_read(self, key: str, nbytes: int) -> None:
        pass

    def reading(self, key: str) -> AbstractContextManager[None]:
        return nullcontext()

    def settle(self, key: str, result: AnyLoaded | ServerError) -> None:
        self.settled = result

    def finish(self) -> None:
        pass

    def end(self, reason: str) -> None:
        pytest.fail(reason)


def remembered(holder: object) -> dict[str, Any]:
    """The containers of a part of the engine, and of the parts it is made of, that hold anything."""
    found: dict[str, Any] = {}
    for name, held in getattr(holder, "__dict__", {}).items():
        if type(held) in (dict, set, list) and held:
            found[name] = held
        elif type(held).__module__.startswith("mlx_overlay_server.engine") and not isinstance(held, PrefixCache):
            found |= {f"{name}.{inner}": value for inner, value in remembered(held).items()}
    return found


def is_over(script: Script) -> bool:
    """Whether the sequence was told that it has ended."""
    last = script.items[-1] if script.items else None
    return isinstance(last, ServerError) or (isinstance(last, Sampled) and last.finish is not None)


def has_begun(script: Script) -> bool:
    return any(isinstance(item, Sampled) for item in script.items)


def play(
    folder: Path,
    *commands: Command,
    monkeypatch: pytest.MonkeyPatch,
    options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    until: Callable[[Script], bool] = is_over,
) -> tuple[Script, Worker]:
    """Load a model, play commands, and stop: what was told, and the worker as it is just before it ends."""
    script = Script([Load(KEY, str(folder)), *commands], options, until)
    worker = Worker(script)
    monkeypatch.setattr(worker, "_runners", _Kept())
    worker.run()
    return script, worker


class _Kept(dict[str, Any]):
    """Models that stay to be looked at when the worker has ended."""

    def clear(self) -> None:
        pass


def submit(prompt: Sequence[int] = (72, 105), max_tokens: int = 20, **params: Any) -> Submit:
    return Submit(ID, KEY, tuple(prompt), Params(**{"temperature": 0, **params}), max_tokens)


def numbered(engine: Engine, model: Loaded, submits: Sequence[Submit]) -> list[Submit]:
    """The same sequences for a loaded model, each with an id of its own."""
    return [replace(each, id=engine.new_id(), key=model.key) for each in submits]


def check_forgotten(worker: Worker) -> None:
    """Nothing of the sequence is left, in the worker nor in its model's runner."""
    runners = dict(worker._runners)
    left = {name: held for name, held in remembered(worker).items() if name != "_runners"}
    assert left == {}, "the worker still remembers the sequence"
    for runner in runners.values():
        held = remembered(runner)
        held.pop("_pace._rates", None)  # the model's speed: one number for each doubling of the context
        assert held == {}, "the runner still remembers the sequence"


@pytest.fixture(scope="module")
def says(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "says", "I am one.")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "endless")


# By itself: sampled from a seed, or on a cache that no batch takes.
_ALONE: tuple[dict[str, Any], ...] = ({}, {"temperature": 1, "seed": 3})


@pytest.mark.parametrize("params", _ALONE, ids=["in the batch", "alone"])
def test_an_answer_that_ends_by_itself_is_forgotten(
    params: dict[str, Any], says: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, worker = play(says, submit(**params), monkeypatch=monkeypatch)
    assert isinstance(script.items[-1], Sampled)
    check_forgotten(worker)


@pytest.mark.parametrize("params", _ALONE, ids=["in the batch", "alone"])
def test_an_answer_that_is_cut_by_length_is_forgotten(
    params: dict[str, Any], endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, worker = play(endless, submit(max_tokens=3, **params), monkeypatch=monkeypatch)
    assert len([item for item in script.items if isinstance(item, Sampled)]) == 3
    check_forgotten(worker)


@pytest.mark.parametrize("params", _ALONE, ids=["in the batch", "alone"])
def test_a_cancelled_answer_is_forgotten(
    params: dict[str, Any], endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = submit(max_tokens=10**6, **params)
    _, worker = play(endless, command, Cancel(ID), monkeypatch=monkeypatch, until=has_begun)
    check_forgotten(worker)


@pytest.mark.parametrize("params", _ALONE, ids=["in the batch", "alone"])
def test_an_answer_cancelled_before_its_prompt_is_read_is_forgotten(
    params: dict[str, Any], endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_read(script: Script) -> bool:
        return any(isinstance(item, Prefilled) for item in script.items)

    command = submit(range(97, 117), 10**6, **params)
    options = EngineOptions(prefill_step=4)
    script, worker = play(endless, command, Cancel(ID), monkeypatch=monkeypatch, options=options, until=has_read)
    assert not has_begun(script), "the prompt was read in one piece: the test shows nothing"
    check_forgotten(worker)


@pytest.mark.parametrize("params", _ALONE, ids=["in the batch", "alone"])
def test_an_answer_whose_model_is_unloaded_is_told_and_forgotten(
    params: dict[str, Any], endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = submit(max_tokens=10**6, **params)
    script, worker = play(endless, command, Unload(KEY), monkeypatch=monkeypatch, until=has_begun)
    assert isinstance(script.items[-1], Unavailable)
    assert not worker._runners
    check_forgotten(worker)


def test_an_answer_that_cannot_be_taken_on_is_told_and_forgotten(says: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, worker = play(says, submit(max_tokens=0), monkeypatch=monkeypatch)
    assert [type(item) for item in script.items] == [Failed]
    check_forgotten(worker)


def test_an_answer_whose_batch_fails_is_told_and_forgotten(says: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_overlay_server.engine.runner import Runner

    def broken(_: Runner) -> Any:
        raise MemoryError

    monkeypatch.setattr(Runner, "step", broken)
    script, worker = play(says, submit(), monkeypatch=monkeypatch)
    assert [type(item) for item in script.items] == [Failed]
    check_forgotten(worker)


class _Breaks:
    """A grammar's matcher that fails at the first token."""

    problem = None

    def __call__(self, *_: Any) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize("params", _ALONE, ids=["in the batch", "alone"])
def test_an_answer_that_fails_before_its_first_token_is_told_and_forgotten(
    params: dict[str, Any], says: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = replace(submit(**params), constraint=Constraint("{}"), matcher=_Breaks())
    script, worker = play(says, command, monkeypatch=monkeypatch)
    assert isinstance(script.items[-1], Failed)
    assert not has_begun(script)
    check_forgotten(worker)


# The event loop's side --------------------------------------------------------------------------------------------


def _loop_test(folder: Path, use: Callable[[Engine, Loaded], Any], options: EngineOptions = EngineOptions()) -> None:  # noqa: B008
    async def main() -> None:
        engine = Engine(options)
        engine.start()
        try:
            async with asyncio.timeout(60):
                await use(engine, await resident(engine, folder))
        finally:
            await engine.stop()

    asyncio.run(main())


def test_a_mailbox_is_gone_with_the_end_of_its_sequences(says: Path) -> None:
    """Without anybody cancelling what has ended."""

    async def use(engine: Engine, model: Loaded) -> None:
        ends = 0
        mailbox = engine.submit(numbered(engine, model, [submit(), submit(max_tokens=0)]))
        assert engine.pending == 2
        while ends < 2:
            for _number, item in await mailbox.take():
                ends += isinstance(item, ServerError) or (isinstance(item, Sampled) and item.finish is not None)
        assert engine.pending == 0, "a mailbox stays behind"

    _loop_test(says, use)


def test_nobody_waits_for_a_cancelled_sequence(endless: Path) -> None:
    async def use(engine: Engine, model: Loaded) -> None:
        sequences = numbered(engine, model, [submit(max_tokens=10**6)] * 3)
        engine.submit(sequences)
        ids = [each.id for each in sequences]
        engine.cancel(ids[:1])
        assert engine.pending == 2
        engine.cancel(ids)
        assert engine.pending == 0

    _loop_test(endless, use)


def test_an_aborted_engine_takes_nothing_more_and_frees_what_ran(endless: Path) -> None:
    async def use(engine: Engine, model: Loaded) -> None:
        mailbox = engine.submit(numbered(engine, model, [submit(max_tokens=10**6)]))
        await mailbox.take()
        engine.abort()
        told = [item for _, item in await mailbox.take()]
        assert isinstance(told[-1], Unavailable)
        with pytest.raises(Unavailable, match="shutting down"):
            engine.submit(numbered(engine, model, [submit()]))
        with pytest.raises(Unavailable, match="shutting down"):
            await resident(engine, endless)
        assert engine.pending == 0
        while engine.stats.active:  # bounded by the test's time
            await asyncio.sleep(0.001)

    _loop_test(endless, use)


def test_a_sequence_that_ran_alone_leaves_no_kv_cache_behind(tmp_path: Path) -> None:
    """Not even until Python looks for objects that hold each other: that may take minutes."""
    folder = make_random_model(tmp_path / "random")
    held: list[int] = []

    def script(stage: Stage) -> StageScript:
        yield [Load("a", str(folder))]
        yield from until(lambda: stage.loaded("a"))
        gc.collect()
        gc.disable()
        held.append(mx.get_active_memory())
        seeded = sequence(1, "a", max_tokens=3, params=Params(temperature=1, seed=7))
        yield [seeded, replace(seeded, id=2, max_tokens=10**6)]
        yield from until(lambda: stage.is_over(1) and stage.has_begun(2))
        yield [Cancel(2)]
        yield []
        held.append(mx.get_active_memory())

    try:
        Stage(EngineOptions(kv_disk=0, cache_bytes=0)).play(script)
    finally:
        gc.enable()
    assert held[1] - held[0] < 100_000, "a KV cache takes 262,144 bytes or more"
