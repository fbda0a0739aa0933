"""What `/openapi.json` says of answers and errors holds for those that a server gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from tests.support.encoders import make_encoder
from tests.support.models import make_model
from tests.support.server import Server, serving

MODEL = "acme/thinks"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
NONSENSE = {"type": "nonsense"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI, "n": 2, "logprobs": True, "top_logprobs": 1},
    "/v1/completions": {"prompt": ["Hi", "So?"], "logprobs": 1, "max_tokens": 3},
    "/v1/messages": {"messages": HI, "max_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 50}},
    "/v1/messages/count_tokens": {"messages": HI},
    "/v1/embeddings": {"input": ["cats", "purr"]},
    "/v1/rerank": {"query": "cats", "documents": ["purr", {"text": "bark"}]},
    "/v2/rerank": {"query": "cats", "documents": ["purr"]},
    "/v1/responses": {"input": "Hi", "top_logprobs": 1, "include": ["reasoning.encrypted_content"]},
}
MODELS = {"/v1/embeddings": "acme/embed", "/v1/rerank": "acme/rerank", "/v2/rerank": "acme/rerank"}
WITH_TOOLS: dict[str, Any] = {
    "/v1/chat/completions": [{"type": "function", "function": TOOL}],
    "/v1/messages": [{"name": "find", "input_schema": {"type": "object"}}],
    "/v1/responses": [{"type": "namespace", "name": "space", "tools": [{"type": "function", **TOOL}]}],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("openapi")
    says = '<think>Hm.</think>Yes.<tool_call>{"name": "find", "arguments": {"a": 1}}</tool_call>'
    make_model(top / "models" / MODEL, says, thinks=True, calls_tools=True)
    make_encoder(top / "models/acme/embed")
    make_encoder(top / "models/acme/rerank", head="ForSequenceClassification")
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="module")
def schema(server: Server) -> dict[str, Any]:
    """The server's schema, in which an object has the properties that are listed and no others."""
    whole: dict[str, Any] = server.http.get("/openapi.json").json()
    for each in whole["components"]["schemas"].values():
        if "properties" in each:
            each["additionalProperties"] = False
    return whole


def _check(schema: dict[str, Any], method: str, path: str, status: str, content: object) -> None:
    described = schema["paths"][path][method]["responses"][status]["content"]["application/json"]["schema"]
    assert described, "an answer of any kind"
    jsonschema_rs.validate({**copy.deepcopy(described), "components": schema["components"]}, content)


@pytest.mark.parametrize("path", BODIES)
def test_an_answer_is_as_described(path: str, server: Server, schema: dict[str, Any]) -> None:
    answer = server.http.post(path, json={"model": MODELS.get(path, MODEL), **BODIES[path]})
    assert answer.status_code == 200, answer.text
    _check(schema, "post", path, "200", answer.json())


@pytest.mark.parametrize("path", WITH_TOOLS)
def test_an_answer_with_a_tool_call_is_as_described(path: str, server: Server, schema: dict[str, Any]) -> None:
    answer = server.http.post(path, json={"model": MODEL, **BODIES[path], "tools": WITH_TOOLS[path]})
    assert answer.status_code == 200, answer.text
    assert '"find"' in answer.text
    assert '"Hm."' in answer.text
    _check(schema, "post", path, "200", answer.json())


@pytest.mark.parametrize("path", [path for path in BODIES if path not in MODELS and not path.endswith("count_tokens")])
def test_streams_are_described(path: str, server: Server, schema: dict[str, Any]) -> None:
    answered = schema["paths"][path]["post"]["responses"]["200"]["content"]
    assert answered["text/event-stream"]["schema"]["description"]
    answer = server.http.post(path, json={"model": MODEL, **BODIES[path], "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("model", "status"), [("acme/none", 404), (5, 400)])
def test_an_error_is_as_described(
    path: str, model: object, status: int, server: Server, schema: dict[str, Any]
) -> None:
    answer = server.http.post(path, json={**BODIES[path], "model": model})
    assert answer.status_code == status
    _check(schema, "post", path, "4XX", answer.json())


@pytest.mark.parametrize("headers", [{}, {"anthropic-version": "2023-06-01"}])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model_id}"])
def test_models_are_as_described(path: str, headers: dict[str, str], server: Server, schema: dict[str, Any]) -> None:
    for root in ("", "/anthropic"):
        if f"{root}{path}" in schema["paths"]:
            answer = server.http.get(f"{root}{path}".format(model_id=MODEL), headers=headers)
            _check(schema, "get", f"{root}{path}", "200", answer.json())


def test_health_is_as_described(server: Server, schema: dict[str, Any]) -> None:
    _check(schema, "get", "/health", "200", server.http.get("/health").json())


@pytest.mark.parametrize("name", ["status", "models", "problems", "requests", "downloads"])
def test_what_the_page_shows_is_as_described(name: str, server: Server, schema: dict[str, Any]) -> None:
    server.chat(MODEL, "Hi")
    answer = server.http.get(f"/manage/v1/{name}")
    _check(schema, "get", f"/manage/v1/{name}", "200", answer.json())


@pytest.mark.parametrize("name", ["models/load", "models/unload", "models/pin", "downloads", "downloads/cancel"])
def test_what_the_page_does_is_refused_as_described(name: str, server: Server, schema: dict[str, Any]) -> None:
    answer = server.http.post(f"/manage/v1/{name}", json={"model": 5})
    assert answer.status_code == 400
    _check(schema, "post", f"/manage/v1/{name}", "4XX", answer.json())


def test_stored_responses_are_as_described(server: Server, schema: dict[str, Any]) -> None:
    path = "/v1/responses/{response_id}"
    made = server.http.post("/v1/responses", json={"model": MODEL, "input": "Hi"}).json()
    place = path.format(response_id=made["id"])
    _check(schema, "get", path, "200", server.http.get(place).json())
    _check(schema, "delete", path, "200", server.http.delete(place).json())
    _check(schema, "get", path, "4XX", server.http.get(place).json())


@pytest.mark.parametrize(
    ("path", "more", "name"),
    [
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": NONSENSE}}},
            "response_format",
        ),
        (
            "/v1/responses",
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": NONSENSE}}},
            "text.format",
        ),
        (
            "/v1/messages",
            {"output_config": {"format": {"type": "json_schema", "schema": NONSENSE}}},
            "output_config.format",
        ),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_format_that_cannot_be_enforced_is_refused_by_the_dialect_s_own_name(
    path: str, more: dict[str, Any], name: str, is_streamed: bool, server: Server
) -> None:
    answer = server.http.post(path, json={"model": MODEL, **BODIES[path], **more, "stream": is_streamed})
    assert answer.status_code == 400
    error = answer.json()["error"]
    if path == "/v1/messages":
        assert error["message"].startswith(f"`{name}`: ")
        assert "response_format" not in error["message"]
    else:
        assert error["param"] == name
