"""The bodies that Anthropic's clients send, and how they are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mlx_overlay_server.api.fields import MAX_STOPS, Count, Json, ModelBody, Part, Share, Whole, image
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.requests import ChatRequest, Params
from mlx_overlay_server.errors import InvalidRequest

_BILLING = "x-anthropic-billing-header:"
"""Begins a system block of Claude Code's. Its hash changes with each prompt, so that no prefix would be reused."""


class TextBlock(Part):
    """A text."""

    type: Literal["text"]
    text: str


class Base64Source(Part):
    """An image, as base64."""

    type: Literal["base64"]
    media_type: str
    data: str


class UrlSource(Part):
    """The address of an image: a data URL."""

    type: Literal["url"]
    url: str


class ImageBlock(Part):
    """An image."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class TextSource(Part):
    """The text of a document."""

    type: Literal["text"]
    data: str


class DocumentBlock(Part):
    """A document of plain text; of other kinds the model would see nothing."""

    type: Literal["document"]
    source: TextSource
    title: str | None = None


class ThinkingBlock(Part):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Part):
    """Encrypted reasoning of an earlier answer, which only Anthropic can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Part):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


ResultContent = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]


class ToolResultBlock(Part):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultContent] | None = None
    is_error: bool | None = None


Block = Annotated[
    TextBlock | ImageBlock | DocumentBlock | ThinkingBlock | RedactedBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]


class MessageParam(Part):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CustomTool(Part):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    input_schema: Json
    strict: bool | None = None


class ToolUseChoice(Part):
    """The tools that the answer may, or must, use."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(Part):
    """The reasoning before the answer: on or off, and the tokens it may take."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Whole, Field(ge=0)] | None = None


class OutputFormat(Part):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    schema_: Annotated[Json, Field(alias="schema")]


class OutputConfig(Part):
    """Options for the answer: its effort and its format."""

    effort: str | None = None
    format: OutputFormat | None = None


class _PromptBody(ModelBody):
    """The fields that messages and count_tokens have in common."""

    messages: Annotated[list[MessageParam], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: list[CustomTool] | None = None
    tool_choice: ToolUseChoice | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    # What asks for nothing here: marks for a cache that works without, and names for billing.
    cache_control: Json | None = None
    context_management: Json | None = None
    betas: list[str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_hosted_tools(cls, data: Any) -> Any:
        """Refuse tools that Anthropic's servers would run by their type, not for the schema that they lack."""
        tools = data.get("tools") if isinstance(data, dict) else None
        for at, tool in enumerate(tools if isinstance(tools, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(kind, str) and kind != "custom":
                raise InvalidRequest(f"tools of type {kind!r} cannot be run here", param=f"tools[{at}].type")
        return data

    def _chat(self, params: Params, stop: tuple[str, ...]) -> ChatRequest:
        tools = tuple(requests.Tool(each.name, each.description, each.input_schema) for each in self.tools or ())
        config = self.output_config or OutputConfig()
        wanted = config.format or self.output_format
        is_thinking = self.thinking is not None and self.thinking.type != "disabled"
        return ChatRequest(
            model=self.model,
            params=params,
            stop=stop,
            messages=tuple(self._turns()),
            tools=tools,
            choice=self._choice(tools),
            format=requests.Format(wanted.schema_) if wanted is not None else None,
            continues=True,
            thinking=is_thinking,
            reasoning_budget=self.thinking.budget_tokens if self.thinking is not None and is_thinking else None,
            effort=config.effort if is_thinking else None,
            is_effort_optional=True,
        )

    def _choice(self, tools: Sequence[requests.Tool]) -> requests.ToolChoice:
        choice = self.tool_choice
        if choice is None:
            return requests.ToolChoice()
        is_parallel = not choice.disable_parallel_tool_use
        if choice.type in ("auto", "none"):
            return requests.ToolChoice("none" if choice.type == "none" else "auto", parallel=is_parallel)
        if not tools:
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        if choice.type == "any":
            return requests.ToolChoice("required", parallel=is_parallel)
        if choice.name not in {tool.name for tool in tools}:
            raise InvalidRequest(f"`tools` has no tool {choice.name!r}", param="tool_choice.name")
        return requests.ToolChoice("required", choice.name, is_parallel)

    def _turns(self) -> Iterable[requests.Message]:
        blocks = [self.system] if isinstance(self.system, str) else [block.text for block in self.system or ()]
        system = "\n\n".join(text for text in blocks if not text.startswith(_BILLING))
        if system:
            yield requests.Message("system", (system,))
        for at, message in enumerate(self.messages):
            yield from _turns(message, f"messages[{at}]")


class MessagesRequest(_PromptBody):
    """`POST /v1/messages`."""

    model_config = ConfigDict(extra="allow")

    max_tokens: Count
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: Json | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
    speed: Literal["standard"] | None = None

    def decoded(self, *, has_beta: bool) -> ChatRequest:
        """Return the request that all dialects share. Raises InvalidRequest.

        With an `anthropic-beta` header, unknown fields are ignored: betas add them.
        """
        if self.model_extra and not has_beta:
            name = next(iter(self.model_extra))
            raise InvalidRequest(f"`{name}` is not supported by this server", param=name)
        params = Params(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_tokens=self.max_tokens)
        return self._chat(params, tuple(self.stop_sequences or ()))


class CountRequest(_PromptBody):
    """`POST /v1/messages/count_tokens`. Clients also send fields that only matter to an answer; they are ignored."""

    model_config = ConfigDict(extra="ignore")

    def decoded(self) -> ChatRequest:
        """Return the request that all dialects share. Raises InvalidRequest."""
        return self._chat(Params(), ())


def _turns(message: MessageParam, where: str) -> Iterable[requests.Message]:
    """Yield a message as turns: each tool result is a turn of its own, before the text that comes with them."""
    if isinstance(message.content, str):
        yield requests.Message(message.role, (message.content,))
        return
    content: list[str | requests.Image] = []
    reasoning: list[str] = []
    calls: list[requests.Call] = []
    for at, block in enumerate(message.content):
        place = f"{where}.content[{at}]"
        if isinstance(block, ToolResultBlock):
            given = (TextBlock(type="text", text=block.content),) if isinstance(block.content, str) else block.content
            result = tuple(_part(each, f"{place}.content[{number}]") for number, each in enumerate(given or ()))
            if block.is_error:
                result = ("Error: ", *result)
            yield requests.Message("tool", result, call_id=block.tool_use_id)
        elif isinstance(block, ThinkingBlock):
            reasoning.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(requests.Call(block.id, block.name, block.input))
        elif not isinstance(block, RedactedBlock):
            part = _part(block, place)
            if content and isinstance(content[-1], str) and isinstance(part, str):
                content.append("\n\n")
            content.append(part)
    if content or calls or reasoning:
        yield requests.Message(message.role, tuple(content), "\n\n".join(reasoning), tuple(calls))


def _part(block: TextBlock | ImageBlock | DocumentBlock, where: str) -> str | requests.Image:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock):
        return f"{block.title}\n\n{block.source.data}" if block.title else block.source.data
    if isinstance(block.source, Base64Source):
        return image(f"data:{block.source.media_type};base64,{block.source.data}", f"{where}.source")
    return image(block.source.url, f"{where}.source.url")
