"""The processes of the models that transcribe or speak, one for each model. All on the event loop.

mlx-audio works on a whole recording, or a whole text, in calls that nothing can interrupt. So whatever ends a request
before it is done, such as its client leaving, ends its process; the next request for the model starts another one.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.util import find_spec

from mlx_overlay_server.errors import Failed, NotFound, ServerError, Unavailable
from mlx_overlay_server.frames import Result
from mlx_overlay_server.peer import Ended, Peer
from mlx_overlay_server.speech.values import LoadedSpeech, Piece, SpeechRequest, Transcript

logger = logging.getLogger("mlx_overlay_server")

EXTRA = ("mlx_audio", "soundfile", "python_multipart")
"""The packages of the extra `speech`, as they are imported."""


def check_installed() -> None:
    """Raise NotFound where the extra `speech` is not installed."""
    if any(find_spec(name) is None for name in EXTRA):
        raise NotFound(
            "this server neither transcribes nor speaks: that takes an extra, "
            "`pip install 'mlx-overlay-server[speech]'`; then start the server again",
            code="not_supported",
        )


class _Held:
    """A resident model, and its process."""

    def __init__(self, model: LoadedSpeech) -> None:
        self.model = model
        self.turn = asyncio.Lock()
        """Held by the request that the process works for."""
        self.process: Peer | None = None
        """The process, which has loaded the model; None where the last one has ended."""
        self.ends_with: ServerError | None = None
        """Why it is ended for good, if it is."""

    def end(self, error: ServerError) -> None:
        """End it for good: a request under way gets an error."""
        self.ends_with = error
        if self.process is not None:
            self.process.kill()


class Speech:
    """The models that transcribe or speak: loads them, and runs requests in their processes."""

    def __init__(self, load_seconds: float) -> None:
        """`load_seconds`: how long a process may take until its model is loaded."""
        self._load_seconds = load_seconds
        self._held: dict[str, _Held] = {}
        self._closing: set[asyncio.Task[int]] = set()
        self._is_stopped = False

    async def load(self, model: LoadedSpeech) -> LoadedSpeech:
        """Start a process that holds a model. Raises ServerError."""
        check_installed()
        held = _Held(model)
        held.process = await self._started(held)
        self._held[model.key] = held
        return model

    def unload(self, model: LoadedSpeech) -> None:
        """End a model's process. A request that it works for ends with an error."""
        held = self._held.pop(model.key, None)
        if held is not None:
            held.end(Unavailable("the model was unloaded, as asked", code="model_unloaded"))
            self._close(held)

    async def run(
        self, model: LoadedSpeech, request: SpeechRequest, recording: AsyncIterator[bytes] | None = None
    ) -> AsyncGenerator[Piece]:
        """Yield what a request comes to. Closed before its end, it ends the process. Raises ServerError."""
        held = self._held.get(model.key)
        if held is None or self._is_stopped:
            raise Unavailable("the server is shutting down")
        async with held.turn:
            if held.ends_with is not None:
                raise held.ends_with
            if held.process is not None and held.process.has_ended:  # as when the system was short of memory
                self._close(held)
            process = held.process or await self._started(held)
            held.process = process
            is_done = False
            try:
                if recording is not None:
                    async for chunk in recording:
                        await process.send(("recording", chunk))
                await process.send(("run", request))
                while True:
                    result = await process.answer()
                    is_last = result.value is None or isinstance(result.value, Transcript)
                    is_done = is_last and result.unexpected is None  # what may be spoilt is not used again
                    if (value := _checked(result)) is None:
                        return
                    yield value
                    if is_last:
                        return
            except Ended:
                raise held.ends_with or _ended() from None
            finally:
                if not is_done:
                    self._close(held)

    def abort(self) -> None:
        """End all work with an error to its client, and take no more."""
        self._is_stopped = True
        for held in self._held.values():
            held.end(Unavailable("the server is shutting down"))

    async def stop(self) -> None:
        """Do the same, and wait until all processes have ended."""
        self.abort()
        for held in self._held.values():
            self._close(held)
        await asyncio.gather(*self._closing)

    async def _started(self, held: _Held) -> Peer:
        """Start a model's process. Raises ServerError."""
        # What mlx-audio lacks in a folder, it would download.
        held.process = process = Peer("mlx_overlay_server.speech.program", {**os.environ, "HF_HUB_OFFLINE": "1"})
        is_ready = False
        try:
            async with asyncio.timeout(self._load_seconds):
                await process.ready()
                _checked(await process.ask(("load", held.model.path)))
            is_ready = True
            return process
        except TimeoutError:
            raise Unavailable(
                f"the model could not be loaded within {self._load_seconds:g} s; look at the disk, or raise "
                "--load-seconds",
                code="model_load_failed",
            ) from None
        except Ended:
            raise held.ends_with or _ended() from None
        finally:
            if not is_ready:
                self._close(held)

    def _close(self, held: _Held) -> None:
        """End the process of a model, if it has one, while the caller goes on."""
        process, held.process = held.process, None
        if process is not None:
            process.kill()
            task = asyncio.ensure_future(process.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _checked(result: Result) -> Piece | None:
    """Return what a process has answered. Raises ServerError for an error."""
    if result.refusal is not None:
        raise result.refusal
    if result.unexpected is not None:
        logger.error("unexpected %s in a process that transcribes or speaks", result.unexpected)
        raise Failed(
            f"unexpected {result.unexpected.partition(' ')[0]}; the server's log says where", code="internal_error"
        )
    value: Piece | None = result.value
    return value


def _ended() -> Failed:
    logger.error("a process that transcribes or speaks has ended")
    return Failed(
        "the process of the model has ended: it was killed, or had too little memory; the next request starts another",
        code="process_ended",
    )
