"""The service on its own: what the engine sends becomes the events of the right answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from mlx_overlay_server.chat.events import Done, Event, FinishReason, Started, Text
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader, Token
from mlx_overlay_server.chat.requests import Params, TextRequest
from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import Prefilled, Sampled, Submit
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.engine.mailbox import Mailbox
from mlx_overlay_server.errors import Stopped
from mlx_overlay_server.metrics import Metrics
from mlx_overlay_server.models.library import Library
from mlx_overlay_server.models.pool import Pool
from mlx_overlay_server.preparation import Answer, Preparation
from mlx_overlay_server.service import Service
from mlx_overlay_server.settings import EngineOptions, Limits
from mlx_overlay_server.ticket import Ticket

MODEL = "acme/plain"
REQUEST = TextRequest(model=MODEL, prompts=("a", "b"))
_NOTHING: Any = None
LOADED = Loaded(MODEL, "/", _NOTHING, _NOTHING, _NOTHING, _NOTHING, 0, 0, None, {})


class FakeReader:
    """Says each token as its number, and ends at a token 0 or with the sequence."""

    def __init__(self) -> None:
        self.reason: FinishReason | None = None
        self.tokens = 0
        self.reasoning_tokens = 0
        self.stop_sequence: str | None = None

    def feed(self, tokens: Sequence[Token], end: FinishReason | None) -> list[Event]:
        assert self.reason is None, "fed after its end"
        self.tokens += len(tokens)
        self.reason = "stop_sequence" if any(each.id == 0 for each in tokens) else end
        return [Text(str(each.id)) for each in tokens]


class FakeEngine:
    """Has a mailbox that the test fills."""

    def __init__(self) -> None:
        self.options = EngineOptions(batch_size=1)
        self.mailbox = Mailbox()
        self.submitted: list[int] = []
        self.cancelled: list[int] = []

    def submit(self, submits: Iterable[Submit]) -> Mailbox:
        self.submitted += [each.id for each in submits]
        return self.mailbox

    def cancel(self, ids: Iterable[int]) -> None:
        self.cancelled += ids


class FakePool:
    """Has every model."""

    def model(self, _: str) -> AnyLoaded | None:
        return LOADED

    @asynccontextmanager
    async def use(self, _: str) -> AsyncIterator[Loaded]:
        yield LOADED


class SlowPool(FakePool):
    """Loads for ever."""

    @asynccontextmanager
    async def use(self, _: str) -> AsyncIterator[Loaded]:
        await asyncio.get_running_loop().create_future()
        yield LOADED


class SlowPreparation:
    """Prepares for ever."""

    async def answers(self, *_: Any) -> list[Answer]:
        await asyncio.get_running_loop().create_future()
        return []


class FakePreparation:
    """Gives a request one answer for each id."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids

    async def answers(self, *_: Any) -> list[Answer]:
        return [
            Answer(Submit(each, "key", (1, 2, 3), Params(), 10), cast("Reader", FakeReader())) for each in self._ids
        ]


def _service(engine: FakeEngine, ids: Sequence[int]) -> Service:
    return Service(
        cast("Library", None),
        cast("Pool", FakePool()),
        cast("Engine", engine),
        Metrics(dict),
        Limits(waiting_requests=0, messages=1),
        cast("Preparation", FakePreparation(ids)),
    )


def _sampled(token: int, finish: str | None = None) -> Sampled:
    return Sampled(token, None, (), finish)


def test_each_answer_gets_what_came_under_its_own_id() -> None:
    async def main() -> None:
        engine = FakeEngine()
        box = engine.mailbox
        for id_, cached in ((8, 2), (7, 0)):
            box.put(id_, Prefilled(3, 3, cached))
            box.put(id_, _sampled(id_))
            box.put(id_, _sampled(0, "length"))
        events: dict[int, list[Event]] = {0: [], 1: []}
        async for index, new in _service(engine, (7, 8)).answer(REQUEST, Ticket()):
            events[index] += new
        for index, (id_, cached) in enumerate(((7, 0), (8, 2))):
            assert events[index][:2] == [Started(3, cached), Text(str(id_))]
            done = events[index][-1]
            assert isinstance(done, Done)
            assert (done.usage.prompt, done.usage.cached, done.usage.completion) == (3, cached, 2)
        assert engine.submitted == [7, 8]

    asyncio.run(main())


