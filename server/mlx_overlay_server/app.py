"""The composition root: what the server is made of, and how its parts are joined."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import hf_overlay
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from mlx_overlay_server import errors
from mlx_overlay_server.api import anthropic, openai, responses
from mlx_overlay_server.api import models_route as models
from mlx_overlay_server.api.fields import wrong_field
from mlx_overlay_server.api.guard import Guard
from mlx_overlay_server.api.transport import answer, as_server_error
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.metrics import Metrics
from mlx_overlay_server.models import download
from mlx_overlay_server.models.library import Library
from mlx_overlay_server.models.pool import Extras, Pool, preload
from mlx_overlay_server.service import Service, status
from mlx_overlay_server.settings import Settings


def build(settings: Settings, session: hf_overlay.Session) -> tuple[ASGIApp, Service]:
    """The application, and the service in it."""
    service = _service(settings, session)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        tasks = [
            asyncio.create_task(preload(service.pool, settings.models)),
            asyncio.create_task(service.pool.sweep()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.pool.close()
            await service.engine.stop()
            service.stop()

    app = FastAPI(
        title="MLX Omni Server",
        summary="OpenAI- and Anthropic-compatible chat server on mlx-lm.",
        lifespan=lifespan,
        responses={
            "4XX": {"description": "What is wrong with the request, in the dialect's own shape."},
            "5XX": {"description": "What is wrong with the server."},
        },
    )
    for dialect in (openai, responses, anthropic, models):
        app.include_router(dialect.router(service))
    _add_status(app, service)
    _add_errors(app)
    guarded: Any = Guard(
        app,
        api_key=settings.api_key,
        host=settings.host,
        origins=settings.origins,
        max_body=settings.limits.body,
        refuse=_refuse,
        count=lambda path, code: service.metrics.requests.labels(path, code).inc(),
    )
    if settings.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    return guarded, service


def _service(settings: Settings, session: hf_overlay.Session) -> Service:
    engine = Engine(settings.engine)
    library = Library(session, None if session.is_offline else download.Downloader(session).fetch)
    first = settings.models[:1]
    pool = Pool(
        library,
        engine,
        budget=settings.memory_budget,
        idle_ttl=settings.idle_ttl,
        pinned=settings.models,
        extras={name: Extras(settings.adapter_path, settings.draft_model) for name in first},
    )

    def numbers() -> dict[str, tuple[str, float]]:
        stats = engine.stats
        return {
            "active_sequences": ("Sequences in a batch: the batch size.", stats.active),
            "waiting_sequences": ("Sequences that no batch has room for.", stats.waiting),
            "pending_sequences": ("Sequences that somebody waits for.", engine.pending),
            "kv_cache_bytes": ("KV caches kept for later prompts, in bytes.", stats.cache_bytes),
            "kv_cache_entries": ("KV caches kept for later prompts.", stats.cache_entries),
            "engine_steps": ("Steps of the engine.", stats.steps),
            "engine_failures": ("Batches lost to an error.", stats.failures),
            "models_resident": ("Models in memory.", len(pool.resident)),
            "models_bytes": ("Weights of the models in memory, in bytes.", pool.nbytes),
        }

    return Service(
        library,
        pool,
        engine,
        Metrics(numbers, frozenset({"engine_steps", "engine_failures"})),
        settings.limits,
        aliases=settings.aliases,
        default_model=settings.default_model,
    )


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["Status"])
    @app.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        """Whether the server can answer, and what is loaded."""
        now = status(service)
        return answer(now, 503 if now["status"] == "failed" else 200)

    @app.get("/metrics", tags=["Status"])
    @app.get("/v1/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def root() -> Response:
        return answer({"name": "mlx-omni-server", "docs": "/docs"})


def _add_errors(app: FastAPI) -> None:
    async def expected(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServerError)  # noqa: S101 - registered for it alone
        return _refuse(request.scope, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
        return _refuse(request.scope, wrong_field(error.errors(), error.body))

    async def routing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
        kind = {404: errors.NotFound, 405: errors.MethodNotAllowed}.get(error.status_code, errors.InvalidRequest)
        told = kind(f"{request.method} {request.url.path}: {str(error.detail).lower()}")
        response = _refuse(request.scope, told)
        response.headers.update(error.headers or {})
        return response

    async def unexpected(request: Request, error: Exception) -> Response:
        return _refuse(request.scope, as_server_error(error))

    app.add_exception_handler(ServerError, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, routing)
    app.add_exception_handler(Exception, unexpected)


def _refuse(scope: Scope, error: ServerError) -> Response:
    """An error in the shape that the client expects: Anthropic's always say which version they speak."""
    is_anthropic = "messages" in scope["path"].split("/") or scope["path"].startswith("/anthropic/")
    if is_anthropic or "anthropic-version" in Headers(scope=scope):
        return anthropic.refuse(error)
    return openai.refuse(error)
