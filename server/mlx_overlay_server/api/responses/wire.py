"""The bodies that clients of Responses send, and how they are decoded."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field
from pydantic import Tag as Variant

from mlx_overlay_server.api.fields import Body, Count, Json, ModelBody, Part, Share, Temperature, image
from mlx_overlay_server.api.openai.messages import arguments
from mlx_overlay_server.api.responses.tools import ToolParam, Tools
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.requests import ChatRequest, Params
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


def _item_type(item: Any) -> str:
    """Return the tag of an item in the union below; a message may leave its type out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return "function_call_output" if kind == "custom_tool_call_output" else str(kind)


Item = Annotated[
    Annotated[MessageItem, Variant("message")]
    | Annotated[FunctionCallParam, Variant("function_call")]
    | Annotated[FunctionCallOutputParam, Variant("function_call_output")]
    | Annotated[CustomToolCallParam, Variant("custom_tool_call")]
    | Annotated[ReasoningItem, Variant("reasoning")],
    Discriminator(_item_type),
]


class ToolChoiceParam(Part):
    """The one tool that the answer must call."""

    type: str
    name: str | None = None


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaTextFormat(Part):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    name: str
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


class TextOptions(Part):
    """Options for the answer's text."""

    format: Annotated[PlainFormat | SchemaTextFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(Part):
    """Options for the reasoning before the answer: its effort, and whether it is shown as a summary."""

    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(Part):
    """Options of a stream, which ask for nothing here."""

    include_obfuscation: bool | None = None


class ResponsesRequest(ModelBody):
    """`POST /v1/responses`."""

    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[ToolParam] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoiceParam | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    conversation: None = None
    prompt: None = None
    # What asks for nothing here: names for billing, caches of their own, and limits on tools that run elsewhere.
    metadata: dict[str, Any] | None = None
    client_metadata: Json | None = None
    user: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None
    max_tool_calls: int | None = None

    def decoded(self, before: Sequence[requests.Message]) -> tuple[ChatRequest, Tools]:
        """Return the request that all dialects share, with earlier turns before it, and its tools.

        Raises InvalidRequest.
        """
        tools = Tools(self.tools or ())
        given = [requests.Message("user", (self.input,))] if isinstance(self.input, str) else _turns(self.input, tools)
        system = [requests.Message("system", (self.instructions,))] if self.instructions else []
        logprobs = (self.top_logprobs or 0) if self.has_logprobs else None
        request = ChatRequest(
            model=self.model,
            params=Params(
                temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_output_tokens, logprobs=logprobs
            ),
            messages=(*system, *before, *given),
            tools=tools.tools,
            choice=self._choice(tools),
            format=self._format(),
            effort=self.reasoning.effort if self.reasoning is not None else None,
            is_effort_optional=True,
        )
        return request, tools

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer's text comes with log probabilities."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())

    def _choice(self, tools: Tools) -> requests.ToolChoice:
        is_parallel = self.parallel_tool_calls is not False
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return requests.ToolChoice("none" if choice == "none" else "auto", parallel=is_parallel)
        if not tools.tools:
            raise InvalidRequest("`tool_choice` needs a function in `tools`", param="tool_choice")
        if choice == "required":
            return requests.ToolChoice("required", parallel=is_parallel)
        name = choice.name if isinstance(choice, ToolChoiceParam) else None
        if name is None or name not in {tool.name for tool in tools.tools}:
            raise InvalidRequest(f"`tools` has no function {name!r} that can be called here", param="tool_choice")
        return requests.ToolChoice("required", name, is_parallel)

    def _format(self) -> requests.Format | None:
        wanted = self.text.format if self.text is not None else None
        if isinstance(wanted, SchemaTextFormat):
            return requests.Format(wanted.schema_)
        return requests.Format(None) if wanted is not None and wanted.type == "json_object" else None


def _turns(items: Sequence[Item], tools: Tools) -> list[requests.Message]:
    """Return items as turns; the reasoning, text and calls of one answer become one assistant message again."""
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
            if isinstance(item, FunctionCallOutputParam):
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
