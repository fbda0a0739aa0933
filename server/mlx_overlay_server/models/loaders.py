"""Loads each model where it runs: in a process of its own if it transcribes or speaks, else in the engine."""

from __future__ import annotations

from mlx_overlay_server.encoding.loaded import AnyLoaded
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.models.pool import Loader
from mlx_overlay_server.speech.processes import Speech
from mlx_overlay_server.speech.values import OF_SPEECH, LoadedSpeech


class Loaders:
    """The loader of all models."""

    def __init__(self, engine: Loader, speech: Speech) -> None:
        self._engine = engine
        self._speech = speech

    def new_key(self, path: str) -> str:
        """Return a key for a `Load` of a folder that no other load has."""
        return self._engine.new_key(path)

    async def load(self, command: Load) -> AnyLoaded:
        """Load a model into memory. Raises ServerError."""
        if command.task not in OF_SPEECH:
            return await self._engine.load(command)
        if command.adapter_path is not None or command.draft_path is not None:
            raise Unavailable("adapters and draft models are for models that generate text", code="model_load_failed")
        return await self._speech.load(LoadedSpeech(command.key, command.path, command.task, command.nbytes))

    def unload(self, model: AnyLoaded) -> None:
        """Drop a model. Its requests end with an error."""
        if isinstance(model, LoadedSpeech):
            self._speech.unload(model)
        else:
            self._engine.unload(model)

    def bytes_read(self, key: str) -> int:
        """Return how many bytes of weights a load that is under way has read; 0 where nobody knows."""
        return self._engine.bytes_read(key)
