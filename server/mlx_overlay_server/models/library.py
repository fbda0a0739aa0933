"""Lists the models of the overlay and finds the folder that each is loaded from, outside the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import hf_overlay

from mlx_overlay_server.errors import InvalidRequest, Unavailable, UnknownModel

logger = logging.getLogger("mlx_overlay_server")


class Listed(NamedTuple):
    """A model that requests can name."""

    id: str
    created: int
    """Unix seconds: when its newest file was written."""


class Located(NamedTuple):
    """The folder of a model, and the bytes of its weights."""

    path: str
    nbytes: int


Download = Callable[[str, Callable[[str], None]], Awaitable[None]]
"""Downloads a model into the Hugging Face cache and reports its progress as text. Raises ServerError."""


class Library:
    """The models of one overlay session."""

    def __init__(self, session: hf_overlay.Session, download: Download | None) -> None:
        """`download` is used for ids that are not found locally; None: the server is offline."""
        self._session = session
        self._download = download
        self.progress: dict[str, str] = {}
        """The progress of each model that is being downloaded, as text."""

    async def listed(self) -> list[Listed]:
        """Look at the folders and the cache, and return every model that can be loaded, by id; ids are unique."""
        return await asyncio.to_thread(self._list)

    def _list(self) -> list[Listed]:
        self._refresh()
        return [
            Listed(model.id, max((file.mtime_ns for file in model.files), default=0) // 10**9)
            for model in self._session.models
        ]

    async def locate(self, model_id: str) -> Located:
        """Return where to load a model from, after downloading it if it is not found locally. Raises ServerError."""
        try:
            return await asyncio.to_thread(self._locate, model_id)
        except UnknownModel:
            if self._download is None:
                raise
        try:
            await self._download(model_id, lambda text: self.progress.update({model_id: text}))
        finally:
            self.progress.pop(model_id, None)
        return await asyncio.to_thread(self._locate, model_id)

    async def is_known(self, model_id: str) -> bool:
        """Return whether a model is found locally. Raises ServerError, but not UnknownModel."""
        try:
            await asyncio.to_thread(self._locate, model_id)
        except UnknownModel:
            return False
        return True

    def _locate(self, model_id: str) -> Located:
        self._refresh()
        try:
            path = os.fspath(self._session.resolve(model_id))
        except hf_overlay.InvalidModelId as error:
            raise InvalidRequest(str(error), field="model") from None
        except hf_overlay.SourceAway as error:
            raise Unavailable(str(error), field="model", code="model_away") from None
        except hf_overlay.ModelNotFound as error:
            # It names the folders that were searched, which clients need not know; the id in it may hold anything.
            logger.info("%.1000s", " ".join(str(error).split()))
            raise UnknownModel(
                f"there is no model {model_id!r} here; GET /v1/models lists what there is", field="model"
            ) from None
        try:
            with os.scandir(path) as entries:
                sizes = [entry.stat().st_size for entry in entries if entry.name.endswith(".safetensors")]
        except OSError as error:
            raise Unavailable(f"{model_id} cannot be read: {error.strerror}", field="model") from None
        return Located(path, sum(sizes))

    def _refresh(self) -> None:
        try:
            self._session.refresh()
        except hf_overlay.SessionError as error:
            raise Unavailable(str(error)) from None
