"""The items that a conversation has for clients of Responses, and the turns that they are for the model."""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field
from pydantic import Tag as Variant

from mlx_overlay_server.api.fields import Json, Part, image
from mlx_overlay_server.api.openai.messages import arguments
from mlx_overlay_server.api.responses.tools import Tools
from mlx_overlay_server.chat import requests
from mlx_overlay_server.errors import InvalidRequest


class InputText(Part):
    """A text in a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(Part):
    """A refusal of an earlier answer, sent back as text."""

    type: Literal["refusal"]
    refusal: str


class InputImage(Part):
    """An image in a message, as a data URL."""

    type: Literal["input_image"]
    image_url: str


InputPart = Annotated[InputText | InputRefusal | InputImage, Field(discriminator="type")]
InputContent = str | list[InputPart]


class MessageItem(Part):
    """One message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class FunctionCallParam(Part):
    """A function call of an earlier answer; `arguments` is a JSON object, as text or as it is."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str | Json
    namespace: str | None = None


class FunctionCallOutputParam(Part):
    """The result of a call."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: InputContent


class CustomToolCallParam(Part):
    """A call, in an earlier answer, of a tool that takes plain text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class ReasoningPart(Part):
    """A text of reasoning."""

    text: str


class ReasoningItem(Part):
    """The reasoning of an earlier answer."""

    type: Literal["reasoning"]
    summary: list[ReasoningPart] = Field(default_factory=list)
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = None


class CompactionParam(Part):
    """What `/v1/responses/compact` made of an earlier part of the conversation."""

    type: Literal["compaction"]
    encrypted_content: str


class ItemReference(Part):
    """Stands for an item of a stored response."""

    type: Literal["item_reference"]
    id: str


def _item_type(item: Any) -> str:
    """Return the tag of an item in the union below; a message may leave its type out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return "function_call_output" if kind == "custom_tool_call_output" else str(kind)


Item = Annotated[
    Annotated[MessageItem, Variant("message")]
    | Annotated[FunctionCallParam, Variant("function_call")]
    | Annotated[FunctionCallOutputParam, Variant("function_call_output")]
    | Annotated[CustomToolCallParam, Variant("custom_tool_call")]
    | Annotated[ReasoningItem, Variant("reasoning")]
    | Annotated[CompactionParam, Variant("compaction")]
    | Annotated[ItemReference, Variant("item_reference")],
    Discriminator(_item_type),
]


def turns_of(items: str | Sequence[Item], tools: Tools) -> list[requests.Message]:
    """Return a request's input as turns: reasoning, text and calls of one answer become one assistant message again.

    Raises InvalidRequest.
    """
    if isinstance(items, str):
        return [requests.Message("user", (items,))]
    turns: list[requests.Message] = []
    reasoning: list[str] = []
    content: list[str | requests.Image] = []
    calls: list[requests.Call] = []

    def end_answer() -> None:
        if reasoning or content or calls:
            turns.append(requests.Message("assistant", tuple(content), "\n\n".join(reasoning), tuple(calls)))
            for part in (reasoning, content, calls):
                part.clear()

    for at, item in enumerate(items):
        where = f"input[{at}]"
        if isinstance(item, ItemReference):
            raise InvalidRequest(f"there is no stored item {item.id!r} here; send the item itself", param=where)
        if isinstance(item, ReasoningItem):
            if content or calls:
                end_answer()
            reasoning.append(_reasoning(item))
        elif isinstance(item, FunctionCallParam):
            name = tools.named(item.namespace, item.name)
            calls.append(requests.Call(item.call_id, name, arguments(item.arguments, where)))
        elif isinstance(item, CustomToolCallParam):
            name = tools.named(item.namespace, item.name)
            calls.append(requests.Call(item.call_id, name, {"input": item.input}))
        elif isinstance(item, MessageItem) and item.role == "assistant":
            if calls:
                end_answer()
            content += _content(item.content, f"{where}.content")
        else:
            end_answer()
            if isinstance(item, CompactionParam):
                turns.append(requests.Message("user", (_summary(item, where),)))
            elif isinstance(item, FunctionCallOutputParam):
                turns.append(requests.Message("tool", _content(item.output, f"{where}.output"), call_id=item.call_id))
            else:
                role: requests.Role = "user" if item.role == "user" else "system"
                turns.append(requests.Message(role, _content(item.content, f"{where}.content")))
    end_answer()
    return turns


