"""Requests that the server must refuse whatever connection they come by: no room for an answer, or shutting down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hf_overlay
import pytest
from mlx_overlay_server import memory
from mlx_overlay_server.app import build
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.live import Live
from mlx_overlay_server.options import make_parser, read
from mlx_overlay_server.service import Service
from starlette.testclient import TestClient

from tests.support.models import make_model, make_random_model

_CONTEXT = 128
_MODEL = "org/small"
_HI = [{"role": "user", "content": "Hi"}]


class Running(NamedTuple):
    """A server in this process, with a client that keeps its connection."""

    client: TestClient
    service: Service

    def post(self, path: str, **body: Any) -> Any:
        """The answer's status and its body."""
        answer = self.client.post(path, json={"model": _MODEL, **body})
        return answer.status_code, answer.json()


@pytest.fixture
def running(models: Path, sessions: Path) -> Iterator[Running]:
    make_model(models / _MODEL, "Hello there.", context=_CONTEXT)
    settings = read(make_parser().parse_args(["--offline", "--memory-budget", "1G", "--prompt-cache", "10M"]), {})
    with hf_overlay.open_session([models]) as session:
        app, service = build(Live(settings), session)
        with TestClient(app, base_url="http://localhost") as client:
            yield Running(client, service)


def test_a_prompt_leaves_room_for_one_token_of_an_answer_at_least(running: Running) -> None:
    status, told = running.post("/v1/completions", prompt=[65] * (_CONTEXT - 1))
    assert (status, told["usage"]["completion_tokens"], told["choices"][0]["finish_reason"]) == (200, 1, "length")
    for size in (_CONTEXT, _CONTEXT + 1):
        status, told = running.post("/v1/completions", prompt=[65] * size)
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded"), f"taken: {size} of {_CONTEXT}"
    # A text is refused before it is cut into tokens where it cannot have few enough, and after that where it has not.
    for size in (_CONTEXT, 1000 * _CONTEXT):
        status, told = running.post("/v1/completions", prompt="A" * size)
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded")


def test_a_conversation_of_exactly_the_context_s_size_is_refused(running: Running) -> None:
    status, told = running.post("/v1/chat/completions", messages=_HI, max_tokens=1)
    assert status == 200
    room = _CONTEXT - told["usage"]["prompt_tokens"]
    for more, expected in ((room - 1, 200), (room, 400), (room + 1, 400)):
        messages = [{"role": "user", "content": "Hi" + "x" * more}]
        status, told = running.post("/v1/chat/completions", messages=messages)
        assert status == expected, f"{more} characters more, of {room}"
        if expected == 400:
            assert told["error"]["code"] == "context_length_exceeded"


def test_an_answer_never_goes_past_the_context(running: Running) -> None:
    """However many tokens are asked for."""
    status, told = running.post("/v1/completions", prompt=[65] * (_CONTEXT - 2), max_tokens=10_000)
    assert (status, told["usage"]["total_tokens"]) == (200, _CONTEXT)


_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": _HI}),
    ("/v1/chat/completions", {"messages": _HI, "stream": True}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": _HI, "max_tokens": 5}),
    ("/v1/messages/count_tokens", {"messages": _HI}),
)


@pytest.fixture
def short(models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose memory has room for some 700 tokens beside its two models, and for some 1,200 beside the first."""
    weights = 0
    for name in ("org/small", "org/other"):
        weights += make_random_model(models / name).joinpath("model.safetensors").stat().st_size
    usable = (weights + (700 + memory.GROWTH) * _KV_BYTES) * 16 // 15
    monkeypatch.setattr(mlx, "machine", lambda: memory.Machine(usable))
    monkeypatch.setattr(memory, "LEAST_TOKENS", 1)
    options = ["--offline", "--memory-budget", "1G", "--prompt-cache", "0", "--kv-disk", "0"]
    settings = read(make_parser().parse_args(options), {})
    with hf_overlay.open_session([models]) as session:
        app, service = build(Live(settings), session)
        with TestClient(app, base_url="http://localhost") as client:
            for name in ("org/small", "org/other"):
                asked = client.post("/v1/completions", json={"model": name, "prompt": "Hi", "max_tokens": 1})
                assert asked.status_code == 200
            yield Running(client, service)


_KV_BYTES = 1536
"""What a token takes in the KV cache of a random model, with the room to copy a layer's."""


def test_what_memory_has_no_room_for_is_refused_as_each_dialect_does(short: Running) -> None:
    """By the engine, because of the other model, and before it by the context that memory has room for.

    Agents look for the code, or for the words, to shorten what they send.
    """
    by_engine = r"prompt is too long: 9\d\d tokens > 70\d maximum, which memory has room for beside the models"
    before = r"prompt is too long: 20\d\d tokens > 121\d maximum"
    for size, words in ((900, by_engine), (2000, before)):
        messages = [{"role": "user", "content": "x" * size}]
        chats = (("chat/completions", {"messages": messages}), ("completions", {"prompt": "x" * size}))
        for stream in (False, True):
            for path, body in chats:
                status, told = short.post(f"/v1/{path}", stream=stream, **body)
                assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
                assert told["error"]["type"] == "invalid_request_error"
                assert re.search(words, told["error"]["message"])
            status, told = short.post("/v1/messages", stream=stream, messages=messages, max_tokens=5)
            assert (status, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")
            assert re.match(words, told["error"]["message"])
        status, told = short.post("/v1/responses", input=messages)
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
        said = short.client.post("/v1/responses", json={"model": _MODEL, "input": messages, "stream": True})
        *_, last = (line for line in said.text.splitlines() if line.startswith("data: "))
        failed = json.loads(last.removeprefix("data: "))
        assert (said.status_code, failed["type"]) == (200, "response.failed")
        assert failed["response"]["error"]["code"] == "context_length_exceeded"
        assert re.search(words, failed["response"]["error"]["message"])
    assert short.post("/v1/completions", prompt="Hi", max_tokens=1)[0] == 200, "nothing else is harmed"


def test_once_closed_no_request_is_taken_from_a_connection_that_stays(running: Running) -> None:
    """A listening socket that is closed keeps new connections out, and none that clients hold already."""
    for path, body in _REQUESTS:
        if not body.get("stream"):
            assert running.post(path, **body)[0] == 200
    running.service.close()
    for path, body in _REQUESTS:
        status, told = running.post(path, **body)
        assert (status, "shutting down" in str(told)) == (503, True), f"{path} {body}"
