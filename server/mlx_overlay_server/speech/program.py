"""The program of a process that transcribes or speaks: it holds one model, and does one thing after the other."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from mlx_overlay_server.frames import Result, connected, packed, result_of
from mlx_overlay_server.speech.values import Piece, SpeechRequest, TranscribeRequest, Transcript


def main() -> None:
    """Work until the server closes the socket."""
    server, frames = connected()
    server.sendall(packed(None))
    model: Any = None
    recording = io.BytesIO()
    while True:
        kind, content = frames.get()
        if kind == "recording":
            recording.write(content)
            continue
        if kind == "load":
            from mlx_overlay_server.speech import adapter

            loading = result_of(lambda: adapter.load(content))  # noqa: B023
            model = loading.value
            server.sendall(packed(loading._replace(value=None)))
            continue
        recording.seek(0)
        for result in _results(model, content, recording):
            server.sendall(packed(result))
        recording = io.BytesIO()


def _results(model: Any, request: SpeechRequest, recording: io.BytesIO) -> Iterator[Result]:
    """Yield what becomes of a request."""
    from mlx_overlay_server.speech import adapter

    pieces: Iterator[Piece] = (
        adapter.transcribe(model, recording, request)
        if isinstance(request, TranscribeRequest)
        else adapter.speak(model, request)
    )
    while True:
        result = result_of(lambda: next(pieces, None))
        yield result
        if result.value is None or isinstance(result.value, Transcript):
            return


if __name__ == "__main__":
    main()
