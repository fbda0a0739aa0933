"""Builds a response from events, item by item, with each step as an event of the streaming protocol."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_overlay_server.api.fields import Json
from mlx_overlay_server.api.openai.errors import message_of
from mlx_overlay_server.api.openai.logprobs import SampledTokenEntry, logprob_entries
from mlx_overlay_server.api.responses.answers import (
    CallItem,
    ItemStatus,
    MessageOutput,
    OutputText,
    ReasoningOutput,
    ReasoningText,
    ResponseAnswer,
    TextItem,
    call_item,
    response_usage,
)
from mlx_overlay_server.api.responses.items import new_id
from mlx_overlay_server.api.responses.tools import Tools
from mlx_overlay_server.api.transport import dumps
from mlx_overlay_server.chat.events import Done, Event, Logprobs, Reasoning, Text, ToolCall
from mlx_overlay_server.errors import PromptTooLong, ServerError


def named_event(event: Json) -> bytes:
    """Return an event of the protocol as a server-sent event."""
    return f"event: {event['type']}\ndata: ".encode() + dumps(event) + b"\n\n"


Pieces = Sequence[tuple[int, int]]
"""The events of text in a stream, in their order: characters, and tokens with log probabilities, of each."""


@dataclass(slots=True)
class _OpenItem:
    """A message or reasoning item that text is added to."""

    item: MessageOutput | ReasoningOutput
    part: OutputText | ReasoningText
    """The item's one part."""
    part_event: str
    """Begins the names of events about the part."""
    text_event: str
    """Begins the names of events about the part's text."""
    index: Json
    """The part's place in the item."""


