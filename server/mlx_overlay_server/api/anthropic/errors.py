"""Errors in Anthropic's shape."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Literal

from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server import errors
from mlx_overlay_server.api.transport import param_of, refusal
from mlx_overlay_server.errors import Field, ServerError

NAMES: Mapping[Field, str | None] = {
    "model": "model",
    "messages": "messages",
    "prompts": None,
    "tools": "tools",
    "format": "output_config.format",
    "effort": "output_config.effort",
    "template_kwargs": None,
    "logit_bias": None,
    "texts": None,
    "prompt": None,
    "query": None,
    "documents": None,
    "instruction": None,
}
"""The names that messages and count_tokens have for fields of the shared request."""

_TYPES: dict[type[ServerError], str] = {
    errors.InvalidRequest: "invalid_request_error",
    errors.MethodNotAllowed: "invalid_request_error",
    errors.Unauthorized: "authentication_error",
    errors.Forbidden: "permission_error",
    errors.NotFound: "not_found_error",
    errors.Conflict: "invalid_request_error",
    errors.Stopped: "invalid_request_error",
    errors.TooLarge: "request_too_large",
    errors.Overloaded: "rate_limit_error",
    errors.Unavailable: "overloaded_error",  # "try again later"; an `api_error` is a fault inside the server
}


class AnthropicErrorDetail(TypedDict):
    """The error itself; the message begins with the field that is wrong, where one is."""

    type: str
    message: str


class AnthropicErrorAnswer(TypedDict):
    """An error, as Anthropic's clients expect it."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


def encode_error(error: ServerError) -> AnthropicErrorAnswer:
    """Return an error in Anthropic's shape."""
    kind = next((_TYPES[each] for each in type(error).__mro__ if each in _TYPES), "api_error")
    message, param = error.message, param_of(error, NAMES)
    # There is no field for it. Clients know the beginning of the message for a prompt that is too long.
    if param is not None and param not in message and not isinstance(error, errors.PromptTooLong):
        message = f"`{param}`: {message}"
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": f"req_{uuid.uuid4().hex[:24]}",
    }


def refuse(error: ServerError) -> Response:
    """Return the response that refuses a request."""
    return refusal(error, encode_error(error))
