"""What a real server refuses of OpenAI's dialect, each with the field's name; and what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.models import make_model
from tests.support.server import Server, serving

PLAIN = "acme/plain"
HELLO = "Hello there."
HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": PLAIN, "messages": HI}
TEXT: dict[str, Any] = {"model": PLAIN, "prompt": "hi"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("refusals")
    make_model(top / "models" / "acme" / "plain", HELLO)
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


def _refused(server: Server, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """An error in OpenAI's shape, which has these four fields and no other."""
    answer = server.http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert answer.json() == {"error": error}
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("function_call", "never"),
        ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}),
        ("service_tier", "flex"),
        ("verbosity", "loud"),
        ("prompt_logprobs", 21),
        ("min_tokens", -1),
        ("modalities", ["text", "audio"]),
        ("no_such_field", None),
        ("n", 0),
        ("n", 1000),
        ("n", "many"),
        ("temperature", "hot"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("logit_bias", {"no token": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"100000": 1}),
        ("logit_bias", [5]),
        ("seed", 1 << 64),
        ("seed", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "all"),
        ("max_completion_tokens", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", [5]),
        ("stop", ["a"] * 100),
        ("stream", "maybe"),
        ("stream_options", {"include_usage": True}),
        ("logprobs", 5),
        ("top_logprobs", 5),
        ("tools", "all"),
        ("tool_choice", "always"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "none"}}),
        ("tool_choice", 5),
        ("parallel_tool_calls", 5),
        ("response_format", {"type": "xml"}),
        ("response_format", "json"),
        ("reasoning_effort", "huge"),
        ("reasoning_effort", "low"),  # which this model's template does not know
        ("messages", []),
        ("messages", None),
        ("messages", "hi"),
        ("model", None),
        ("model", 5),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_fields_name(server: Server, field: str, value: Any) -> None:
    error = _refused(server, "/v1/chat/completions", {**CHAT, field: value})
    # Or a part of it: tokens of `logit_bias`, members of `modalities`.
    assert error["param"] in (field, f"{field}[0]", f"{field}[1]", *(f"{field}.{key}" for key in _keys(value)))
    assert error["type"] == "invalid_request_error"


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [{"role": "martian", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [5]}, "messages[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
    ],
)
def test_a_wrong_part_of_a_field_is_named_as_the_client_wrote_it(
    server: Server, body: dict[str, Any], param: str
) -> None:
    assert _refused(server, "/v1/chat/completions", {**CHAT, **body})["param"] == param


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": PIXEL}}, {"type": "input_audio"}])
def test_parts_that_a_text_model_cannot_read_are_refused(server: Server, part: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    error = _refused(server, "/v1/chat/completions", {**CHAT, "messages": messages})
    assert error["param"].startswith("messages[0].content[1]")


def test_images_are_not_fetched_from_anywhere(server: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": f"{server.url}/v1/models"}}
    error = _refused(server, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": [part]}]})
    assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "the end"),
        ("best_of", 2),
        ("n", 129),
        ("prompt", []),
        ("prompt", None),
        ("prompt", 5),
        ("prompt", {}),
        ("prompt", [100_000]),
        ("prompt", [-1]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("messages", HI),
        ("tools", []),
    ],
)
def test_a_completion_refuses_what_it_cannot_do(server: Server, field: str, value: Any) -> None:
    assert _refused(server, "/v1/completions", {**TEXT, field: value})["param"] == field


@pytest.mark.parametrize("prompt", [[[]], ["x", 5], [["x"]], [5, "x"], [None], [1.5]])
def test_prompts_of_no_one_kind_are_refused(server: Server, prompt: Any) -> None:
    assert _refused(server, "/v1/completions", {**TEXT, "prompt": prompt})["param"].startswith("prompt")


def test_more_answers_than_one_request_may_have_are_refused(server: Server) -> None:
    assert _refused(server, "/v1/completions", {**TEXT, "prompt": ["hi"] * 50, "n": 3})["param"] in ("n", "prompt")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context_is_refused(server: Server, stream: bool) -> None:
    long = "x" * 5000
    for path, body, param in (
        ("/v1/chat/completions", {"model": PLAIN, "messages": [{"role": "user", "content": long}]}, "messages"),
        ("/v1/completions", {"model": PLAIN, "prompt": long}, "prompt"),
    ):
        error = _refused(server, path, {**body, "stream": stream})
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert long[:100] not in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"model": NaN}', b"{}"])
def test_a_body_that_is_no_request_is_refused(server: Server, path: str, content: bytes) -> None:
    answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "model": "\ud800"}, "model"),
        ("/v1/completions", {**TEXT, "prompt": ["fine", "\ud800"]}, "prompt"),
    ],
)
def test_text_that_is_no_unicode_is_refused(
    server: Server, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    content = json.dumps({**body, "stream": stream})  # with \ud800 written as that
    answer = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_null_asks_for_nothing(server: Server) -> None:
    names = "temperature top_p n stop max_tokens stream seed tools tool_choice logprobs response_format logit_bias user"
    answer = server.http.post("/v1/chat/completions", json={**CHAT, **dict.fromkeys(names.split())})
    assert answer.json()["choices"][0]["message"]["content"] == HELLO


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    more = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "prompt_cache_key": "x",
        "safety_identifier": "y",
        "parallel_tool_calls": True,
    }
    assert server.chat(PLAIN, "hi", **more).choices[0].message.content == HELLO


