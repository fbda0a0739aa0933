"""The engine's thread on real tiny models: what goes wrong in it is told to whom it concerns, and to nobody else."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_overlay_server.chat.grammar import Constraint
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import Params
from mlx_overlay_server.engine import loading, runner
from mlx_overlay_server.engine.commands import Load, Prefilled, Sampled, Submit
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.engine.mailbox import Mailbox
from mlx_overlay_server.engine.worker import Worker
from mlx_overlay_server.errors import Failed, ServerError, Unavailable
from mlx_overlay_server.settings import EngineOptions

from tests.support.models import make_model, make_random_model
from tests.support.processes import PYTHON, environment, succeed
from tests.support.running import resident

SECONDS = 60


def run(use: Callable[[Engine], Awaitable[None]], options: EngineOptions = EngineOptions()) -> None:  # noqa: B008 - frozen
    """Use an engine, and stop it whatever comes of that."""

    async def main() -> None:
        engine = Engine(options)
        engine.start()
        try:
            await asyncio.wait_for(use(engine), SECONDS)
        finally:
            await engine.stop()
        assert not engine.is_stuck

    asyncio.run(main())


def submit(engine: Engine, model: Loaded, *, max_tokens: int = 50, **options: Any) -> Submit:
    prompt = tuple(model.tokenizer.encode("Hi"))
    return Submit(engine.new_id(), model.key, prompt, Params(temperature=0), max_tokens, **options)


async def text_of(model: Loaded, mailbox: Mailbox) -> str:
    """What a sequence says, read to its end. Raises what it is told instead."""
    tokens: list[int] = []
    while True:
        for _, item in await mailbox.take():
            if isinstance(item, ServerError):
                raise item
            if isinstance(item, Sampled):
                if item.finish == "stop":
                    return model.tokenizer.decode(tokens)
                tokens.append(item.token)
                if item.finish is not None:
                    return model.tokenizer.decode(tokens)


async def say(engine: Engine, model: Loaded, **options: Any) -> str:
    mailbox = engine.submit([submit(engine, model, **options)])
    return await text_of(model, mailbox)


def test_a_batch_that_fails_costs_its_own_sequences_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (make_model(tmp_path / name, f"I am {name}.") for name in ("one", "two"))
    step = runner.Runner.step
    broken: list[str] = []

    def breaks_once(self: runner.Runner) -> Any:
        if self.loaded.path == str(one) and not broken:
            broken.append(str(one))
            raise MemoryError("no memory for the prompt: secret")
        return step(self)

    monkeypatch.setattr(runner.Runner, "step", breaks_once)

    async def use(engine: Engine) -> None:
        first, second = await resident(engine, one), await resident(engine, two)
        told = await asyncio.gather(say(engine, first), say(engine, second), return_exceptions=True)
        assert isinstance(told[0], Failed)
        assert "secret" not in told[0].message, "an error's text may hold a prompt"
        assert told[1] == "I am two."
        assert await say(engine, first) == "I am one.", "the engine did not recover"
        assert engine.stats.failures == 1
        assert engine.failure is None

    run(use)


def test_one_request_that_cannot_be_taken_on_harms_no_other(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        model = await resident(engine, make_model(tmp_path / "one", "I am one."))
        bad, good = submit(engine, model, max_tokens=0), submit(engine, model)
        mailbox = engine.submit([bad, good])
        told: dict[int, list[Any]] = {bad.id: [], good.id: []}
        while not (told[good.id] and isinstance(told[good.id][-1], Sampled) and told[good.id][-1].finish):
            for id_, item in await mailbox.take():
                told[id_].append(item)
        assert [type(item) for item in told[bad.id]] == [Failed]

    run(use)


def test_an_engine_that_cannot_start_says_why_to_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Worker) -> None:
        raise ImportError("libcudart is missing")

    monkeypatch.setattr(Worker, "_prepare", broken)

    async def use(engine: Engine) -> None:
        with pytest.raises(Failed, match="libcudart is missing"):
            await resident(engine, tmp_path)
        assert engine.failure == "ImportError: libcudart is missing"
        with pytest.raises(Failed, match="libcudart"):
            await resident(engine, tmp_path)

    run(use)


def test_an_error_in_the_loop_itself_is_told_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Worker._publish
    broken: list[bool] = []

    def breaks_once(self: Worker, items: list[Any]) -> None:
        if any(isinstance(item, Sampled) for _, item in items) and not broken:
            broken.append(True)
            raise RuntimeError("unexpected")
        publish(self, items)

    monkeypatch.setattr(Worker, "_publish", breaks_once)

    async def use(engine: Engine) -> None:
        model = await resident(engine, make_model(tmp_path / "one", "I am one."))
        with pytest.raises(Failed):
            await say(engine, model)
        assert await say(engine, model) == "I am one."
        assert engine.stats.last_failure == "RuntimeError in the engine"

    run(use)


def test_a_cancelled_sequence_is_gone_after_a_step_and_its_prefix_is_kept(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        model = await resident(engine, make_random_model(tmp_path / "random"))
        long = submit(engine, model, max_tokens=100_000)
        mailbox = engine.submit([long])
        while not any(isinstance(item, Sampled) for _, item in await mailbox.take()):
            pass
        assert engine.stats.active == 1
        engine.cancel([long.id])
        steps = engine.stats.steps
        while engine.stats.active:
            await asyncio.sleep(0.001)
        assert engine.stats.steps - steps <= 3, "the slot was not freed within a step of the cancel's arrival"
        assert (engine.pending, engine.stats.cache_entries) == (0, 1)

    run(use)


def test_who_generates_with_an_unloaded_model_is_told(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        model = await resident(engine, make_random_model(tmp_path / "random"))
        mailbox = engine.submit([submit(engine, model, max_tokens=100_000)])
        await mailbox.take()
        engine.unload(model)
        with pytest.raises(Unavailable, match="unloaded"):
            await text_of(model, mailbox)
        with pytest.raises(Unavailable, match="unloaded"):
            await say(engine, model)

    run(use)


def test_a_folder_that_is_no_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        with pytest.raises(Unavailable) as told:
            await resident(engine, tmp_path)
        assert told.value.code == "model_load_failed"
        assert "\n" not in told.value.message

    run(use)


def test_a_prompt_tells_how_much_of_it_was_reused(tmp_path: Path) -> None:
    async def use(engine: Engine) -> None:
        model = await resident(engine, make_model(tmp_path / "one", "I am one."))
        seen = []
        for _ in range(2):
            mailbox = engine.submit([submit(engine, model)])
            items: list[Any] = []
            while not any(isinstance(item, Sampled) and item.finish for item in items):
                items += [item for _, item in await mailbox.take()]
            seen.append([item for item in items if isinstance(item, Prefilled)][-1])
        size = len(model.tokenizer.encode("Hi"))
        assert seen == [Prefilled(size, size, 0), Prefilled(size, size, size - 1)]

    run(use)


def test_a_request_whose_processors_fail_harms_no_row_beside_it(tmp_path: Path) -> None:
    """Within one batch of one model."""

    class Breaks:
        problem = None

        def __call__(self, *_: Any) -> Any:
            raise ZeroDivisionError("secret")

    async def use(engine: Engine) -> None:
        model = await resident(engine, make_model(tmp_path / "one", "I am one."))
        broken = submit(engine, model, constraint=Constraint("{}"), matcher=Breaks())
        mailboxes = [engine.submit([each]) for each in (submit(engine, model), broken, submit(engine, model))]
        told = await asyncio.gather(*(text_of(model, each) for each in mailboxes), return_exceptions=True)
        assert (told[0], told[2]) == ("I am one.", "I am one.")
        assert isinstance(told[1], Failed)
        assert engine.stats.failures == 0, "the batch was lost"

    run(use)


def test_a_budget_of_the_prefix_cache_bounds_what_it_holds(tmp_path: Path) -> None:
    """By MLX's own count, for sequences that run alone, whose KV caches have room for tokens to come."""
    budget = 4 * 10**6

    async def use(engine: Engine) -> None:
        model = await resident(engine, make_random_model(tmp_path / "random", hidden=256))
        gc.collect()
        before = mx.get_active_memory()
        for turn in range(6):
            prompt = tuple(1 + (turn * 7 + place) % 200 for place in range(300))
            mailbox = engine.submit([Submit(engine.new_id(), model.key, prompt, Params(temperature=0), 3)])
            await text_of(model, mailbox)
        assert 0 < engine.stats.cache_bytes <= budget
        gc.collect()
        assert mx.get_active_memory() - before <= 1.1 * budget

    run(use, EngineOptions(cache_bytes=budget, kv_bits=8))


_STARTED = """
import asyncio, resource
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.settings import EngineOptions
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))

async def main():
    engine = Engine(EngineOptions())
    engine.start()
    while not engine.stats.is_alive:
        await asyncio.sleep(0.01)
    await engine.stop()

asyncio.run(main())
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, hard)
"""


def test_an_engine_that_starts_leaves_the_limit_on_open_files_as_it_was(home: Path) -> None:
    succeed([PYTHON, "-c", _STARTED], environment(home))


def test_what_a_load_has_read_is_told_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SLICE_BYTES", 1)  # each array is a slice
    folder = make_random_model(tmp_path / "random")

    async def use(engine: Engine) -> None:
        key = engine.new_key(str(folder))
        task = asyncio.create_task(engine.load(Load(key, str(folder))))
        seen: list[int] = []
        while not task.done():
            seen.append(engine.bytes_read(key))
            await asyncio.sleep(0)
        model = task.result()
        assert seen == sorted(seen)
        assert 0 < max(seen) <= model.nbytes
        assert engine.bytes_read(key) == 0

    run(use)
