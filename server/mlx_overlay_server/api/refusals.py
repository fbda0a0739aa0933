"""Errors outside of the dialects' routes. Each gets the form of the dialect that its client speaks."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from mlx_overlay_server import errors
from mlx_overlay_server.api.anthropic.errors import refuse as refuse_anthropic
from mlx_overlay_server.api.dialect import CLIENT_GONE, client_of
from mlx_overlay_server.api.fields import wrong_field
from mlx_overlay_server.api.openai.embeddings import refuse as refuse_embeddings
from mlx_overlay_server.api.openai.errors import refuse as refuse_openai
from mlx_overlay_server.api.rerank.errors import refuse as refuse_rerank
from mlx_overlay_server.api.responses.errors import refuse as refuse_responses
from mlx_overlay_server.api.transport import as_server_error
from mlx_overlay_server.errors import ServerError

logger = logging.getLogger("mlx_overlay_server")
_LONGEST_PATH = 200


def refuse(scope: Scope, error: ServerError) -> Response:
    """Encode an error in the form that the request's client expects.

    Anthropic's clients always send a header with a version.
    """
    if not error.is_recorded:
        address = f"{scope['method']} {scope['path'][:_LONGEST_PATH]}"
        logger.info("%s, %s: refused (%s)", client_of(Request(scope)), address, error.reason)
    parts = scope["path"].split("/")
    is_messages = "messages" in parts and "completions" not in parts  # stored chat completions have messages, too
    if is_messages or parts[1:2] == ["anthropic"] or "anthropic-version" in Headers(scope=scope):
        return refuse_anthropic(error)
    if "rerank" in parts:
        return refuse_rerank(error)
    if "embeddings" in parts:
        return refuse_embeddings(error)
    return refuse_responses(error) if "responses" in parts else refuse_openai(error)


def _hint(path: str) -> str:
    """Return what is wrong with a client's base URL where it shows in a path; '' otherwise."""
    if path.startswith("//"):
        return "; the base URL in the client's settings must not end in a slash"
    return "; the base URL in the client's settings must not end in /v1" if path.startswith("/v1/v1/") else ""


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
        if isinstance(error.__cause__, ClientDisconnect):
            return Response(status_code=CLIENT_GONE)
        path = request.url.path
        kind = {404: errors.NotFound, 405: errors.MethodNotAllowed}.get(error.status_code)
        known: ServerError
        if kind is None:  # FastAPI could not decode the body
            what = "the body is not JSON in UTF-8, or has a number with thousands of digits"
            known = errors.InvalidRequest(what, code="invalid_json")
        else:
            known = kind(f"{request.method} {path}: {str(error.detail).lower()}{_hint(path)}")
        response = refuse(request.scope, known)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        return refuse(request.scope, as_server_error(error))

    app.add_exception_handler(ServerError, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unexpected)
