"""Many clients at once, clients that go away, signals, requests that fail: nobody is harmed, nothing is left over."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tests.support.folders import weights
from tests.support.models import make_model, make_random_model, split
from tests.support.processes import SECONDS, eventually
from tests.support.server import Server, serving

ONE, TWO, RANDOM, ENDLESS, BROKEN = "acme/one", "acme/two", "acme/random", "acme/endless", "acme/broken"
SCRIPTS = {
    ONE: " ".join(f"word{number}" for number in range(60)),
    TWO: "".join(f"Näh, {number} €! 👋🌍\n" for number in range(12)),
}
PIECES = {ONE: split(SCRIPTS[ONE]), TWO: re.findall(r"(?s).{1,3}", SCRIPTS[TWO])}
STREAMS = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "models"
    for name, script in SCRIPTS.items():
        make_model(folder / name, script, pieces=PIECES[name])
    make_random_model(folder / RANDOM)
    make_random_model(folder / ENDLESS, context=1 << 20)
    _break(make_random_model(folder / BROKEN))
    return folder


def _break(model: Path) -> None:
    """Let a model fail in the middle of the engine's step: no array can be cut to four tokens and a half."""
    config = json.loads((model / "config.json").read_text())
    config |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4.5}
    (model / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), models) as server:
        yield server


def _numbers(server: Server) -> dict[str, float]:
    """What /metrics says: sums over labels."""
    numbers: dict[str, float] = {}
    for line in server.http.get("/metrics").text.splitlines():
        if found := re.match(r"mlx_omni_(\w+)(?:\{.*\})? (\S+)$", line):
            numbers[found[1]] = numbers.get(found[1], 0) + float(found[2])
    return numbers


def _is_idle(server: Server) -> bool:
    numbers = _numbers(server)
    return not any(numbers[f"{state}_sequences"] for state in ("active", "waiting", "pending"))


def _becomes_idle(server: Server) -> None:
    eventually(lambda: _is_idle(server), "no sequence is active, waiting or pending")
    assert server.http.get("/health").json()["status"] == "ready"


# Many at once ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """What one client asks for."""

    model: str
    prompt: str
    options: Mapping[str, Any]
    is_chat: bool


class Told(NamedTuple):
    """What a client got: all of it, where there is a reason why it ended."""

    text: str
    finish: str | None


def _asks(draw: random.Random) -> list[Ask]:
    asks = []
    for number in range(STREAMS):
        model = draw.choice([ONE, TWO, RANDOM])
        options: dict[str, Any] = {
            "max_tokens": draw.randint(1, 80),
            "temperature": draw.choice([0, 0.7, 1.5]),
            "top_p": draw.choice([1, 0.9]),
            "presence_penalty": draw.choice([0, 0.5]),
        }
        if model == RANDOM and options["temperature"]:
            options["seed"] = number  # else nobody could know what it says
        if draw.random() < 0.5:
            options["stop"] = [_stop(draw, model), "never said"]
        prompt = "Tell me. " * draw.randint(1, 40) + str(number)
        asks.append(Ask(model, prompt, options, draw.random() < 0.5))
    return asks


def _stop(draw: random.Random, model: str) -> str:
    """A piece of what may be said, without regard to its tokens."""
    script = SCRIPTS.get(model, "baba bizu zu")
    at = draw.randrange(len(script) - 6)
    return script[at : at + draw.randint(1, 6)]


async def _told(client: AsyncOpenAI, ask: Ask, leaves_after: int | None = None) -> Told:
    """Ask, and read until the end, or until interest is lost after some pieces."""
    text, finish = "", None
    stream: Any
    if ask.is_chat:
        messages: Any = [{"role": "user", "content": ask.prompt}]
        stream = await client.chat.completions.create(model=ask.model, messages=messages, stream=True, **ask.options)
    else:
        unchecked = client.with_options(_extra_kwargs={"_strict_response_validation": False})  # as `unchecked_openai`
        stream = await unchecked.completions.create(model=ask.model, prompt=ask.prompt, stream=True, **ask.options)
    count = 0
    async with stream:
        async for chunk in stream:
            if count == leaves_after:
                return Told(text, None)
            count += 1
            (choice,) = chunk.choices
            text += (choice.delta.content or "") if ask.is_chat else choice.text
            finish = choice.finish_reason or finish
    return Told(text, finish)


