"""Answers of the routes for sound as server-sent events, whose data says in `type` what it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.responses import Response

from mlx_overlay_server.api.openai.errors import encode_error, refuse
from mlx_overlay_server.api.openai.stream import data_event
from mlx_overlay_server.api.transport import EventStream, comment
from mlx_overlay_server.ticket import Ticket


def event_stream(events: AsyncGenerator[bytes], ticket: Ticket) -> Response:
    """Return a response of some events, which come as the request in `ticket` makes progress."""
    return EventStream(events, ticket, refuse=refuse, fail=lambda error: data_event(encode_error(error)), ping=comment)
