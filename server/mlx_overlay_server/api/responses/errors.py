"""Errors of Responses: OpenAI's shape, with the names that this dialect has for fields."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from mlx_overlay_server.api.openai.errors import encode_error
from mlx_overlay_server.api.transport import refusal
from mlx_overlay_server.errors import Field, ServerError

NAMES: Mapping[Field, str | None] = {
    "model": "model",
    "messages": "input",
    "prompts": None,
    "tools": "tools",
    "format": "text.format",
    "effort": "reasoning.effort",
    "template_kwargs": None,
    "logit_bias": None,
    "texts": None,
    "prompt": None,
    "query": None,
    "documents": None,
    "instruction": None,
}
"""The names that Responses has for fields of the shared request."""


def refuse(error: ServerError) -> Response:
    """Return the response that refuses a request."""
    return refusal(error, encode_error(error, NAMES))
