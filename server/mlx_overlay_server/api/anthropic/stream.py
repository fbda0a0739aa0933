"""The answers that Anthropic's clients get as a stream of named events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping

from mlx_overlay_server.api.anthropic.answers import (
    SIGNATURE,
    AnswerContent,
    message_head,
    message_usage,
    stop_reason,
)
from mlx_overlay_server.api.transport import dumps
from mlx_overlay_server.chat.events import Done, Event, Reasoning, Started, Text, ToolCall
from mlx_overlay_server.chat.requests import ChatRequest
from mlx_overlay_server.service import Batch


def named_event(name: str, content: Mapping[str, object]) -> bytes:
    """Return a server-sent event with a name."""
    return f"event: {name}\ndata: ".encode() + dumps(content) + b"\n\n"


def ping(note: str) -> bytes:
    """Return a ping, which resets the clients' timeouts as a comment would not; the note is a comment before it."""
    return f": {note}\n".encode() + named_event("ping", {"type": "ping"})


class MessageStream:
    """Encodes events as content blocks, one after the other, each opened and closed."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._open: str | None = None
        """The type of the block that is open."""
        self._index = -1

    async def encode(self, batches: AsyncIterator[Batch]) -> AsyncGenerator[bytes]:
        """Yield the answer's events as they come."""
        async for _, events in batches:
            data = b"".join(part for event in events for part in self._encode(event))
            if data:
                yield data

    def _encode(self, event: Event) -> Iterable[bytes]:
        if isinstance(event, Started):
            message = message_head(self._request.model, [], message_usage(event.prompt, event.cached, 0))
            yield named_event("message_start", {"type": "message_start", "message": message})
            yield named_event("ping", {"type": "ping"})
        elif isinstance(event, Text):
            yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, Reasoning) and self._request.thinking:
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, ToolCall):
            yield from self._close()
            yield from self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": event.arguments})
            yield from self._close()
        elif isinstance(event, Done):
            yield from self._close()
            delta = {"stop_reason": stop_reason(event), "stop_sequence": event.stop_sequence}
            usage = message_usage(event.usage.prompt, event.usage.cached, event.usage.completion)
            yield named_event("message_delta", {"type": "message_delta", "delta": delta, "usage": usage})
            yield named_event("message_stop", {"type": "message_stop"})

    def _begin(self, block: AnswerContent) -> Iterable[bytes]:
        """Open a block unless one of its type is open."""
        if self._open == block["type"]:
            return
        yield from self._close()
        self._open = block["type"]
        self._index += 1
        yield named_event(
            "content_block_start", {"type": "content_block_start", "index": self._index, "content_block": block}
        )

    def _close(self) -> Iterable[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        self._open = None
        yield named_event("content_block_stop", {"type": "content_block_stop", "index": self._index})

    def _delta(self, delta: Mapping[str, str]) -> bytes:
        return named_event("content_block_delta", {"type": "content_block_delta", "index": self._index, "delta": delta})