class ResponseBuilder:
    """Builds the response object and yields each step as an event of the streaming protocol."""

    def __init__(
        self,
        response: ResponseAnswer,
        tools: Tools,
        *,
        is_summary: bool = False,
        is_encrypted: bool = False,
        has_logprobs: bool = False,
    ) -> None:
        """Begin with a response without output.

        `is_summary`: reasoning is shown as a summary; `is_encrypted`: it is there in base64, too; `has_logprobs`: text
        comes with log probabilities.
        """
        self._tools = tools
        self._sequence = -1
        self._open: _OpenItem | None = None
        self._tokens: list[SampledTokenEntry] = []
        """Log probabilities for the text that comes next."""
        self._is_summary = is_summary
        self._is_encrypted = is_encrypted
        self._has_logprobs = has_logprobs
        self.pieces: list[tuple[int, int]] = []
        self.response = response

    def begin(self) -> Iterator[Json]:
        """Yield the first two events, which hold nothing of the answer."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def feed(self, event: Event) -> Iterator[Json]:
        """Add an event to the response, and yield what it adds. Log probabilities come before their text."""
        if isinstance(event, Text):
            yield from self._text("message", event.text)
        elif isinstance(event, Reasoning):
            yield from self._text("reasoning", event.text)
        elif isinstance(event, Logprobs):
            self._tokens += logprob_entries(event.tokens)
        elif isinstance(event, ToolCall):
            yield from self._close("completed")
            yield from self._call(call_item(event, self._tools))
        elif isinstance(event, Done):
            is_cut = event.reason == "length"
            yield from self._close("incomplete" if is_cut else "completed")
            self.response["status"] = "incomplete" if is_cut else "completed"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
            self.response["completed_at"] = None if is_cut else int(time.time())
            self.response["usage"] = response_usage(event.usage)
            yield self.end()

    def end(self) -> Json:
        """Return the last event, which holds the response as it has become."""
        return self._event(f"response.{self.response['status']}", response=self.response)

    def replay(self, item: TextItem | CallItem, pieces: Iterator[tuple[int, int]]) -> Iterator[Json]:
        """Yield what made an item of an answer that is over, its text in the same pieces as at first."""
        if item["type"] == "message":
            self._open, text = self._message_item(), item["content"][0]["text"]
            logprobs = item["content"][0]["logprobs"]
        elif item["type"] == "reasoning":
            self._is_summary, self._is_encrypted = bool(item["summary"]), "encrypted_content" in item
            self._open, logprobs = self._reasoning_item(), []
            text = (item["summary"] or item["content"])[0]["text"]
        else:
            yield from self._call(item)
            return
        self._has_logprobs = bool(logprobs)
        self._open.item["id"] = item["id"]
        yield from self._added(self._open)
        while text:
            size, tokens = next(pieces, (len(text), len(logprobs)))
            self._tokens, logprobs = logprobs[:tokens], logprobs[tokens:]
            yield from self._text(item["type"], text[:size])
            text = text[size:]
        yield from self._close(item["status"] if item["type"] == "message" else "completed")

    def fail(self, error: ServerError) -> Iterator[Json]:
        """End a stream with an error, also one in which only pings came before."""
        if self._sequence < 0:
            yield from self.begin()
        code = (
            "rate_limit_exceeded" if error.status == 429 else "invalid_prompt" if error.status < 500 else "server_error"
        )
        if isinstance(error, PromptTooLong):
            code = error.code  # by which clients know that they must compact the conversation
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message_of(error)}
        yield self._event("response.failed", response=self.response)

    def _text(self, kind: Literal["message", "reasoning"], text: str) -> Iterator[Json]:
        if self._open is None or self._open.item["type"] != kind:
            yield from self._close("completed")
            self._open = self._message_item() if kind == "message" else self._reasoning_item()
            yield from self._added(self._open)
        to = self._open
        to.part["text"] += text
        self.pieces.append((len(text), len(self._tokens) if kind == "message" else 0))
        extra: Json = {}
        if to.part["type"] == "output_text":
            extra["logprobs"], self._tokens = self._tokens, []
            if self._has_logprobs:
                to.part["logprobs"] += extra["logprobs"]
        yield self._event(f"{to.text_event}.delta", **self._place(to), **to.index, delta=text, **extra)

    def _message_item(self) -> _OpenItem:
        part: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item: MessageOutput = {
            "type": "message",
            "id": new_id("msg"),
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        return _OpenItem(item, part, "response.content_part", "response.output_text", {"content_index": 0})

    def _reasoning_item(self) -> _OpenItem:
        item: ReasoningOutput = {"type": "reasoning", "id": new_id("rs"), "summary": []}
        if self._is_summary:
            name, index, part = (
                "response.reasoning_summary",
                "summary_index",
                ReasoningText(type="summary_text", text=""),
            )
            return _OpenItem(item, part, f"{name}_part", f"{name}_text", {index: 0})
        part = ReasoningText(type="reasoning_text", text="")
        return _OpenItem(item, part, "response.content_part", "response.reasoning_text", {"content_index": 0})

    def _added(self, new: _OpenItem) -> Iterator[Json]:
        """Yield the item while it is empty, and its part, which it then holds."""
        item = {key: list(value) if isinstance(value, list) else value for key, value in new.item.items()}
        yield self._event("response.output_item.added", output_index=self._index, item=item)
        yield self._event(f"{new.part_event}.added", **self._place(new), **new.index, part=dict(new.part))
        if new.item["type"] == "message":
            assert new.part["type"] == "output_text"  # noqa: S101 - for the type checker
            new.item["content"] = [new.part]
        else:
            assert new.part["type"] != "output_text"  # noqa: S101 - for the type checker
            new.item["summary" if new.part["type"] == "summary_text" else "content"] = [new.part]

    def _close(self, status: ItemStatus) -> Iterator[Json]:
        done = self._open
        if done is None:
            return
        part = done.part
        extra = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
        yield self._event(f"{done.text_event}.done", **self._place(done), **done.index, text=part["text"], **extra)
        yield self._event(f"{done.part_event}.done", **self._place(done), **done.index, part=part)
        if done.item["type"] == "message":
            done.item["status"] = status
        elif self._is_encrypted:
            done.item["encrypted_content"] = base64.b64encode(part["text"].encode()).decode()
        yield self._event("response.output_item.done", output_index=self._index, item=done.item)
        self.response["output"] = [*self.response["output"], done.item]
        self._open = None

    def _call(self, item: CallItem) -> Iterator[Json]:
        begun: Json
        if item["type"] == "function_call":
            name, key, text = "response.function_call_arguments", "arguments", item["arguments"]
            begun = {**item, "arguments": "", "status": "in_progress"}
        else:
            name, key, text = "response.custom_tool_call_input", "input", item["input"]
            begun = {**item, "input": ""}
        place = {"output_index": self._index, "item_id": item["id"]}
        yield self._event("response.output_item.added", output_index=self._index, item=begun)
        yield self._event(f"{name}.delta", **place, delta=text)
        yield self._event(f"{name}.done", **place, **{key: text}, name=item["name"])
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self.response["output"] = [*self.response["output"], item]

    @property
    def _index(self) -> int:
        """The place that the next item has in the output."""
        return len(self.response["output"])

    def _place(self, of: _OpenItem) -> Json:
        return {"item_id": of.item["id"], "output_index": self._index}

    def _event(self, kind: str, **content: Any) -> Json:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **content}


def replayed(response: ResponseAnswer, pieces: Pieces) -> Iterator[Json]:
    """Yield the events of a response that is over, as its stream had them, with the same numbers."""
    head: ResponseAnswer = {
        **response,
        "status": "in_progress",
        "completed_at": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    builder = ResponseBuilder(head, Tools(()))
    yield from builder.begin()
    left = iter(pieces)
    for item in response["output"]:
        yield from builder.replay(item, left)
    builder.response = response
    yield builder.end()