def _scripted(ask: Ask) -> Told:
    """What a model that says a script must say."""
    pieces = PIECES[ask.model]
    text = "".join(pieces[: ask.options["max_tokens"]])
    finish = "stop" if ask.options["max_tokens"] > len(pieces) else "length"
    for stop in ask.options.get("stop", ()):
        if stop in text:
            text, finish = text[: text.index(stop)], "stop"
    return Told(text, finish)


def _one_by_one(server: Server, asks: Sequence[Ask]) -> list[Told]:
    async def alone() -> list[Told]:
        async with server.async_openai() as client:
            return [await _told(client, ask) for ask in asks]

    return asyncio.run(alone())


def _all_at_once(server: Server, asks: Sequence[Ask], draw: random.Random) -> list[Told]:
    """Ask all at once; some clients leave early."""

    async def together() -> list[Told]:
        async with server.async_openai() as client:
            leaving = [draw.randrange(8) if draw.random() < 0.3 else None for _ in asks]
            return await asyncio.gather(*map(_told, [client] * len(asks), asks, leaving))

    return asyncio.run(together())


@pytest.mark.slow
def test_many_streams_at_once_say_each_what_it_says_alone_and_leave_nothing(server: Server) -> None:
    asks = _asks(random.Random(5))
    alone = _one_by_one(server, asks)
    for ask, told in zip(asks, alone, strict=True):
        assert ask.model == RANDOM or told == _scripted(ask)
    _becomes_idle(server)
    failures = _numbers(server)["engine_failures_total"]
    held = _held(server)
    for wave in range(2):
        for ask, told, whole in zip(asks, _all_at_once(server, asks, random.Random(wave)), alone, strict=True):
            if told.finish is None:
                assert whole.text.startswith(told.text)
            else:
                assert told == whole, ask
        _becomes_idle(server)
        eventually(lambda: _held(server) == held, f"it holds {held} again")
    assert _numbers(server)["engine_failures_total"] == failures


def _held(server: Server) -> Mapping[str, int]:
    """How many threads and file descriptors the server has; nothing where there is no /proc to tell."""
    process = Path("/proc") / str(server.process.pid)
    return {name: len(os.listdir(process / name)) for name in ("task", "fd")} if process.exists() else {}


# Clients that go away -------------------------------------------------------------------------------------------


def _stream(server: Server, model: str = ENDLESS, **options: Any) -> openai.Stream[Any]:
    """A stream that has begun: its first piece is read."""
    messages: Any = [{"role": "user", "content": "Hi"}]
    stream: Any = server.openai.chat.completions.create(model=model, messages=messages, stream=True, **options)
    assert next(stream).choices
    return stream  # type: ignore[no-any-return]


def test_a_client_that_goes_away_while_its_answer_streams_frees_its_slot(server: Server) -> None:
    before = _numbers(server)["completion_tokens_total"]
    streams = [_stream(server, n=2) for _ in range(3)]
    assert _numbers(server)["pending_sequences"] == 6
    for stream in streams:
        stream.close()
    _becomes_idle(server)
    assert _numbers(server)["completion_tokens_total"] == before  # none of the answers came to its end


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_away_before_its_answer_frees_its_slot(server: Server, is_streamed: bool) -> None:
    body = {"model": ENDLESS, "messages": [{"role": "user", "content": "Hi"}], "stream": is_streamed}
    with server.http.stream("POST", "/v1/chat/completions", json=body) if is_streamed else _unanswered(server, body):
        eventually(lambda: _numbers(server)["active_sequences"] == 1, "the answer is under way")
    _becomes_idle(server)


