"""Errors: every dialect has a status, a type and its own field names for each of them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import mlx_overlay_server
import pytest
from anthropic.types.shared.error_type import ErrorType
from mlx_overlay_server import errors
from mlx_overlay_server.api.anthropic.routes import Messages
from mlx_overlay_server.api.anthropic.wire import MessagesRequest
from mlx_overlay_server.api.dialect import Dialect
from mlx_overlay_server.api.openai.routes import ChatCompletions, Completions
from mlx_overlay_server.api.openai.stored import ChatStore
from mlx_overlay_server.api.openai.wire import ChatCompletionRequest, CompletionRequest
from mlx_overlay_server.api.refusals import refuse
from mlx_overlay_server.api.responses.routes import Responses
from mlx_overlay_server.api.responses.store import Store
from mlx_overlay_server.api.responses.wire import ResponsesRequest
from mlx_overlay_server.engine.failures import failure
from mlx_overlay_server.errors import Field, InvalidRequest, PromptTooLong, ServerError
from pydantic import BaseModel

DIALECTS: dict[str, Dialect[Any]] = {
    "chat completions": ChatCompletions(ChatStore()),
    "completions": Completions(),
    "responses": Responses(Store(1)),
    "messages": Messages(),
}
BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "chat completions": (ChatCompletionRequest, CompletionRequest),  # they share one table
    "completions": (ChatCompletionRequest, CompletionRequest),
    "responses": (ResponsesRequest,),
    "messages": (MessagesRequest,),
}
FIELDS: tuple[Field, ...] = get_args(Field)


def _told(dialect: str, error: ServerError) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(bytes(DIALECTS[dialect].refuse(error).body))["error"]
    return told


# Names of fields ------------------------------------------------------------------------------------------------


def _has(body: type[BaseModel], path: str) -> bool:
    """Whether a request has a field: `a.b` is the field `b` of what `a` holds."""
    name, _, rest = path.partition(".")
    if name not in body.model_fields:
        return False
    kind = body.model_fields[name].annotation
    inner = [each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel)]
    return not rest or any(_has(each, rest) for each in inner)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_shared_field_has_an_entry_in_every_dialect(dialect: str) -> None:
    assert DIALECTS[dialect].names.keys() == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_names_the_field_as_its_client_does(dialect: str, field: Field) -> None:
    name = DIALECTS[dialect].names[field]
    assert name is None or any(_has(body, name) for body in BODIES[dialect])
    told = _told(dialect, InvalidRequest("it is wrong", field=field))
    if dialect == "messages":
        assert told["message"] == ("it is wrong" if name is None else f"`{name}`: it is wrong")
    else:
        assert (told["param"], told["message"]) == (name, "it is wrong")


def test_names_differ_by_dialect() -> None:
    names = {name: [each.names[field] for field in ("messages", "format", "effort")] for name, each in DIALECTS.items()}
    assert names == {
        "chat completions": ["messages", "response_format", "reasoning_effort"],
        "completions": ["messages", "response_format", "reasoning_effort"],
        "responses": ["input", "text.format", "reasoning.effort"],
        "messages": ["messages", "output_config.format", "output_config.effort"],
    }


def test_the_entry_of_a_mapping_is_named_too() -> None:
    error = InvalidRequest("leave it out", field="template_kwargs", key="tools")
    assert _told("chat completions", error)["param"] == "chat_template_kwargs.tools"
    assert _told("responses", error)["param"] is None
    assert _told("messages", error)["message"] == "leave it out"


def test_a_field_that_the_dialect_named_itself_keeps_its_name() -> None:
    error = InvalidRequest("it is wrong", param="format")
    assert _told("chat completions", error)["param"] == "format"
    assert _told("responses", error)["param"] == "format"
    assert _told("messages", error)["message"] == "`format`: it is wrong"


def _shared_modules() -> Iterator[Path]:
    """The modules that know nothing of dialects."""
    top = Path(mlx_overlay_server.__file__).parent
    yield top / "service.py"
    for folder in ("chat", "encoding", "models", "engine", "preparation"):
        yield from sorted((top / folder).glob("*.py"))


_ERRORS = frozenset(name for name, each in vars(errors).items() if isinstance(each, type))


def _blames(module: Path) -> Iterator[ast.Call]:
    """The errors that a module makes."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS:
            yield node


def test_shared_layers_blame_shared_fields_only() -> None:
    """The one name of a client's that they may pass on is the place that an image came from."""
    seen = set()
    for module in _shared_modules():
        for call in _blames(module):
            given = {each.arg: ast.unparse(each.value) for each in call.keywords}
            assert given.get("param", ".where").endswith(".where"), f"{module.name}:{call.lineno}"
            seen |= {given.get("field", "").strip("'")}
    assert {"model", "messages", "prompts", "logit_bias", "template_kwargs", "effort"} <= seen