def _content(content: InputContent, where: str) -> tuple[str | requests.Image, ...]:
    if isinstance(content, str):
        return (content,)
    parts: list[str | requests.Image] = []
    for at, part in enumerate(content):
        if isinstance(part, InputImage):
            parts.append(image(part.image_url, f"{where}[{at}].image_url"))
        else:
            parts.append(part.refusal if isinstance(part, InputRefusal) else part.text)
    return tuple(parts)


def _reasoning(item: ReasoningItem) -> str:
    texts = [part.text for part in item.content or item.summary]
    if not texts and item.encrypted_content:
        try:
            return base64.b64decode(item.encrypted_content, validate=True).decode()
        except (binascii.Error, ValueError):  # another server's
            return ""
    return "\n\n".join(texts)


def compaction_item(summary: str) -> Json:
    """Return the item that stands for a conversation which a summary tells."""
    text = json.dumps({"summary": summary})
    return {"type": "compaction", "id": new_id("cmp"), "encrypted_content": base64.b64encode(text.encode()).decode()}


def _summary(item: CompactionParam, where: str) -> str:
    """Return the text that a compacted conversation is for the model. Raises InvalidRequest for another server's."""
    try:
        summary = json.loads(base64.b64decode(item.encrypted_content, validate=True))["summary"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InvalidRequest(
            "this compaction is not one of this server's", param=f"{where}.encrypted_content"
        ) from None
    return f"The conversation until now, in short:\n\n{summary}"


def as_items(given: str | Sequence[Item]) -> list[Json]:
    """Return a request's input as items with ids of their own, as `input_items` lists them."""
    if isinstance(given, str):
        return [_with_id(MessageItem(role="user", content=given))]
    return [_with_id(item) for item in given]


_IDS = {"message": "msg", "function_call": "fc", "reasoning": "rs", "custom_tool_call": "ctc", "compaction": "cmp"}


def _with_id(item: Item) -> Json:
    plain: Json = {
        "id": new_id(_IDS.get(item.type, "out")),
        "status": "completed",
        **item.model_dump(exclude_none=True),
    }
    if isinstance(item, MessageItem):
        plain["content"] = _parts(item)
    elif isinstance(item, FunctionCallParam) and not isinstance(item.arguments, str):
        plain["arguments"] = json.dumps(item.arguments)
    elif isinstance(item, ReasoningItem):
        plain["summary"] = [{"type": "summary_text", "text": part.text} for part in item.summary]
        if item.content is not None:
            plain["content"] = [{"type": "reasoning_text", "text": part.text} for part in item.content]
    elif isinstance(item, CompactionParam):
        del plain["status"]
    return plain


def _parts(item: MessageItem) -> list[Json]:
    given = [InputText(type="input_text", text=item.content)] if isinstance(item.content, str) else item.content
    parts: list[Json] = []
    for part in given:
        if isinstance(part, InputImage):
            parts.append({"type": "input_image", "image_url": part.image_url, "detail": "auto"})
        elif isinstance(part, InputRefusal):
            parts.append({"type": "refusal", "refusal": part.refusal})
        elif item.role == "assistant":
            parts.append({"type": "output_text", "text": part.text, "annotations": [], "logprobs": []})
        else:
            parts.append({"type": "input_text", "text": part.text})
    return parts


def new_id(kind: str) -> str:
    """Return a new id that begins with its kind, such as `resp`."""
    return f"{kind}_{uuid.uuid4().hex}"