@contextmanager
def _unanswered(server: Server, body: Any) -> Iterator[None]:
    """A request whose answer nobody waits for: the connection closes at the end of the block."""
    import socket

    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        yield


def test_the_slots_of_clients_that_went_away_are_there_for_others(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "home", models, options=["--max-batch", "2", "--max-queue", "4"]) as server:
        for _ in range(3):
            for stream in [_stream(server) for _ in range(2)]:
                stream.close()
            eventually(lambda: _numbers(server)["pending_sequences"] == 0, "their requests are gone")
        assert server.chat_answer(ONE, "Hi", stream=True).content == SCRIPTS[ONE]


# Too many -------------------------------------------------------------------------------------------------------


def test_a_request_beyond_the_queue_is_told_to_come_again(models: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "home", models, options=["--max-batch", "1", "--max-queue", "1"]) as server:
        first = _stream(server)
        with ThreadPoolExecutor(1) as other:
            second = other.submit(server.chat_answer, ONE, "Hi", stream=True)  # another model has a batch of its own
            assert second.result(SECONDS).content == SCRIPTS[ONE]
            waiting = other.submit(_stream, server)
            eventually(lambda: _numbers(server)["pending_sequences"] == 2, "one runs and one waits")
            with pytest.raises(openai.RateLimitError) as caught:
                server.chat(ONE, "Hi")
            assert caught.value.status_code == 429
            assert (caught.value.type, caught.value.code) == ("rate_limit_error", "rate_limit_exceeded")
            assert int(caught.value.response.headers["retry-after"]) > 0
            first.close()
            waiting.result(SECONDS).close()
        _becomes_idle(server)
        assert server.chat(ONE, "Hi").choices[0].message.content == SCRIPTS[ONE]


# Requests that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_fails_in_the_engine_is_told_so_and_harms_no_other(server: Server, is_streamed: bool) -> None:
    before = _numbers(server)
    prompt = "a prompt that no log may hold"
    with _stream(server) as running:
        with pytest.raises(openai.InternalServerError) as caught:
            server.chat_answer(BROKEN, prompt, stream=is_streamed)
        assert (caught.value.type, caught.value.code) == ("server_error", "engine_failed")
        assert [next(running).choices[0].delta.content for _ in range(20)]
        assert server.chat_answer(ONE, "Hi", stream=is_streamed).content == SCRIPTS[ONE]
    _becomes_idle(server)
    assert _numbers(server)["engine_failures_total"] == before["engine_failures_total"] + 1
    assert "ValueError" in server.http.get("/health").json()["engine"]["last_failure"]
    assert prompt not in server.log()


def test_a_schema_that_nothing_fits_harms_no_other_answer_of_the_same_model(server: Server) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with _stream(server, RANDOM, temperature=0, max_tokens=400) as running:
        with pytest.raises(openai.BadRequestError) as caught:
            server.chat(RANDOM, "Hi", response_format=schema)
        assert caught.value.param == "response_format"
        assert [chunk.choices[0].finish_reason for chunk in running][-1] == "length"
    _becomes_idle(server)


def test_a_model_that_cannot_be_loaded_harms_no_other(server: Server, models: Path) -> None:
    broken = make_model(models / "acme" / "cut", "Hello.")
    (broken / "model.safetensors").write_bytes(weights(b"of another model"))
    with _stream(server) as running:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                server.chat("acme/cut", "Hi")
            assert (caught.value.status_code, caught.value.code) == (503, "model_load_failed")
        assert [next(running).choices[0].delta.content for _ in range(20)]
        make_model(broken, "Hello.")
        assert server.chat("acme/cut", "Hi").choices[0].message.content == "Hello."
    _becomes_idle(server)


# Signals --------------------------------------------------------------------------------------------------------


