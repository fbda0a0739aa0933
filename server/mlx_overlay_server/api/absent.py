"""Addresses of OpenAI's and Anthropic's APIs that this server does not serve; its answers say so, and why."""

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
    "messages/batches": "this server has no batches; send the requests, which share a batch by themselves",
    "realtime": "this server has no realtime sessions; send requests with stream",
    "conversations": "this server keeps no conversations; use previous_response_id, or send the turns",
    "assistants": "this server has no assistants; send the conversation to /v1/responses",
    "threads": "this server has no assistants; send the conversation to /v1/responses",
    "vector_stores": "this server keeps no vectors; /v1/embeddings makes them",
    "fine_tuning": "this server trains no models",
    "uploads": "this server keeps no files; send what is in them",
    "videos": "this server makes no videos",
    "containers": "this server runs no code",
    "skills": "this server keeps no skills; send them in the prompt",
}
"""The path below `/v1/` -> why it is not served. The status is 404, because OpenAI's clients try again after a 501."""

_METHODS = ["GET", "POST", "DELETE"]


def router(service: Service) -> APIRouter:  # noqa: ARG001 - as all routers
    """Return routes for these addresses and all below them, with and without `/v1`. Bodies are not read."""
    routes = APIRouter(include_in_schema=False)
    for path, reason in _ABSENT.items():
        for prefix in ("/v1/", "/"):
            for below in ("", "/{rest:path}"):
                address = f"{prefix}{path}{below}"
                routes.add_api_route(address, _refusing(reason), methods=_METHODS, response_model=None)
    return routes


def _refusing(reason: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise NotFound(reason, code="not_supported")

    return refuse
