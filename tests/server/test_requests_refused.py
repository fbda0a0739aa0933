"""Requests that the server must refuse whatever connection they come by: no room for an answer, or shutting down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hf_overlay
import pytest
from mlx_overlay_server.app import build
from mlx_overlay_server.live import Live
from mlx_overlay_server.options import make_parser, read
from mlx_overlay_server.service import Service
from starlette.testclient import TestClient

from tests.support.models import make_model

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


def test_once_closed_no_request_is_taken_from_a_connection_that_stays(running: Running) -> None:
    """A listening socket that is closed keeps new connections out, and none that clients hold already."""
    for path, body in _REQUESTS:
        if not body.get("stream"):
            assert running.post(path, **body)[0] == 200
    running.service.close()
    for path, body in _REQUESTS:
        status, told = running.post(path, **body)
        assert (status, "shutting down" in str(told)) == (503, True), f"{path} {body}"
