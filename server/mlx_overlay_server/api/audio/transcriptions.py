"""`POST /v1/audio/transcriptions` and `/v1/audio/translations`: their form, and their answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mlx_overlay_server.api.audio.events import event_stream
from mlx_overlay_server.api.audio.transcripts import TIMED, TranscriptFormat, encoded
from mlx_overlay_server.api.dialect import CLIENT_GONE, client_of
from mlx_overlay_server.api.fields import ModelBody, Number, wrong_field
from mlx_overlay_server.api.guard import FORM
from mlx_overlay_server.api.openai.stream import data_event
from mlx_overlay_server.api.transport import unless_gone
from mlx_overlay_server.errors import InvalidRequest
from mlx_overlay_server.service import Service
from mlx_overlay_server.speech.values import TranscribeRequest, Transcript
from mlx_overlay_server.ticket import Ticket

_LISTS = frozenset({"include", "timestamp_granularities"})
"""Fields of which there may be several, with or without brackets behind the name."""
_MAX_FIELDS = 100
_CHUNK = 1 << 20
_MAX_PROMPT = 1 << 14


class TranslationForm(ModelBody):
    """The form of a translation to English."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    file: UploadFile
    prompt: Annotated[str, Field(max_length=_MAX_PROMPT)] | None = None
    response_format: TranscriptFormat = "json"
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None


class TranscriptionForm(TranslationForm):
    """The form of a transcription."""

    language: str | None = None
    timestamp_granularities: tuple[Literal["word", "segment"], ...] = ()
    stream: bool | None = None
    """Whether the text comes in server-sent events, as it is heard."""


async def answer(service: Service, kind: type[TranslationForm], request: Request) -> Response:
    """Return the transcript of the recording in a form."""
    if not request.headers.get("content-type", "").startswith(FORM):
        raise InvalidRequest(f"send a form with the recording as `file`, with Content-Type: {FORM}", param="file")
    try:
        form = await request.form(max_files=1, max_fields=_MAX_FIELDS)
    except HTTPException as error:
        raise InvalidRequest(f"the form cannot be read: {error.detail}", code="invalid_form") from None
    is_streamed = False
    try:
        checked = _checked(kind, form)
        wanted = _wanted(service, checked)
        if wanted.streams:
            is_streamed = True
            ticket = Ticket(client=client_of(request))
            return event_stream(_events(service, wanted, form, checked.file, ticket), ticket)
        return await _whole(service, wanted, checked, request)
    finally:
        if not is_streamed:
            await form.close()


def _wanted(service: Service, form: TranslationForm) -> TranscribeRequest:
    """Return the request that the service takes. Raises InvalidRequest."""
    form.name(service.default_model)
    more = form if isinstance(form, TranscriptionForm) else None
    granularities = more.timestamp_granularities if more is not None else ()
    if granularities and form.response_format != "verbose_json":
        raise InvalidRequest(
            "`timestamp_granularities` needs the response_format `verbose_json`", param="timestamp_granularities"
        )
    streams = more is not None and bool(more.stream)
    if streams and form.response_format != "json":
        raise InvalidRequest(
            "with `stream`, the text comes in events, which are JSON: leave `response_format` out",
            param="response_format",
        )
    return TranscribeRequest(
        form.model,
        language=(more.language or None) if more is not None else None,
        prompt=form.prompt or None,
        temperature=form.temperature,
        to_english=more is None,
        times=form.response_format in TIMED,
        words="word" in granularities,
        streams=streams,
    )


async def _whole(service: Service, wanted: TranscribeRequest, form: TranslationForm, request: Request) -> Response:
    transcript = await unless_gone(request, _transcript(service, wanted, form.file, client_of(request)))
    if transcript is None:
        return Response(status_code=CLIENT_GONE)
    task = "translate" if wanted.to_english else "transcribe"
    segments = not wanted.words or "segment" in getattr(form, "timestamp_granularities", ())
    return encoded(transcript, form.response_format, task, words=wanted.words, segments=segments)


async def _transcript(service: Service, wanted: TranscribeRequest, file: UploadFile, client: str) -> Transcript:
    made = [each async for each in service.sound(wanted, Ticket(client=client), _chunks(file))]
    assert isinstance(made[0], Transcript)  # noqa: S101 - what was asked for
    return made[0]


async def _events(
    service: Service, wanted: TranscribeRequest, form: FormData, file: UploadFile, ticket: Ticket
) -> AsyncGenerator[bytes]:
    """Yield each piece of the text as an event, and the whole at the end."""
    try:
        async with aclosing(service.sound(wanted, ticket, _chunks(file))) as made:
            async for piece in made:
                if isinstance(piece, str):
                    yield data_event({"type": "transcript.text.delta", "delta": piece})
                elif isinstance(piece, Transcript):
                    yield data_event({"type": "transcript.text.done", "text": piece.text})
    finally:
        await form.close()


async def _chunks(file: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await file.read(_CHUNK):
        yield chunk


def _checked(kind: type[TranslationForm], form: FormData) -> TranslationForm:
    """Return a form's fields. Raises InvalidRequest, which names the one that is wrong."""
    fields: dict[str, Any] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in _LISTS:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise InvalidRequest(f"`{name}` is there twice", param=name)
        else:
            fields[name] = value
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        if any(each["loc"][0] == "file" for each in error.errors()):
            raise InvalidRequest("send the recording as a file, in the field `file`", param="file") from None
        raise wrong_field(found, fields) from None
