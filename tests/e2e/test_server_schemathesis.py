"""What no client should send, by the server's own OpenAPI schema and by hand: refused, in the dialect's shape."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.support.models import make_model
from tests.support.processes import SECONDS, eventually
from tests.support.server import Server, serving

MODEL = "acme/plain"
SAYS = "Hello."
CONTEXT = 1024
MAX_BODY = 20 * 10**6

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "Found."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "find",
                "description": "Finds.",
                "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
            },
        }
    ],
    "tool_choice": "auto",
    "temperature": 0.5,
    "top_p": 0.5,
    "max_tokens": 5,
    "stop": ["never said"],
    "seed": 1,
    "logit_bias": {"65": 1},
    "logprobs": True,
    "top_logprobs": 1,
    "stream": False,
    "metadata": {"a": "b"},
    "chat_template_kwargs": {"mood": "merry"},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": ["Hi", "So?"], "max_tokens": 5, "n": 1, "logprobs": 1, "echo": False},
    "/v1/messages": {
        "model": MODEL,
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "tools": [{"name": "find", "description": "Finds.", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "stop_sequences": ["never said"],
        "metadata": {"user_id": "me"},
    },
    "/v1/messages/count_tokens": {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {
        "model": MODEL,
        "max_output_tokens": 5,
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "function_call", "call_id": "1", "name": "find", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "1", "output": "Found."},
        ],
        "tools": [{"type": "function", "name": "find", "parameters": {"type": "object"}}],
        "text": {"format": {"type": "text"}},
        "store": False,
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In the end it must be as it was: ready, idle, and with an answer for a proper request."""
    top = tmp_path_factory.mktemp("corpus")
    config = make_model(top / "models" / MODEL, SAYS, thinks=True, calls_tools=True) / "config.json"
    # Small: what must be JSON of a schema's is long, since the model never thinks of ending it.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}))
    options = ["--offline", "--max-body", str(MAX_BODY)]
    with serving(top / "home", top / "models", options=options) as server:
        yield server
        eventually(lambda: "mlx_omni_pending_sequences 0.0" in server.http.get("/metrics").text, "nothing is pending")
        assert server.chat_answer(MODEL, "Hi", stream=True).content == SAYS
        health = server.http.get("/health").json()
        assert (health["status"], health["engine"]["failures"]) == ("ready", 0)


def _check(path: str, status: int, content: bytes, media_type: str, *, is_anthropic: bool = False) -> None:
    """An answer, or an error in the shape of its client's dialect that is short enough to read."""
    assert status < 500, content[:1000]
    if media_type.startswith("text/event-stream"):
        assert b'"server_error"' not in content
        assert b'"api_error"' not in content
    elif status >= 400:
        assert len(content) < 5000, "an error is no place to give back what was sent"
        told = json.loads(content)
        if path.endswith("rerank"):
            assert told.keys() == {"message", "detail", "code"}
            assert told["message"]
            return
        if is_anthropic or ("messages" in path and "chat" not in path) or "anthropic" in path:
            assert told["type"] == "error"
            assert told["error"].keys() == {"type", "message"}
        else:
            assert told.keys() == {"error"}
            assert told["error"].keys() == {"message", "type", "param", "code"}
            assert told["error"]["param"] is None or isinstance(told["error"]["param"], str)
        assert told["error"]["message"]
        assert told["error"]["type"] not in ("server_error", "api_error")
    elif media_type.startswith("application/json"):
        json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def _send(server: Server, path: str, content: bytes, media_type: str = "application/json") -> httpx2.Response:
    answer = server.http.post(path, content=content, headers={"content-type": media_type})
    _check(path, answer.status_code, answer.content, answer.headers["content-type"])
    return answer


# By the schema --------------------------------------------------------------------------------------------------

