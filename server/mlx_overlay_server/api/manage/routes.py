"""The routes of the API behind the page, below `/manage/v1`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from mlx_overlay_server.api.dialect import CLIENT_GONE, documented
from mlx_overlay_server.api.fields import Body
from mlx_overlay_server.api.manage.answers import (
    Done,
    Downloads,
    DownloadState,
    ModelEntries,
    Problems,
    RequestEntries,
    ServerStatus,
    download_of,
    models_of,
    requests_of,
    status_of,
)
from mlx_overlay_server.api.openai.errors import ErrorAnswer, encode_error, refuse
from mlx_overlay_server.api.openai.stream import data_event
from mlx_overlay_server.api.transport import EventStream, answer, comment, unless_gone
from mlx_overlay_server.errors import Conflict, NotFound, Unavailable
from mlx_overlay_server.models.download import Downloader
from mlx_overlay_server.service import Service
from mlx_overlay_server.ticket import Ticket

EVENT_SECONDS = 0.25
"""Seconds between two looks at a download that a client watches."""
_DONE: Done = {"done": True}
_EVENTS = "The download's state whenever it has changed, as server-sent events; the last one says how it ended."

_Id = Annotated[str, Field(min_length=1, max_length=300)]


class ModelNamed(Body):
    """A model, by its id."""

    model: _Id


class ModelToLoad(ModelNamed):
    """A model to load."""

    pin: bool = False
    """Whether to keep it in memory."""


class ModelToUnload(ModelNamed):
    """A model to unload."""

    force: bool = False
    """Whether to unload it even while requests use it; those end with an error."""


class ModelToPin(ModelNamed):
    """A model to pin, or to unpin."""

    pinned: bool


def router(service: Service, downloader: Downloader | None) -> APIRouter:
    """Return the routes. `downloader`: None where nothing is downloaded."""
    routes = APIRouter(prefix="/manage/v1", tags=["Manage"])
    started = time.monotonic()
    _add_lists(routes, service, downloader, started)
    _add_models(routes, service)
    _add_downloads(routes, service, downloader)
    return routes


def _add_lists(routes: APIRouter, service: Service, downloader: Downloader | None, started: float) -> None:
    @routes.get("/status", responses=documented(ServerStatus, ErrorAnswer))
    async def status() -> Response:
        """Return what changes from second to second: memory, speed, queue, models in memory, downloads."""
        return answer(status_of(service, downloader, started))

    @routes.get("/models", responses=documented(ModelEntries, ErrorAnswer))
    async def models() -> Response:
        """List every model with its source, size and state. The folders are looked at anew."""
        return answer(models_of(service, await service.entries()))

    @routes.get("/problems", responses=documented(Problems, ErrorAnswer))
    async def problems() -> Response:
        """Return what `hf-overlay doctor` finds: folders left out and other problems, each with what to do."""
        return answer({"problems": await service.library.problems()})

    @routes.get("/requests", responses=documented(RequestEntries, ErrorAnswer))
    async def requests() -> Response:
        """List the running requests and the last 200 that ended. Their text is not kept."""
        return answer(requests_of(service))

    @routes.post("/requests/{request_id}/stop", responses=documented(Done, ErrorAnswer))
    async def stop(request_id: str) -> Response:
        """Stop a running request. Its client gets an error with the code `request_stopped`."""
        if not service.recent.stop(request_id):
            raise NotFound(f"no request {request_id} is running; it may have ended", code="request_not_found")
        return answer(_DONE)


def _add_models(routes: APIRouter, service: Service) -> None:
    @routes.post("/models/load", responses=documented(Done, ErrorAnswer))
    async def load(body: ModelToLoad, request: Request) -> Response:
        """Load a model that is on this machine, and answer when it is in memory. It is not downloaded."""
        model_id = await _found(service, body.model)
        loaded = await unless_gone(request, _loaded(service, model_id, body.pin))
        return Response(status_code=CLIENT_GONE) if loaded is None else answer(loaded)

    @routes.post("/models/unload", responses=documented(Done, ErrorAnswer))
    async def unload(body: ModelToUnload) -> Response:
        """Unload a model, or cancel its load, and unpin it."""
        service.pool.unload(service.live.target(body.model).id, force=body.force)
        return answer(_DONE)

    @routes.post("/models/pin", responses=documented(Done, ErrorAnswer))
    async def pin(body: ModelToPin) -> Response:
        """Pin a model, so that it stays in memory once it is loaded, or unpin it. A pin ends with the server."""
        if body.pinned:
            service.pool.pin(await _found(service, body.model))
        else:
            service.pool.unpin(service.live.target(body.model).id)
        return answer(_DONE)


async def _found(service: Service, name: str) -> str:
    """Return the name under which a model of this machine is loaded: its id as the disk spells it, or a profile's."""
    loaded_as = service.live.target(name).id
    source = service.live.source(loaded_as)
    found = await service.library.here(source)
    return found.id if loaded_as == source else loaded_as


async def _loaded(service: Service, model_id: str, pin: bool) -> Done:
    await service.pool.load(model_id, pin=pin)
    return _DONE


def _add_downloads(routes: APIRouter, service: Service, downloader: Downloader | None) -> None:
    def online() -> Downloader:
        if downloader is None:
            raise Unavailable("the server is offline and downloads nothing; start it without --offline", code="offline")
        return downloader

    @routes.get("/downloads", responses=documented(Downloads, ErrorAnswer))
    async def downloads() -> Response:
        """List the downloads that run, and the last ones that ended."""
        shown = downloader.shown if downloader is not None else []
        return answer({"downloads": [download_of(each) for each in shown]})

    @routes.post("/downloads", responses=documented(DownloadState, ErrorAnswer))
    async def start(body: ModelNamed) -> Response:
        """Download a model into the Hugging Face cache, or continue an earlier download.

        The answer does not wait for the end.
        """
        if await service.library.known(body.model) is not None:
            raise Conflict(f"{body.model} is here already", code="model_here")
        online().start(body.model)
        return answer(_state(online(), body.model))

    @routes.post("/downloads/cancel", responses=documented(DownloadState, ErrorAnswer))
    async def cancel(body: ModelNamed) -> Response:
        """Cancel a download. Its files stay, and the next download of the model continues from there."""
        if not online().cancel(body.model):
            raise _not_downloading(body.model)
        return answer(_state(online(), body.model))

    @routes.get("/downloads/events", responses=documented(DownloadState, ErrorAnswer, stream=_EVENTS))
    async def events(model: Annotated[str, Query(min_length=1, max_length=300)]) -> Response:
        """Watch a download until it has ended."""
        _state(online(), model)
        return EventStream(
            _watched(service, online(), model),
            Ticket(),
            refuse=refuse,
            fail=lambda error: data_event(encode_error(error)),
            ping=comment,
        )


def _state(downloader: Downloader, model_id: str) -> DownloadState:
    progress = downloader.progress_of(model_id)
    if progress is None:
        raise _not_downloading(model_id)
    return download_of(progress)


def _not_downloading(model_id: str) -> NotFound:
    return NotFound(f"{model_id} is not being downloaded", code="download_not_found")


async def _watched(service: Service, downloader: Downloader, model_id: str) -> AsyncGenerator[bytes]:
    """Yield a download's state whenever it changes, until the download has ended or the server stops."""
    last = None
    while not service.is_closing and (now := downloader.progress_of(model_id)) is not None:
        if now != last:
            yield data_event(download_of(now))
        if now.state not in ("waiting", "downloading"):
            return
        last = now
        await asyncio.sleep(EVENT_SECONDS)
