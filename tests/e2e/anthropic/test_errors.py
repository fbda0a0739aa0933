"""Errors of the Messages API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.e2e.anthropic.asking import HELLO, HI, PLAIN, RANDOM, reply, text_of
from tests.support.dialects import anthropic_sdk
from tests.support.server import Server, serving

KEY = "a-secret-key"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    """A server that takes one key, small bodies and one request at a time."""
    options = ["--offline", "--max-body", "20K", "--max-batch", "1", "--max-queue", "0", "--max-messages", "3"]
    home = tmp_path_factory.mktemp("home")
    with serving(home, models, options=options, environ={"MLX_OMNI_API_KEY": KEY}, api_key=KEY) as server:
        yield server
        assert KEY not in server.log()


def _check(error: anthropic.APIStatusError, status: int, kind: str) -> None:
    """An error has Anthropic's shape, and a message of one line."""
    body: Any = error.body
    assert (error.status_code, error.type) == (status, kind)
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"].keys()) == ("error", {"type", "message"})
    assert body["error"]["message"]
    assert "\n" not in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(sdk: Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.NotFoundError) as refused:
        reply(sdk, "acme/none", stream=stream)
    _check(refused.value, 404, "not_found_error")
    with pytest.raises(anthropic.NotFoundError) as refused:
        sdk.messages.count_tokens(model="acme/none", messages=HI)
    _check(refused.value, 404, "not_found_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_know(sdk: Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum") as refused:
        reply(sdk, PLAIN, "x" * 5000, stream=stream)
    _check(refused.value, 400, "invalid_request_error")


def test_a_foreign_host_is_refused(server: Server) -> None:
    with (
        anthropic_sdk(server, default_headers={"Host": "evil.example"}) as sdk,
        pytest.raises(anthropic.PermissionDeniedError) as refused,
    ):
        reply(sdk, PLAIN)
    _check(refused.value, 403, "permission_error")


@pytest.mark.parametrize("options", [{"api_key": KEY}, {"auth_token": KEY}])
def test_the_sdk_opens_the_server_with_its_key(narrow: Server, options: dict[str, str]) -> None:
    with anthropic_sdk(narrow, **options) as sdk:
        assert text_of(reply(sdk, PLAIN)) == HELLO
        assert sdk.models.retrieve(PLAIN).id == PLAIN


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/anthropic/v1/messages"])
@pytest.mark.parametrize("headers", [{"x-api-key": KEY}, {"Authorization": f"Bearer {KEY}"}])
def test_a_key_is_taken_from_either_header(narrow: Server, headers: dict[str, str], path: str) -> None:
    body = {"model": PLAIN, "messages": HI, "max_tokens": 1}
    assert narrow.http.post(path, json=body, headers=headers).status_code == 200
    wrong = {name: f"{value}r" for name, value in headers.items()}
    for refused in (narrow.http.post(path, json=body, headers=wrong), narrow.http.post(path, json=body)):
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("options", [{"api_key": "wrong"}, {"auth_token": "wrong"}, {"api_key": "é"}])
def test_a_wrong_key_opens_nothing(narrow: Server, options: dict[str, str]) -> None:
    with anthropic_sdk(narrow, **options) as sdk:
        for ask in (lambda: reply(sdk, PLAIN), lambda: sdk.models.list(), lambda: sdk.models.retrieve(PLAIN)):
            with pytest.raises(anthropic.AuthenticationError) as refused:
                ask()
            _check(refused.value, 401, "authentication_error")
            assert "wrong" not in refused.value.message


def test_a_body_that_is_too_large_is_refused(narrow: Server) -> None:
    with anthropic_sdk(narrow) as sdk, pytest.raises(anthropic.RequestTooLargeError) as refused:
        reply(sdk, PLAIN, "x" * 30_000)
    _check(refused.value, 413, "request_too_large")


def test_too_many_messages_are_refused(narrow: Server) -> None:
    with anthropic_sdk(narrow) as sdk, pytest.raises(anthropic.BadRequestError) as refused:
        reply(sdk, PLAIN, HI * 5)
    _check(refused.value, 400, "invalid_request_error")


def test_a_request_too_many_is_told_to_come_again(narrow: Server) -> None:
    with anthropic_sdk(narrow) as sdk:
        with sdk.messages.create(model=RANDOM, messages=HI, max_tokens=4000, stream=True) as first:
            next(iter(first))
            with pytest.raises(anthropic.RateLimitError) as refused:
                reply(sdk, PLAIN)
        _check(refused.value, 429, "rate_limit_error")
        assert refused.value.response.headers["retry-after"] == "1"


def test_a_route_that_is_not_there_answers_in_anthropics_shape(server: Server) -> None:
    for path, status in (("/anthropic/v1/nothing", 404), ("/v1/messages/batches", 404)):
        answer = server.http.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "not_found_error")
    answer = server.http.get("/v1/messages")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")
