"""Errors as Cohere's clients (`message`) and Jina's (`detail`) read them."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response
from typing_extensions import TypedDict

from mlx_overlay_server.api.transport import param_of, refusal
from mlx_overlay_server.errors import Field, ServerError

NAMES: Mapping[Field, str | None] = {
    "model": "model",
    "messages": None,
    "prompts": None,
    "tools": None,
    "format": None,
    "effort": None,
    "template_kwargs": None,
    "logit_bias": None,
    "texts": None,
    "prompt": None,
    "query": "query",
    "documents": "documents",
    "instruction": "instruction",
}
"""The names of fields of the shared request."""


class RerankErrorAnswer(TypedDict):
    """An error."""

    message: str
    """What is wrong, beginning with the field that is, where one is."""
    detail: str
    """The same."""
    code: str | None


def refuse(error: ServerError) -> Response:
    """Return the response that refuses a request."""
    message, param = error.message, param_of(error, NAMES)
    if param is not None and param not in message:
        message = f"`{param}`: {message}"
    content: RerankErrorAnswer = {"message": message, "detail": message, "code": error.code}
    return refusal(error, content)
