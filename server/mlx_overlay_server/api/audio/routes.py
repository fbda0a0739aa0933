"""The routes for sound, which an application gets when they are first asked for."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_overlay_server.api.audio import speech, transcriptions
from mlx_overlay_server.api.audio.speech import MEDIA_TYPES, SpeechBody
from mlx_overlay_server.api.audio.transcriptions import TranscriptionForm, TranslationForm
from mlx_overlay_server.api.audio.transcripts import TranscriptAnswer, VerboseAnswer
from mlx_overlay_server.api.dialect import documented
from mlx_overlay_server.api.guard import FORM
from mlx_overlay_server.api.openai.errors import ErrorAnswer
from mlx_overlay_server.service import Service
from mlx_overlay_server.speech.processes import check_installed

_PIECES = "With `stream`: the text in events `transcript.text.delta` as it is heard, and the whole in `….done`."
_SOUNDS = "With `stream_format: sse`: the sound in events `speech.audio.delta`, as base64, then `speech.audio.done`."


def router(service: Service) -> APIRouter:
    """Return the routes, with and without `/v1`."""
    routes = APIRouter(tags=["OpenAI"])
    transcripts = documented(TranscriptAnswer | VerboseAnswer, ErrorAnswer)
    streamed = documented(TranscriptAnswer | VerboseAnswer, ErrorAnswer, stream=_PIECES)

    @routes.post("/v1/audio/transcriptions", responses=streamed, openapi_extra=_form(TranscriptionForm))
    @routes.post("/audio/transcriptions", include_in_schema=False)
    async def transcribe(request: Request) -> Response:
        """Transcribe a recording."""
        check_installed()
        return await transcriptions.answer(service, TranscriptionForm, request)

    @routes.post("/v1/audio/translations", responses=transcripts, openapi_extra=_form(TranslationForm))
    @routes.post("/audio/translations", include_in_schema=False)
    async def translate(request: Request) -> Response:
        """Translate a recording to English."""
        check_installed()
        return await transcriptions.answer(service, TranslationForm, request)

    @routes.post("/v1/audio/speech", responses=_sound(), response_class=Response)
    @routes.post("/audio/speech", include_in_schema=False)
    async def speak(body: SpeechBody, request: Request) -> Response:
        """Speak a text."""
        check_installed()
        return speech.answer(service, body, request)

    return routes


def _form(kind: type[TranslationForm]) -> dict[str, Any]:
    """Describe a form for `/openapi.json`."""
    properties: dict[str, Any] = {name: {} for name in kind.model_fields}
    properties["file"] = {"type": "string", "format": "binary"}
    schema = {"type": "object", "properties": properties, "required": ["file"]}
    return {"requestBody": {"required": True, "content": {FORM: {"schema": schema}}}}


def _sound() -> dict[int | str, dict[str, Any]]:
    """Describe the answer of the route that speaks."""
    found = documented(TranscriptAnswer, ErrorAnswer)
    events = {"text/event-stream": {"schema": {"type": "string", "description": _SOUNDS}}}
    found[200] = {"description": "The sound.", "content": {each: {} for each in MEDIA_TYPES.values()} | events}
    return found