OPERATIONS = [
    ("post", "/v1/chat/completions"),
    ("get", "/v1/chat/completions"),
    ("get", "/v1/chat/completions/{completion_id}"),
    ("post", "/v1/chat/completions/{completion_id}"),
    ("delete", "/v1/chat/completions/{completion_id}"),
    ("get", "/v1/chat/completions/{completion_id}/messages"),
    ("post", "/v1/completions"),
    ("post", "/v1/embeddings"),
    ("post", "/v1/rerank"),
    ("post", "/v2/rerank"),
    ("post", "/v1/audio/transcriptions"),
    ("post", "/v1/audio/translations"),
    ("post", "/v1/audio/speech"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{response_id}"),
    ("delete", "/v1/responses/{response_id}"),
    ("get", "/v1/responses/{response_id}/input_items"),
    ("post", "/v1/responses/{response_id}/cancel"),
    ("post", "/v1/responses/input_tokens"),
    ("post", "/v1/responses/compact"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("get", "/v1/models"),
    ("get", "/anthropic/v1/models"),
    ("get", "/v1/models/{model_id}"),
    ("get", "/anthropic/v1/models/{model_id}"),
    ("get", "/health"),
    ("get", "/metrics"),
]


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())


def test_every_operation_of_the_schema_is_tried(schema: Any) -> None:
    operations = [each.ok() for each in schema.get_all_operations()]
    found = [
        (each.method, each.path) for each in operations if not each.path.startswith("/manage/")
    ]  # stops and unloads
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_schema_allows_is_answered_or_refused(method: str, path: str, schema: Any, server: Server) -> None:
    _try_out(server, schema[path][method], GenerationMode.POSITIVE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path"),
    [
        (method, path)
        for method, path in OPERATIONS
        if (method == "post" or path.endswith("/models")) and not path.endswith("/cancel")  # which has no body
    ],
)
def test_what_the_schema_forbids_is_refused(method: str, path: str, schema: Any, server: Server) -> None:
    _try_out(server, schema[path][method], GenerationMode.NEGATIVE)


def _try_out(server: Server, operation: Any, mode: GenerationMode) -> None:
    @settings(
        max_examples=10,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL  # else each was refused for that
        answer = case.call(base_url=server.url, timeout=SECONDS)
        content_type = answer.headers.get("content-type", [""])[0]
        is_anthropic = "anthropic-version" in (case.headers or {})
        _check(case.path, answer.status_code, answer.content, content_type, is_anthropic=is_anthropic)

    send()


# By hand --------------------------------------------------------------------------------------------------------

WRONG: list[Any] = [None, True, -1, 10**30, "", "\x00", "\ud800", [], [None], {"\ud800": "\ud800"}]


def _mutants(body: Any) -> Iterator[Any]:
    """A body in which each part in turn is something else, or is missing."""
    yield from WRONG
    if isinstance(body, dict):
        for key, value in body.items():
            yield {name: each for name, each in body.items() if name != key}
            yield from ({**body, key: mutant} for mutant in _mutants(value))
    elif isinstance(body, list):
        for at, value in enumerate(body):
            yield [*body[:at], *body[at + 1 :]]
            yield from ([*body[:at], mutant, *body[at + 1 :]] for mutant in _mutants(value))


def test_a_forced_format_any_part_of_which_is_wrong_is_answered_or_refused(server: Server) -> None:
    plain = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    for mutant in _mutants(FORMAT):
        _send(server, "/v1/chat/completions", json.dumps({**plain, "response_format": mutant}).encode())
    for mutant in _mutants(CHAT["tools"]):
        body = {**plain, "tools": mutant, "tool_choice": "required"}
        _send(server, "/v1/chat/completions", json.dumps(body).encode())


def test_a_bias_against_all_that_a_format_allows_is_answered(server: Server) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "response_format": {"type": "json_object"},
        "logit_bias": {str(ord("{")): -100},
    }
    assert _send(server, "/v1/chat/completions", json.dumps(body).encode()).status_code == 200


def _deep(levels: int) -> str:
    return "[" * levels + "]" * levels


def _deep_object(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


_MODEL = f'"model": "{MODEL}"'
_MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'
_PLAIN = f'{_MODEL}, {_MESSAGES}, "max_tokens": 5'
_LONG = "x" * 2 * 10**6

RAW: dict[str, str | bytes] = {
    "nothing": "",
    "white space": "  \n",
    "half an object": "{",
    "half a string": '{"model": "',
    "two objects": "{}{}",
    "a comment": "/* */ {}",
    "single quotes": "{'model': 'x'}",
    "a trailing comma": '{"model": "x",}',
    "a list": "[]",
    "a text": '"x"',
    "a number": "5",
    "null": "null",
    "NaN": "NaN",
    "NaN in a field": f'{{{_PLAIN}, "temperature": NaN}}',
    "infinity in a field": f'{{{_PLAIN}, "temperature": Infinity}}',
    "a number beyond floats": f'{{{_PLAIN}, "temperature": 1e999}}',
    "NaN where nobody looks": f'{{{_PLAIN}, "metadata": {{"a": NaN}}}}',
    "an integer of 5000 digits": f'{{{_PLAIN}, "seed": {"9" * 5000}}}',
    "an integer of 4000 digits": f'{{{_PLAIN}, "seed": {"9" * 4000}}}',
    "a token of 4000 digits": f'{{{_MODEL}, {_MESSAGES}, "prompt": [{"9" * 4000}]}}',
    "a bias for a token of 4000 digits": f'{{{_PLAIN}, "logit_bias": {{"{"9" * 4000}": 1}}}}',
    "10,000 levels": _deep(10_000),
    "10,000 objects": _deep_object(10_000),
    "10,000 levels in a field": f'{{{_PLAIN}, "metadata": {_deep_object(10_000)}}}',
    "10,000 levels in a message": f'{{{_MODEL}, "messages": {_deep(10_000)}}}',
    **{
        f"{levels} levels in {name}": f'{{{_PLAIN}, "{name}": {value}}}'
        for levels in (100, 500, 900)
        for name, value in {
            "metadata": _deep_object(levels),
            "chat_template_kwargs": _deep_object(levels),
            "tools": f'[{{"type": "function", "function": {{"name": "f", "parameters": {_deep_object(levels)}}}}}]',
            "response_format": f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {_deep_object(levels)}}}}}',  # noqa: E501
        }.items()
    },
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "bytes": bytes(range(256)),
    "a field twice": f'{{{_PLAIN}, "model": 5}}',
    "2 MB of model": f'{{"model": "{_LONG}", {_MESSAGES}}}',
    "2 MB of role": f'{{{_MODEL}, "messages": [{{"role": "{_LONG}", "content": "Hi"}}]}}',
    "2 MB of a field's name": f'{{{_PLAIN}, "{_LONG}": 1}}',
    "2 MB of a stop": f'{{{_PLAIN}, "stop": "{_LONG}"}}',
    "2 MB of white space": f"{{{' ' * 2 * 10**6}{_PLAIN}}}",
    "more messages than are read": f'{{{_MODEL}, "messages": [{", ".join(["{}"] * 100_000)}]}}',
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", RAW)
def test_a_malformed_body_is_refused_or_does_no_harm(name: str, path: str, server: Server) -> None:
    content = RAW[name]
    _send(server, path, content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("levels", [100, 900, 10_000, 1_000_000])
def test_arguments_of_a_call_may_be_nested_to_any_depth(levels: int, server: Server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": _deep_object(levels)}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    _send(server, "/v1/chat/completions", json.dumps({"model": MODEL, "messages": messages, "max_tokens": 5}).encode())
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": _deep_object(levels)}
    _send(server, "/v1/responses", json.dumps({"model": MODEL, "input": [item], "max_output_tokens": 5}).encode())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x", ""]
)
def test_a_wrong_content_type_is_answered_or_refused(media_type: str, path: str, server: Server) -> None:
    _send(server, path, json.dumps(BODIES[path]).encode(), media_type)


IDS = [
    "..",
    ".",
    "../../etc",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "//etc/passwd",
    "acme/..",
    "acme/../plain",
    "acme/./plain",
    "acme//plain",
    "acme/plain/",
    "/acme/plain",
    "~",
    "~root/x",
    "-h",
    "--help",
    "C:\\x",
    "\\\\host\\share",
    "acme\\plain",
    "file:///etc/passwd",
    "http://localhost/x",
    "acme/plain@main",
    "acme/plain\n",
    " acme/plain",
    "acme/plain\x00",
    "\x00",
    "%2e%2e/etc",
    "${HOME}",
    "models--acme--plain",
    "acme--plain",
    "ac*/plain",
    "\u202eacme/plain",
    "é/ü",
    "x" * 300,
    "x/" * 300,
]


@pytest.mark.parametrize("model", IDS)
def test_an_id_leads_nowhere_but_to_a_model(model: str, server: Server) -> None:
    for path, body in BODIES.items():
        answer = _send(server, path, json.dumps({**body, "model": model}).encode())
        assert answer.status_code in (400, 404)
        assert "passwd:" not in answer.text
        assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models//etc/passwd",
        "/v1/models/%00",
        "/v1/models/%ff",
        "/v1/models/%",
        "/v1/models/%0a%0d",
        "/v1/models/" + "x" * 10_000,
        "/v1/models?limit=x",
        "/v1/responses/%2e%2e",
        "/v1/responses/" + "x" * 10_000,
        "/%2e%2e/%2e%2e/etc/passwd",
        "//",
        "/docs/../etc/passwd",
    ],
)
def test_a_path_leads_nowhere_but_to_a_route(path: str, server: Server) -> None:
    status, content, media_type = _raw(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert b"root:" not in content
    _check("/", status, content, media_type)


# By the byte ----------------------------------------------------------------------------------------------------


def _raw(server: Server, *parts: str | bytes) -> tuple[int, bytes, str]:
    """Status, body and content type of what comes back for some bytes, until the server closes the connection."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        try:
            for part in parts:
                connection.sendall(part if isinstance(part, bytes) else part.encode())
        except ConnectionError:
            pass  # it has heard enough
        received = b""
        try:
            while chunk := connection.recv(1 << 16):
                received += chunk
        except ConnectionError:
            pass  # after its answer, which there is
    head, _, body = received.partition(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").split("\r\n")
    fields = {name.lower(): value for name, _, value in (header.partition(": ") for header in headers)}
    return int(status.split()[1]), body, fields.get("content-type", "")


_HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
)


@pytest.mark.parametrize("length", ["x", "-1", "1.5", "9" * 30, "9" * 5000])
def test_a_content_length_that_is_none_is_refused(length: str, server: Server) -> None:
    status, _, _ = _raw(server, f"{_HEAD}Content-Length: {length}\r\n\r\n{{}}")
    assert status in (400, 413)


def test_a_body_that_says_that_it_is_too_large_is_refused_before_it_is_sent(server: Server) -> None:
    status, content, media_type = _raw(server, f"{_HEAD}Content-Length: {MAX_BODY + 1}\r\n\r\n")
    assert (status, json.loads(content)["error"]["code"]) == (413, "request_too_large")
    _check("/v1/chat/completions", status, content, media_type)


def test_a_body_of_chunks_that_are_too_many_is_refused(server: Server) -> None:
    chunk = b"%x\r\n%b\r\n" % (1 << 20, b" " * (1 << 20))
    chunks = [chunk] * (MAX_BODY // (1 << 20) + 2)
    status, content, _ = _raw(server, f"{_HEAD}Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
    assert (status, json.loads(content)["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    "key", [b"Authorization: Bearer \xff", b"X-Api-Key: \xe2\x82\xac", b"Origin: http://[", b"Cookie: \x80"]
)
def test_headers_that_are_no_text_do_no_harm(key: bytes, server: Server) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + key + b"\r\n\r\n"
    status, content, media_type = _raw(server, head)
    assert status in (200, 403)
    _check("/v1/models", status, content, media_type)


def test_what_was_sent_fills_no_log_and_makes_up_no_line_of_it(server: Server) -> None:
    secret = "sesame " * 1000
    _send(server, "/v1/chat/completions", json.dumps({"model": MODEL, "messages": secret}).encode())
    _send(server, "/v1/chat/completions", json.dumps({"model": secret, "messages": CHAT["messages"]}).encode())
    _send(
        server,
        "/v1/chat/completions",
        json.dumps({"model": "a\n00:00:00 INFO made up", "messages": CHAT["messages"]}).encode(),
    )
    assert max(map(len, server.log().splitlines())) < 2000
    assert not any(line.endswith(" INFO made up") for line in server.log().splitlines())