def test_what_was_sampled_before_an_answer_s_end_was_known_is_left_out() -> None:
    async def main() -> None:
        engine = FakeEngine()
        box = engine.mailbox
        for id_ in (7, 8):
            box.put(id_, Prefilled(3, 3, 0))
        box.put(7, _sampled(0))  # ends the answer, which the engine does not know
        events: dict[int, list[Event]] = {0: [], 1: []}
        async for index, new in _service(engine, (7, 8)).answer(REQUEST, Ticket()):
            events[index] += new
            if index == 0 and isinstance(new[-1], Done):
                box.put(7, _sampled(5))
                box.put(8, _sampled(6, "length"))
        assert [type(event) for event in events[0]] == [Started, Text, Done]
        assert [type(event) for event in events[1]] == [Started, Text, Done]
        assert engine.cancelled.count(7) == 1

    asyncio.run(main())


def test_who_leaves_has_what_is_open_cancelled() -> None:
    async def main() -> None:
        engine = FakeEngine()
        for id_ in (7, 8):
            engine.mailbox.put(id_, Prefilled(3, 3, 0))
        service = _service(engine, (7, 8))
        worked = [service.has_work]
        batches = cast("Any", service.answer(REQUEST, Ticket()))
        await anext(batches)
        worked.append(service.has_work)
        await batches.aclose()
        worked.append(service.has_work)
        assert worked == [False, True, False], "a Mac would fall asleep, or never"
        assert sorted(engine.cancelled) == [7, 8]

    asyncio.run(main())


def test_a_request_is_on_record_while_it_runs_and_after() -> None:
    async def main() -> None:
        engine = FakeEngine()
        service = _service(engine, (7, 8))
        for id_, cached in ((7, 1), (8, 2)):
            engine.mailbox.put(id_, Prefilled(3, 3, cached))
            engine.mailbox.put(id_, _sampled(5))
            engine.mailbox.put(id_, _sampled(6, "length"))
        ticket = Ticket(client="curl/8")
        batches = service.answer(REQUEST, ticket)
        await anext(batches)
        ((record, note),) = service.recent.running
        assert (record.client, record.model, note) == ("curl/8", MODEL, "reading the prompt: 3 of 3 tokens")
        async for _ in batches:
            pass
        assert service.recent.ended == [record]
        assert (record.tokens_in, record.tokens_cached, record.tokens_out) == (6, 3, 4)
        assert (record.outcome, record.reason) == ("answered", "length")
        assert record.first_token_seconds is not None

    asyncio.run(main())


@pytest.mark.parametrize("phase", ["loading", "preparing", "waiting for tokens", "between tokens"])
def test_a_request_is_stopped_whatever_it_waits_for(phase: str) -> None:
    async def main() -> None:
        engine = FakeEngine()
        service = _service(engine, (7,))
        if phase == "loading":
            service.pool = cast("Pool", SlowPool())
        if phase == "preparing":
            service._preparation = cast("Preparation", SlowPreparation())
        if phase == "between tokens":
            engine.mailbox.put(7, Prefilled(3, 3, 0))
        ticket = Ticket()
        batches = service.answer(REQUEST, ticket)
        if phase == "between tokens":
            await anext(batches)
        answering = asyncio.ensure_future(anext(batches))
        for _ in range(5):
            await asyncio.sleep(0)
        ((record, _),) = service.recent.running
        assert service.recent.stop(record.id)
        with pytest.raises(Stopped):
            await answering
        assert record.outcome == "stopped"
        assert engine.cancelled == engine.submitted
        assert not service.has_work

    asyncio.run(main())


def test_a_stop_that_comes_while_the_client_reads_ends_the_answer_before_its_next_token() -> None:
    async def main() -> None:
        engine = FakeEngine()
        service = _service(engine, (7,))
        engine.mailbox.put(7, Prefilled(3, 3, 0))
        ticket = Ticket()
        batches = service.answer(REQUEST, ticket)
        await anext(batches)
        ticket.stop()
        engine.mailbox.put(7, _sampled(5))
        with pytest.raises(Stopped):
            await anext(batches)
        assert engine.cancelled == [7]

    asyncio.run(main())