class Reader:
    """A client in a thread of its own, which reads what a server streams as it comes over the wire."""

    def __init__(self, server: Server, **body: Any) -> None:
        self._server = server
        self._body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **body}
        self.has_begun = threading.Event()
        self.events: list[str] = []
        self.problem: httpx2.HTTPError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self._server.http.stream("POST", "/v1/chat/completions", json=self._body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        self.has_begun.set()
        except httpx2.HTTPError as error:
            self.problem = error
        finally:
            self.has_begun.set()

    def last(self) -> str:
        """The stream's last event, once it has ended: with an end that HTTP knows, too."""
        self._thread.join(60)
        assert not self._thread.is_alive(), "the stream never ended"
        assert self.problem is None
        return self.events[-1]


Stop = Callable[[Server], None]


@contextmanager
def _told_to_stop(models: Path, home: Path, number: int, seconds: str) -> Iterator[tuple[Server, Stop]]:
    """A server, and how to stop it; in the end it has exited 0, without a trace of its session."""
    with serving(home, models, options=["--shutdown-seconds", seconds]) as server:
        yield server, lambda server: server.process.send_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_that_do_not_end_in_time_end_with_an_error_when_the_server_is_told_to_stop(
    models: Path, tmp_path: Path, number: int
) -> None:
    with _told_to_stop(models, tmp_path / "home", number, "0.2") as (server, stop):
        readers = [Reader(server, model=ENDLESS) for _ in range(4)]
        for reader in readers:
            assert reader.has_begun.wait(60)
        stop(server)
        for reader in readers:
            error = json.loads(reader.last())["error"]
            assert error["type"] == "server_error"
            assert "shutting down" in error["message"]
        assert server.process.wait(60) == 0


def test_streams_that_end_in_time_end_as_they_would_have(models: Path, tmp_path: Path) -> None:
    with _told_to_stop(models, tmp_path / "home", signal.SIGTERM, "100") as (server, stop):
        readers = [Reader(server, model=RANDOM, temperature=0, max_tokens=400) for _ in range(4)]
        for reader in readers:
            assert reader.has_begun.wait(60)
        stop(server)
        for reader in readers:
            assert reader.last() == "[DONE]"
            assert json.loads(reader.events[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0


def test_who_waits_for_a_model_is_told_when_the_server_stops(models: Path, tmp_path: Path) -> None:
    room_for_one = ["--memory-budget", "1M"]
    with serving(tmp_path / "home", models, options=["--shutdown-seconds", "0.2", *room_for_one]) as server:
        reader = Reader(server, model=ENDLESS)
        assert reader.has_begun.wait(60)
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(server.chat, RANDOM, "Hi", max_tokens=10**5)
            eventually(lambda: RANDOM in server.http.get("/health").json()["loading"], "a request waits for room")
            server.process.send_signal(signal.SIGTERM)
            assert "error" in json.loads(reader.last())
            with pytest.raises(openai.InternalServerError) as caught:
                waiting.result(60)
            assert caught.value.status_code == 503
        assert server.process.wait(60) == 0


def test_a_second_signal_ends_streams_at_once(models: Path, tmp_path: Path) -> None:
    with _told_to_stop(models, tmp_path / "home", signal.SIGINT, "3600") as (server, stop):
        reader = Reader(server, model=ENDLESS)
        assert reader.has_begun.wait(60)
        stop(server)
        eventually(lambda: "stopping" in server.log(), "the server stops")
        stop(server)
        assert "error" in json.loads(reader.last())
        assert server.process.wait(60) == 0


def test_a_server_that_stops_takes_no_more_requests(models: Path, tmp_path: Path) -> None:
    with _told_to_stop(models, tmp_path / "home", signal.SIGTERM, "3600") as (server, stop), ExitStack() as stack:
        # Connections of their own: what is open when the server stops stays open while its stream goes on.
        stream = stack.enter_context(_stream(server))
        stop(server)
        eventually(lambda: "stopping" in server.log(), "the server stops")
        with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
            server.chat(ONE, "Hi")
        assert next(stream).choices
        stop(server)
        assert server.process.wait(60) == 0
