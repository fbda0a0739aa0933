"""Addresses of OpenAI's that this server has nothing behind, and what it says there instead of a bare 404."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from mlx_overlay_server.errors import NotFound
from mlx_overlay_server.service import Service

_ABSENT = {
    "images/generations": "this server paints no images",
    "images/edits": "this server edits no images",
    "images/variations": "this server edits no images",
    "moderations": "this server has no model for moderation",
    "files": "this server keeps no files; send what is in them",
    "batches": "this server has no batches; send the requests, which share a batch by themselves",
    "realtime": "this server has no realtime sessions; send requests with stream",
}
"""What is asked for, below `/v1/` -> why not. The status is 404: OpenAI's clients try again after a 501."""


def router(service: Service) -> APIRouter:  # noqa: ARG001 - as all routers
    """Return a route for each of these addresses, with and without `/v1`, which reads no body."""
    routes = APIRouter(include_in_schema=False)
    for path, reason in _ABSENT.items():
        for prefix in ("/v1/", "/"):
            routes.add_api_route(prefix + path, _refusing(reason), methods=["GET", "POST"], response_model=None)
    return routes


def _refusing(reason: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise NotFound(reason, code="not_supported")

    return refuse
