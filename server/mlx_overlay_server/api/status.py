"""The routes for the state of the server: health and metrics."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response
from typing_extensions import TypedDict

from mlx_overlay_server.api.transport import answer
from mlx_overlay_server.service import Service

State = Literal["starting", "loading", "ready", "waiting", "failed"]


class EngineHealth(TypedDict):
    """The engine: how many sequences it generates or lets wait, and how many batches errors have ended."""

    active: int
    waiting: int
    failures: int
    last_failure: str | None
    waits_for: str | None
    """The disk that the engine waits for, during which no model can answer; null while there is none."""


class Health(TypedDict):
    """The answer to `GET /health`."""

    status: State
    loaded: list[str]
    """Ids of the models in memory."""
    loading: list[str]
    """Ids of the models on their way there."""
    engine: EngineHealth


def health_of(service: Service) -> Health:
    """Return the server's state now."""
    engine = service.engine
    stats = engine.stats
    status: State
    if engine.failure is not None:
        status = "failed"
    elif engine.held is not None:
        status = "waiting"
    elif not stats.is_alive:
        status = "starting"
    else:
        status = "loading" if service.pool.loading else "ready"
    return {
        "status": status,
        "loaded": service.pool.resident,
        "loading": service.pool.loading,
        "engine": {
            "active": stats.active,
            "waiting": stats.waiting,
            "failures": stats.failures,
            "last_failure": engine.failure or stats.last_failure,
            "waits_for": None if engine.held is None else f"the disk of a model, since {engine.held.seconds:.0f} s",
        },
    }


def router(service: Service) -> APIRouter:
    """Return the routes, with and without `/v1`."""
    routes = APIRouter(tags=["Status"])
    documented: dict[int | str, dict[str, Any]] = {
        200: {"model": Health, "description": "The server can answer, or will soon."},
        503: {"model": Health, "description": "The engine has failed (start the server again), or waits for a disk."},
    }

    @routes.get("/health", responses=documented)
    @routes.get("/v1/health", include_in_schema=False)
    async def health() -> Response:
        """Say whether the server can answer, and what is loaded."""
        now = health_of(service)
        return answer(now, 503 if now["status"] in ("failed", "waiting") else 200)

    @routes.get("/metrics", response_class=PlainTextResponse)
    @routes.get("/v1/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """Return numbers for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes
