"""Large requests share the event loop with small ones: a step at a time, and rest in between (P13)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from mlx_overlay_server.access import Access
from mlx_overlay_server.api.guard import Guard
from mlx_overlay_server.errors import ServerError, Unavailable
from mlx_overlay_server.settings import Settings
from mlx_overlay_server.turns import LARGE_BYTES, Turns, becomes_large, turn
from starlette.responses import Response

from tests.support.processes import SECONDS

STEP = 0.02
"""Seconds that a step of a large request takes here."""


def _work() -> None:
    """Keep the event loop busy."""
    begun = time.thread_time()
    while time.thread_time() - begun < STEP:
        pass


def test_whoever_asks_for_little_waits_for_one_step_of_large_requests() -> None:
    asked: list[None] = []

    async def large(turns: Turns) -> None:
        await becomes_large(turns)
        _work()
        for _ in range(2):
            await turn()
            _work()

    async def small() -> None:
        while True:
            for _ in range(20):  # what a short request awaits
                await turn()
                await asyncio.sleep(0)
            asked.append(None)
            await asyncio.sleep(STEP / 4)

    async def main() -> None:
        turns = Turns()
        asking = asyncio.create_task(small())
        begun = time.monotonic()
        await asyncio.gather(*(large(turns) for _ in range(5)))
        took = time.monotonic() - begun
        asking.cancel()
        assert took >= 2 * 14 * STEP, "large requests leave the loop no rest"

    asyncio.run(main())
    assert len(asked) >= 10, "the small ones had no turn between the large ones"


def test_a_large_request_whose_client_leaves_frees_its_turn() -> None:
    async def main() -> None:
        turns = Turns()
        await turns.take()
        left = asyncio.create_task(becomes_large(turns))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait_for(turns.take(), SECONDS)

    asyncio.run(main())


def test_a_server_that_stops_refuses_the_large_requests_that_wait() -> None:
    async def main() -> None:
        turns = Turns()
        await turns.take()
        time.sleep(STEP)
        waiting = [asyncio.create_task(becomes_large(turns)) for _ in range(100)]
        await asyncio.sleep(0)
        turns.close()
        done, pending = await asyncio.wait(waiting, timeout=SECONDS)
        assert (len(done), len(pending)) == (100, 0)
        assert {type(each.exception()) for each in done} == {Unavailable}
        assert turns._lock.locked() is False

    asyncio.run(main())


def test_a_large_body_that_comes_while_the_server_stops_is_refused_and_not_called_unreadable() -> None:
    refused: list[ServerError] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except ServerError:  # what FastAPI answers when a body cannot be read
            await send({"type": "http.response.start", "status": 400, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    def refuse(scope: Any, error: ServerError) -> Any:
        refused.append(error)
        return Response(status_code=error.status)

    async def main() -> None:
        turns = Turns()
        turns.close()

        async def receive() -> Any:
            return {"type": "http.request", "body": b"a" * (LARGE_BYTES + 1)}

        guard = Guard(
            app,
            access=Access(Settings),
            host="",
            origins=["*"],
            max_body=1 << 20,
            refuse=refuse,
            count=_ignore,
            turns=turns,
        )
        scope = {"type": "http", "path": "/", "method": "POST", "headers": [(b"host", b"localhost")]}
        await guard(scope, receive, send)

    asyncio.run(main())
    assert [(type(each), each.status) for each in refused] == [(Unavailable, 503)]
    assert sent[0]["status"] == 503


def _ignore(route: str, status: int) -> None:
    """Count nothing."""


@pytest.mark.parametrize(("size", "is_large"), [(LARGE_BYTES, False), (LARGE_BYTES + 1, True)])
def test_a_large_body_waits_for_its_turn(size: int, is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Turns] = []

    async def take(self: Turns) -> None:
        taken.append(self)

    monkeypatch.setattr(Turns, "take", take)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            assert not taken, "a body that still comes has nothing to do yet"
        await turn()

    async def main() -> None:
        chunks = [b"a" * LARGE_BYTES, b"a" * (size - LARGE_BYTES), b""]
        messages = [
            {"type": "http.request", "body": each, "more_body": bool(chunks[at:])} for at, each in enumerate(chunks, 1)
        ]

        async def receive() -> Any:
            return messages.pop(0)

        guard: Any = Guard(
            app,
            access=Access(Settings),
            host="",
            origins=["*"],
            max_body=1 << 20,
            refuse=None,  # type: ignore[arg-type]
            count=None,  # type: ignore[arg-type]
        )
        scope = {"type": "http", "path": "/", "method": "POST", "headers": [(b"host", b"localhost")]}
        await guard(scope, receive, None)

    asyncio.run(main())
    assert len(taken) == (2 if is_large else 0)
