"""Lists the models of the overlay and finds the folder that each is loaded from, outside the event loop."""

from __future__ import annotations

import asyncio
import logging
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
    """The folder of a model, the bytes of its weights, and its id."""

    path: str
    nbytes: int
    id: str
    """As the disk spells it: its volume may take several spellings of a name for one."""


class _NotHere(NamedTuple):
    """No folder and no cached snapshot has the id; the Hub may."""

    id: str
    near: str
    """The end of a sentence, which suggests another id; empty where none is close."""

    def refusal(self) -> UnknownModel:
        message = f"there is no model {self.id!r} here{self.near}; GET /v1/models lists what there is"
        return UnknownModel(message, field="model")


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
        self._looking: asyncio.Task[list[Listed]] | None = None
        """The last look at all folders that has begun."""
        self._next_look: asyncio.Task[list[Listed]] | None = None
        """The one that begins when that has ended."""

    async def listed(self) -> list[Listed]:
        """Look at the folders and the cache, and return every model that can be loaded, by id; ids are unique.

        Calls that come while another is looking share one look, which begins after that and so after all of them.
        Raises Unavailable.
        """
        look = self._next_look
        if look is None or look.done():
            look = self._next_look = asyncio.create_task(self._look_after(self._looking))
            look.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # all callers may have left
        return await asyncio.shield(look)

    async def _look_after(self, other: asyncio.Task[list[Listed]] | None) -> list[Listed]:
        if other is not None and not other.done():
            await asyncio.wait([other])
        self._looking, self._next_look = self._next_look, None
        return await asyncio.to_thread(self._list)

    def _list(self) -> list[Listed]:
        try:
            self._session.refresh()
            models = self._session.models
        except hf_overlay.SessionError as error:
            raise Unavailable(str(error)) from None
        return [Listed(each.id, max((file.mtime_ns for file in each.files), default=0) // 10**9) for each in models]

    async def locate(self, model_id: str) -> Located:
        """Return where to load a model from, after downloading it if it is not found locally. Raises ServerError."""
        found = await asyncio.to_thread(self._locate, model_id)
        if isinstance(found, _NotHere) and self._download is not None:
            try:
                await self._download(model_id, lambda text: self.progress.update({model_id: text}))
            except UnknownModel as error:
                raise UnknownModel(f"{error.message}{found.near}", field="model") from None
            finally:
                self.progress.pop(model_id, None)
            found = await asyncio.to_thread(self._locate, model_id)
        if isinstance(found, _NotHere):
            raise found.refusal()
        return found

    async def is_known(self, model_id: str) -> bool:
        """Return whether a model is found locally. Raises ServerError, but not UnknownModel."""
        return isinstance(await asyncio.to_thread(self._locate, model_id), Located)

    def _locate(self, model_id: str) -> Located | _NotHere:
        try:
            self._session.refresh()
            model = self._session.find(model_id)
        except hf_overlay.InvalidModelId as error:
            raise InvalidRequest(str(error), field="model") from None
        except hf_overlay.SessionError as error:  # the overlay cannot be brought up to date: not now
            raise Unavailable(str(error), field="model") from None
        except hf_overlay.SourceAway as error:
            raise Unavailable(str(error), field="model", code="model_away") from None
        except hf_overlay.IncompleteModel as error:
            logger.warning("%s", error)
            message = f"{model_id} is here, but incomplete: {error.problem}"
            raise Unavailable(message, field="model", code="model_incomplete") from None
        except hf_overlay.ModelNotFound as error:
            # It names the folders that were searched, which clients need not know; the id in it may hold anything.
            logger.info("%.1000s", " ".join(str(error).split()))
            near = f"; did you mean {error.near}?" if error.near is not None else ""
            return _NotHere(model_id, near)
        weights = (file for file in model.files if file.name.endswith(".safetensors") and "/" not in file.name)
        return Located(model.path, sum(file.size for file in weights), model.id)
