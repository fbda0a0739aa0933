"""Lists the models of the overlay, and finds the folder of each. The disk is looked at outside of the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import hf_overlay
from hf_overlay import Task

from mlx_overlay_server import memory
from mlx_overlay_server.chat.loaded import context_length
from mlx_overlay_server.errors import InvalidRequest, Unavailable, UnknownModel
from mlx_overlay_server.models import configs
from mlx_overlay_server.speech.values import OF_SPEECH

logger = logging.getLogger("mlx_overlay_server")


class Listed(NamedTuple):
    """A model that requests can name."""

    id: str
    created: int
    """When its newest file was written, in Unix seconds."""
    context: int | None = None
    """Tokens that prompt and answer may have together, as its config.json says; None where it does not."""
    usable: int | None = None
    """Tokens that they may have on this machine, within the server's limits; None: nobody knows."""
    nbytes: int = 0
    """Bytes of its weights."""
    kv_bytes: int = 0
    """Bytes that each token takes in its KV cache, estimated from config.json; 0: unknown."""
    kind: Task = "text"
    """What it does."""
    architecture: str | None = None
    """The `model_type` of its config.json."""
    sees: bool = False
    """Whether its config.json has a part for images."""
    size: int = 0
    """Bytes of all its files."""
    layer: str = "cache"
    """Where it was found: `map`, `custom` (a model path), `cache` or `tier`."""
    root: str = ""
    """The map, model path, cache or tier itself."""
    path: str = ""
    """The folder from which it is loaded."""


class Located(NamedTuple):
    """The folder of a model, the bytes that it takes in memory, its id, and what it does."""

    path: str
    nbytes: int
    """Bytes of its weights; of a model that transcribes or speaks, of its process."""
    id: str
    """As the disk spells it. A volume may accept several spellings of a name."""
    task: Task = "text"


class _NotHere(NamedTuple):
    """The answer that no folder and no cached snapshot has the id. The Hub may have it."""

    id: str
    near: str
    """The end of a sentence, which suggests a similar id; empty where none is similar."""
    why: str
    """The folders that were searched, for the log; clients need not know them. The id in it may contain anything."""

    def refusal(self) -> UnknownModel:
        message = f"there is no model {self.id!r} here{self.near}; GET /v1/models lists what there is"
        return UnknownModel(message, field="model")


Download = Callable[[str, Callable[[str], None]], Awaitable[None]]
"""Downloads a model into the Hugging Face cache, and reports its progress as text. Raises ServerError."""


class Library:
    """The models of one overlay session."""

    def __init__(
        self, session: hf_overlay.Session, download: Download | None, source: Callable[[str], str] = lambda name: name
    ) -> None:
        """`download` fetches models that are not found locally; None: the server is offline.

        `source` returns the id of the model that is loaded under a name.
        """
        self._session = session
        self._source = source
        self._download = download
        self._rows: dict[str, tuple[hf_overlay.Model, Listed]] = {}
        """Each listed model by its id, as it was found, with its row. A row is made anew when a file of the model
        changes.
        """
        self.progress: dict[str, str] = {}
        """The progress of each model that is being downloaded, as text."""
        self._looking: asyncio.Task[list[Listed]] | None = None
        """The look at all folders that began last."""
        self._next_look: asyncio.Task[list[Listed]] | None = None
        """The look that begins when that one has ended."""

    async def listed(self) -> list[Listed]:
        """Look at the folders and the cache, and return every model that can be loaded.

        Ids are unique. Raises Unavailable.

        Callers that come during a look share the next one, which begins after all of them came.
        """
        look = self._next_look
        if look is None or look.done():
            look = self._next_look = asyncio.create_task(self._look_after(self._looking))
            # Reads an error, of which asyncio would warn when all callers have left.
            look.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(look)

    async def _look_after(self, other: asyncio.Task[list[Listed]] | None) -> list[Listed]:
        if other is not None and not other.done():
            await asyncio.wait([other])
        self._looking, self._next_look = self._next_look, None
        return await asyncio.to_thread(self._list)

    def _list(self) -> list[Listed]:
        try:
            models = self._session.scan()
        except hf_overlay.OverlayError as error:
            raise Unavailable(str(error)) from None
        before = self._rows
        self._rows = {
            model.id: known if (known := before.get(model.id)) and known[0] == model else (model, _listed(model))
            for model in models
        }
        return [row for _, row in self._rows.values()]

    async def locate(self, name: str) -> Located:
        """Return where to load a model from. It is downloaded if it is not found locally. Raises ServerError."""
        model_id = self._source(name)
        found = await asyncio.to_thread(self._locate, model_id)
        if isinstance(found, _NotHere):
            logger.info("%.1000s", found.why)
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
        return found if name == model_id else found._replace(id=name)

    async def here(self, name: str) -> Located:
        """Return where a model is found locally; nothing is downloaded. Raises ServerError."""
        model_id = self._source(name)
        found = await asyncio.to_thread(self._locate, model_id)
        if isinstance(found, _NotHere):
            raise found.refusal()
        return found if name == model_id else found._replace(id=name)

    async def problems(self) -> list[dict[str, str]]:
        """Return the problems that `hf-overlay doctor` finds now, each with `kind`, `where`, `what` and `advice`."""
        findings = await asyncio.to_thread(self._session.findings)
        return [finding._asdict() for finding in findings]

    @property
    def away(self) -> dict[str, str]:
        """The models that have gone away with their folder, as of the last look: id -> folder."""
        return self._session.models_away

    async def known(self, model_id: str) -> Located | None:
        """Return where a model is found locally; None where it is not. Raises ServerError, but not UnknownModel."""
        found = await asyncio.to_thread(self._locate, model_id)
        return found if isinstance(found, Located) else None

    def _locate(self, model_id: str) -> Located | _NotHere:
        try:
            self._session.refresh()
            model = self._session.find(model_id)
        except hf_overlay.InvalidModelId as error:
            raise InvalidRequest(str(error), field="model") from None
        except hf_overlay.SourceAway as error:
            raise Unavailable(str(error), field="model", code="model_away") from None
        except hf_overlay.IncompleteModel as error:
            logger.warning("%s", error)
            message = f"{model_id} is here, but cannot be loaded: {error.problem}"
            raise Unavailable(message, field="model", code="model_incomplete") from None
        except hf_overlay.ModelNotFound as error:
            near = f"; did you mean {error.near}?" if error.near is not None else ""
            return _NotHere(model_id, near, " ".join(str(error).split()))
        except hf_overlay.OverlayError as error:  # the overlay cannot be brought up to date now
            raise Unavailable(str(error), field="model") from None
        needs = memory.SPEECH if model.task in OF_SPEECH else 0
        return Located(model.path, _weights(model) + needs, model.id, model.task)


def _weights(model: hf_overlay.Model) -> int:
    """Return the bytes of a model's weights. Models that speak have some in folders: voices, and what makes sound."""
    is_deep = model.task in OF_SPEECH
    files = [file for file in model.files if file.name.endswith(".safetensors") and (is_deep or "/" not in file.name)]
    return sum(file.size for file in files)


def _listed(model: hf_overlay.Model) -> Listed:
    config = configs.read(model.path)
    context = context_length(config)
    return Listed(
        model.id,
        max((file.mtime_ns for file in model.files), default=0) // 10**9,
        context,
        context,
        _weights(model),
        configs.kv_bytes(config),
        kind=model.task,
        architecture=model.model_type,
        sees=configs.sees(model.task, config),
        size=model.size_bytes,
        layer=model.source,
        root=model.root,
        path=model.path,
    )
