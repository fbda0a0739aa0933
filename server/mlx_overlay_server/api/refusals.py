"""Errors outside of the dialects' routes. Each gets the form of the dialect that its client speaks."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from mlx_overlay_server import errors
from mlx_overlay_server.api.anthropic.errors import refuse as refuse_anthropic
from mlx_overlay_server.api.fields import wrong_field
from mlx_overlay_server.api.openai.embeddings import refuse as refuse_embeddings
from mlx_overlay_server.api.openai.errors import refuse as refuse_openai
from mlx_overlay_server.api.rerank.errors import refuse as refuse_rerank
from mlx_overlay_server.api.responses.errors import refuse as refuse_responses
from mlx_overlay_server.api.transport import as_server_error
from mlx_overlay_server.errors import ServerError


def refuse(scope: Scope, error: ServerError) -> Response:
    """Encode an error in the form that the request's client expects.

    Anthropic's clients always send a header with a version.
    """
    parts = scope["path"].split("/")
    is_messages = "messages" in parts and "completions" not in parts  # stored chat completions have messages, too
    if is_messages or parts[1:2] == ["anthropic"] or "anthropic-version" in Headers(scope=scope):
        return refuse_anthropic(error)
    if "rerank" in parts:
        return refuse_rerank(error)
    if "embeddings" in parts:
        return refuse_embeddings(error)
    return refuse_responses(error) if "responses" in parts else refuse_openai(error)


def add_error_handlers(app: FastAPI) -> None:
    """Let an application answer every exception with a refusal."""

    async def expected(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServerError)  # noqa: S101 - registered for it alone
        return refuse(request.scope, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
        return refuse(request.scope, wrong_field(error.errors(), error.body))

    async def routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
        kind = {404: errors.NotFound, 405: errors.MethodNotAllowed}.get(error.status_code, errors.InvalidRequest)
        response = refuse(request.scope, kind(f"{request.method} {request.url.path}: {str(error.detail).lower()}"))
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        return refuse(request.scope, as_server_error(error))

    app.add_exception_handler(ServerError, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unexpected)
