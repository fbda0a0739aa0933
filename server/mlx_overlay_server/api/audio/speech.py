"""`POST /v1/audio/speech`: its body, and its answer."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from mlx_overlay_server.api.audio.events import event_stream
from mlx_overlay_server.api.dialect import client_of
from mlx_overlay_server.api.fields import ModelBody, Number
from mlx_overlay_server.api.openai.errors import refuse
from mlx_overlay_server.api.openai.stream import data_event
from mlx_overlay_server.api.transport import ByteStream
from mlx_overlay_server.errors import InvalidRequest
from mlx_overlay_server.service import Service
from mlx_overlay_server.speech.values import Sound, SoundFormat, SpeakRequest
from mlx_overlay_server.ticket import Ticket

MAX_CHARACTERS = 1 << 15
"""Characters of a text, which take about half an hour to say."""
MEDIA_TYPES: dict[SoundFormat, str] = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "pcm": "audio/pcm",
}


class SpeechBody(ModelBody):
    """The body."""

    input: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    voice: Annotated[str, Field(min_length=1)]
    speed: Annotated[Number, Field(ge=0.25, le=4)] = 1.0
    instructions: str | None = None
    response_format: SoundFormat = "mp3"
    stream_format: Literal["audio", "sse"] | None = None
    """Whether the sound comes as bytes, or in server-sent events, as base64."""

    def decoded(self) -> SpeakRequest:
        """Return the request that the service takes. Raises InvalidRequest."""
        if not self.input.strip():
            raise InvalidRequest("there is nothing to say in `input`", param="input")
        return SpeakRequest(self.model, self.input, self.voice, self.speed, self.instructions, self.response_format)


def answer(service: Service, body: SpeechBody, request: Request) -> Response:
    """Return the sound: `pcm` as it comes, any other format when all of it is there."""
    body.name(service.default_model)
    ticket = Ticket(client=client_of(request))
    pieces = _pieces(service, body.decoded(), ticket)
    if body.stream_format == "sse":
        return event_stream(_events(pieces), ticket)
    return ByteStream(pieces, MEDIA_TYPES[body.response_format], refuse=refuse)


async def _pieces(service: Service, request: SpeakRequest, ticket: Ticket) -> AsyncGenerator[bytes]:
    has_sound = False
    async with aclosing(service.sound(request, ticket)) as made:
        async for piece in made:
            if isinstance(piece, Sound):
                has_sound = True
                yield piece.data
    if not has_sound:
        raise InvalidRequest("the model finds nothing to say in `input`", param="input")


async def _events(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        async for piece in pieces:
            yield data_event({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()})
    yield data_event({"type": "speech.audio.done"})