def test_a_bad_request_is_the_sdks_bad_request(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        server.chat(PLAIN, "hi", modalities=["audio"])
    assert (refused.value.param, refused.value.type, refused.value.status_code) == (
        "modalities[0]", "invalid_request_error", 400,
    )  # fmt: skip


def test_a_compressed_body_is_refused_by_the_name_of_its_header(server: Server) -> None:
    told = server.http.post("/v1/chat/completions", json=CHAT, headers={"Content-Encoding": "gzip"})
    assert (told.status_code, "Content-Encoding: gzip" in told.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(("before", "blamed"), [("/v1", "must not end in /v1"), ("/", "must not end in a slash")])
def test_a_wrong_base_url_of_a_client_is_what_the_answer_speaks_of(server: Server, before: str, blamed: str) -> None:
    told = server.http.post(f"{server.url}{before}/v1/messages", json=CHAT)
    assert (told.status_code, told.json()["type"], blamed in told.json()["error"]["message"]) == (404, "error", True)


def test_what_is_refused_before_it_reaches_a_model_is_logged_with_its_field_and_no_value(server: Server) -> None:
    _refused(server, "/v1/chat/completions", {**CHAT, "temperature": "fiercely hot"})
    _refused(server, "/v1/no/such", CHAT, 404)
    log = server.log()
    assert ", POST /v1/chat/completions: refused (400, temperature)\n" in log
    assert ", POST /v1/no/such: refused (404)\n" in log
    assert "fiercely" not in log


def test_what_can_be_got_has_a_head(server: Server) -> None:
    for path in ("/v1/models", "/health"):
        got, head = server.http.get(path), server.http.head(path)
        assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", got.headers["content-type"])
    assert server.http.head("/v1/completions").status_code == 405


def test_the_server_answers_after_all_that_was_wrong(server: Server) -> None:
    assert server.chat(PLAIN, "hi").choices[0].message.content == HELLO


@pytest.mark.parametrize("path", ["images/edits", "images/generations", "files", "moderations"])
@pytest.mark.parametrize("prefix", ["/v1/", "/"])
def test_what_this_server_does_not_do_at_all_is_said_in_a_sentence(server: Server, prefix: str, path: str) -> None:
    told = server.http.post(prefix + path, files={"file": b"RIFF"}, data={"model": "whisper-1"})
    error = told.json()["error"]
    assert (told.status_code, error["code"], error["type"]) == (404, "not_supported", "invalid_request_error")
    assert error["message"].startswith("this server")


@pytest.mark.parametrize("path", ["files/file-1/content", "vector_stores/vs_1/files", "threads/t/runs"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_so_it_is_of_addresses_below_and_by_every_method(server: Server, method: str, path: str) -> None:
    told = server.http.request(method, f"/v1/{path}")
    assert (told.status_code, told.json()["error"]["code"]) == (404, "not_supported")


def test_batches_of_messages_are_refused_as_anthropic_refuses(server: Server) -> None:
    told = server.http.post("/v1/messages/batches", json={"requests": []})
    assert (told.status_code, told.json()["type"]) == (404, "error")
    assert "batches" in told.json()["error"]["message"]
