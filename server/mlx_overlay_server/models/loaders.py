"""Loads each model where it runs: in a process of its own if it transcribes or speaks, else in the engine."""

from __future__ import annotations

from hf_overlay import Task

from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.models.pool import Loader
from mlx_overlay_server.settings import UNTUNED, Tuning
from mlx_overlay_server.speech.processes import Speech
from mlx_overlay_server.speech.values import OF_SPEECH, LoadedSpeech


class Loaders:
    """The loader of all models."""

    def __init__(self, engine: Loader, speech: Speech) -> None:
        self._engine = engine
        self._speech = speech

    async def load(
        self,
        path: str,
        *,
        adapter_path: str | None = None,
        draft_path: str | None = None,
        task: Task = "text",
        nbytes: int = 0,
        tuning: Tuning = UNTUNED,
    ) -> AnyLoaded:
        """Make the model in a folder resident. Raises ServerError."""
        if task not in OF_SPEECH:
            return await self._engine.load(
                path, adapter_path=adapter_path, draft_path=draft_path, task=task, nbytes=nbytes, tuning=tuning
            )
        if adapter_path is not None or draft_path is not None:
            raise Unavailable("adapters and draft models are for models that generate text", code="model_load_failed")
        return await self._speech.load(path, task, nbytes)

    def unload(self, model: AnyLoaded) -> None:
        """Drop a model. Its requests end with an error."""
        if isinstance(model, LoadedSpeech):
            self._speech.unload(model)
        else:
            self._engine.unload(model)

    def bytes_read(self, path: str) -> int:
        """Return how many bytes of weights were read of a model that is being loaded; 0 where nobody knows."""
        return self._engine.bytes_read(path)
