"""Errors in OpenAI's shape, which Responses shares."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server import errors
from mlx_overlay_server.api.transport import param_of, refusal
from mlx_overlay_server.errors import Field, ServerError

NAMES: Mapping[Field, str | None] = {
    "model": "model",
    "messages": "messages",
    "prompts": "prompt",
    "tools": "tools",
    "format": "response_format",
    "effort": "reasoning_effort",
    "template_kwargs": "chat_template_kwargs",
    "logit_bias": "logit_bias",
    "texts": None,
    "prompt": None,
    "query": None,
    "documents": None,
    "instruction": None,
}
"""The names that chat completions and completions have for fields of the shared request."""

_TYPES: dict[type[ServerError], str] = {
    errors.Unauthorized: "authentication_error",
    errors.Forbidden: "permission_error",
    errors.Overloaded: "rate_limit_error",
    errors.Failed: "server_error",
    errors.Unavailable: "server_error",
}


class ErrorDetail(TypedDict):
    """The error itself."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """An error, as OpenAI's clients expect it."""

    error: ErrorDetail


def encode_error(error: ServerError, names: Mapping[Field, str | None] = NAMES) -> ErrorAnswer:
    """Return an error in OpenAI's shape; `names` are the dialect's for fields of the shared request."""
    kind = next((_TYPES[each] for each in type(error).__mro__ if each in _TYPES), "invalid_request_error")
    return {"error": {"message": message_of(error), "type": kind, "param": param_of(error, names), "code": error.code}}


def message_of(error: ServerError) -> str:
    """Return an error's message. Clients know the beginning of OpenAI's for a prompt that is too long."""
    if isinstance(error, errors.PromptTooLong):
        return f"This model's maximum context length is exceeded: {error.message}"
    return error.message


def refuse(error: ServerError) -> Response:
    """Return the response that refuses a request."""
    return refusal(error, encode_error(error))