def test_shared_layers_quote_no_dialect_s_names() -> None:
    own = (
        {name for each in DIALECTS.values() for name in each.names.values() if name} - set(FIELDS) - {"prompt", "input"}
    )
    for module in _shared_modules():
        for call in _blames(module):
            text = ast.unparse(call.args[0])
            assert not [name for name in own if name in text], f"{module.name}:{call.lineno}"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("ending", "word"), [("ErrorOutOfMemory", "memory"), ("ErrorTimeout", "time"), ("ErrorPageFault", "failed")]
)
def test_an_error_of_the_gpu_is_a_503_that_says_what_has_run_out(dialect: str, ending: str, word: str) -> None:
    error = failure(RuntimeError(f"[METAL] Command buffer execution failed: Error (0:kIOGPUCommandBuffer{ending})."))
    assert DIALECTS[dialect].refuse(error).status_code == 503
    told = _told(dialect, error)
    assert word in told["message"]
    assert told["type"] == KINDS[errors.Unavailable][2 if dialect == "messages" else 1]


# Status and type ------------------------------------------------------------------------------------------------

KINDS: dict[type[ServerError], tuple[int, str, str]] = {
    errors.ServerError: (500, "invalid_request_error", "api_error"),
    errors.InvalidRequest: (400, "invalid_request_error", "invalid_request_error"),
    errors.PromptTooLong: (400, "invalid_request_error", "invalid_request_error"),
    errors.Unauthorized: (401, "authentication_error", "authentication_error"),
    errors.Forbidden: (403, "permission_error", "permission_error"),
    errors.NotFound: (404, "invalid_request_error", "not_found_error"),
    errors.UnknownModel: (404, "invalid_request_error", "not_found_error"),
    errors.MethodNotAllowed: (405, "invalid_request_error", "invalid_request_error"),
    errors.Conflict: (409, "invalid_request_error", "invalid_request_error"),
    errors.Stopped: (410, "invalid_request_error", "invalid_request_error"),
    errors.TooLarge: (413, "invalid_request_error", "request_too_large"),
    errors.Overloaded: (429, "rate_limit_error", "rate_limit_error"),
    errors.Failed: (500, "server_error", "api_error"),
    errors.Unavailable: (503, "server_error", "overloaded_error"),
}


def test_every_error_is_in_the_table() -> None:
    def below(kind: type[ServerError]) -> Iterator[type[ServerError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    assert KINDS.keys() == set(below(ServerError))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_has_its_status_and_type_in_each_dialect(dialect: str, kind: type[ServerError]) -> None:
    status, openai, anthropic = KINDS[kind]
    response = DIALECTS[dialect].refuse(kind("no"))
    assert response.status_code == status
    assert _told(dialect, kind("no"))["type"] == (anthropic if dialect == "messages" else openai)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_anthropic_s_types_are_those_that_its_sdk_knows() -> None:
    documented = {*get_args(ErrorType), "request_too_large"}  # of its errors page, though not of its SDK's type
    assert {anthropic for _, _, anthropic in KINDS.values()} <= documented


def test_a_prompt_that_is_too_long_begins_with_the_words_that_anthropic_s_clients_look_for() -> None:
    told = _told("messages", PromptTooLong("prompt is too long: 9 tokens > 8 maximum", field="messages"))
    assert told["message"] == "prompt is too long: 9 tokens > 8 maximum"


# Outside of a dialect's routes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "told"),
    [
        ("/v1/chat/completions", [], ("messages", None)),
        ("/chat/completions", [], ("messages", None)),
        ("/v1/responses", [], ("input", None)),
        ("/responses", [], ("input", None)),
        ("/v1/messages", [], (None, "error")),
        ("/v1/messages/count_tokens", [], (None, "error")),
        ("/anthropic/v1/models", [], (None, "error")),
        ("/v1/models", [(b"anthropic-version", b"2023-06-01")], (None, "error")),
        ("/v1/models", [], ("messages", None)),
        ("/", [], ("messages", None)),
    ],
)
def test_a_refusal_has_the_shape_of_the_request_s_dialect(
    path: str, headers: list[tuple[bytes, bytes]], told: tuple[str | None, str | None]
) -> None:
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    response = refuse(scope, InvalidRequest("no", field="messages"))
    content = json.loads(bytes(response.body))
    assert (content["error"].get("param"), content.get("type")) == told
