"""What every dialect promises alike: answers that are owed come, the default model, and how long a context is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.dialects import anthropic_sdk
from tests.support.models import make_model
from tests.support.server import Server, serving

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
CONTEXT = 2048
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "weather", "parameters": CITY}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
_dialects = pytest.mark.parametrize("dialect", PATHS)
_streams = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("promises")
    models = top / "models" / "acme"
    make_model(models / "stops", "<think>Hm.", thinks=True, context=CONTEXT)
    make_model(models / "calls", CALL, calls_tools=True, after_tool="Sunny.")
    with serving(top / "home", models.parent, options=["--default-model", "acme/stops"]) as server:
        yield server


def _said(server: Server, dialect: str, *, stream: bool, **body: Any) -> str:
    """The whole answer of a request as it was sent, which must be no error."""
    asked: dict[str, Any] = {"input": "Hi"} if dialect == "responses" else {"messages": HI}
    if dialect == "messages":
        asked["max_tokens"] = 200
    answer = server.http.post(PATHS[dialect], json={"model": "acme/stops", **asked, "stream": stream, **body})
    assert answer.status_code == 200, answer.text
    return answer.text


def _demand(dialect: str, what: str) -> dict[str, Any]:
    """The fields that demand a call, or an answer that fits a schema."""
    if what == "schema":
        formats: dict[str, dict[str, Any]] = {
            "chat": {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}},
            "responses": {"text": {"format": {"type": "json_schema", "name": "city", "schema": CITY}}},
            "messages": {"output_config": {"format": {"type": "json_schema", "schema": CITY}}},
        }
        return formats[dialect]
    tools: Any = {
        "chat": [{"type": "function", "function": TOOL}],
        "responses": [{"type": "function", **TOOL}],
        "messages": [{"name": "weather", "input_schema": CITY}],
    }[dialect]
    any_ = {"type": "any"} if dialect == "messages" else "required"
    one: dict[str, Any] = {
        "chat": {"type": "function", "function": {"name": "weather"}},
        "responses": {"type": "function", "name": "weather"},
        "messages": {"type": "tool", "name": "weather"},
    }
    return {"tools": tools, "tool_choice": any_ if what == "any call" else one[dialect]}


# Answers that are owed ------------------------------------------------------------------------------------------


@_streams
@_dialects
@pytest.mark.parametrize("what", ["any call", "one call", "schema"])
def test_an_answer_that_is_owed_comes_though_the_model_stops_inside_its_reasoning(
    server: Server, dialect: str, what: str, stream: bool
) -> None:
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 100}} if dialect == "messages" else {}
    said = _said(server, dialect, stream=stream, **_demand(dialect, what), **thinking)
    assert "Hm." in said, "the model did not reason"
    text = "".join(re.findall(r'"(?:content|text|delta)":"((?:[^"\\]|\\.)*)"', said))
    assert "Oslo" in (text if what == "schema" else said)
    assert "max_tokens" not in said
    assert '"length"' not in said


# Arguments that come back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_that_come_back_may_be_objects(server: Server, arguments: Any) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": arguments}
    result = {"type": "function_call_output", "call_id": "call_1", "output": "21"}
    said = _said(server, "responses", stream=False, model="acme/calls", input=[*HI, call, result])
    assert "Sunny." in said


@_streams
@_dialects
def test_a_call_cut_short_shows_no_mark(server: Server, dialect: str, stream: bool) -> None:
    names = {"chat": "max_tokens", "responses": "max_output_tokens", "messages": "max_tokens"}
    tools = {"tools": _demand(dialect, "any call")["tools"]}
    said = _said(server, dialect, stream=stream, model="acme/calls", **{names[dialect]: 2}, **tools)
    assert "tool_call>" not in said
    assert {"chat": '"tool_calls":', "responses": '"function_call"', "messages": '"tool_use"'}[dialect] not in said
    assert {"chat": '"length"', "responses": '"incomplete"', "messages": '"max_tokens"'}[dialect] in said


# The default model ----------------------------------------------------------------------------------------------


def test_the_default_model_describes_itself_under_names_that_are_not_known(server: Server) -> None:
    assert server.openai.models.retrieve("gpt-4o").id == "gpt-4o"
    with anthropic_sdk(server) as sdk:
        assert sdk.models.retrieve("claude-sonnet-4-5").id == "claude-sonnet-4-5"
    assert server.http.get("/v1/models/acme/calls").json()["id"] == "acme/calls"
    assert [model.id for model in server.openai.models.list()] == ["acme/calls", "acme/stops"]


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}], ids=["none", "null", "empty"])
@_dialects
def test_the_default_model_answers_requests_that_name_none(server: Server, dialect: str, given: Any) -> None:
    body: dict[str, Any] = {"input": "Hi"} if dialect == "responses" else {"messages": HI}
    if dialect == "messages":
        body["max_tokens"] = 20
    answer = server.http.post(PATHS[dialect], json={**body, **given})
    assert (answer.status_code, answer.json()["model"]) == (200, "acme/stops"), answer.text


def test_plain_completions_and_counts_need_no_name(server: Server) -> None:
    assert server.http.post("/v1/completions", json={"prompt": "Hi"}).json()["model"] == "acme/stops"
    assert server.http.post("/v1/messages/count_tokens", json={"messages": HI}).json()["input_tokens"] > 0


# How long a context is ------------------------------------------------------------------------------------------


def test_models_say_how_long_their_context_is_before_they_are_loaded_and_after(server: Server) -> None:
    for path in ("/v1/models/acme/stops", "/v1/models/some-other"):
        info = server.http.get(path).json()
        assert (info["context_length"], info["max_model_len"]) == (CONTEXT, CONTEXT)
    assert {each["context_length"] > 0 for each in server.http.get("/v1/models").json()["data"]} == {True}
    with anthropic_sdk(server) as sdk:
        assert sdk.models.retrieve("acme/stops").max_input_tokens == CONTEXT


@_streams
def test_a_prompt_that_is_too_long_is_refused_as_each_dialect_does(server: Server, stream: bool) -> None:
    long = "x" * 3 * CONTEXT
    messages = [{"role": "user", "content": long}]
    for path, body in ((PATHS["chat"], {"messages": messages}), ("/v1/completions", {"prompt": long})):
        error = server.http.post(path, json={**body, "stream": stream}).json()["error"]
        assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
        assert error["message"].startswith("This model's maximum context length is")
    told = server.http.post(PATHS["messages"], json={"messages": messages, "max_tokens": 9, "stream": stream}).json()
    assert told["error"]["type"] == "invalid_request_error"
    assert told["error"]["message"].startswith("prompt is too long: ")


def test_a_stream_of_responses_ends_with_the_code_that_clients_compact_by(server: Server) -> None:
    said = _said(server, "responses", stream=True, input="x" * 3 * CONTEXT)
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["error"]["code"] == "context_length_exceeded"
