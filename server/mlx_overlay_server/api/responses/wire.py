"""The bodies that clients of Responses send, and how they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_overlay_server.api.fields import Body, Count, Json, ModelBody, Part, Share, Temperature, Whole
from mlx_overlay_server.api.responses.items import Item, turns_of
from mlx_overlay_server.api.responses.tools import ToolParam, Tools
from mlx_overlay_server.chat import requests
from mlx_overlay_server.chat.requests import ChatRequest, Params
from mlx_overlay_server.errors import InvalidRequest


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

    verbosity: requests.Verbosity | None = None
    format: Annotated[PlainFormat | SchemaTextFormat, Field(discriminator="type")] | None = None


class ReasoningOptions(Part):
    """Options for the reasoning before the answer: its effort, and whether it is shown as a summary."""

    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(Part):
    """Options of a stream: padding against those who measure what passes on a network, which asks for nothing here."""

    include_obfuscation: bool | None = None


SUMMARY_TOKENS = 2048
"""Tokens of a summary that stands for a compacted conversation, at most."""
SUMMARIZE = (
    "Summarize our conversation until now, for somebody who goes on with it and has nothing but the summary: what was "
    "asked, what was done and found, what was decided, what is left to do, with names, numbers and quotes where they "
    "matter. Write the summary alone."
)
"""The question that a conversation is compacted with."""


class ConversationBody(ModelBody):
    """The fields that a conversation's prompt is made of."""

    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[ToolParam] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoiceParam | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: None = None

    def conversation_after(self, before: Sequence[requests.Message]) -> tuple[ChatRequest, Tools]:
        """Return the request that all dialects share, with earlier turns before it, and its tools.

        Raises InvalidRequest.
        """
        tools = Tools(self.tools or ())
        system = [requests.Message("system", (self.instructions,))] if self.instructions else []
        request = ChatRequest(
            model=self.model,
            messages=(*system, *before, *turns_of(self.input, tools)),
            tools=tools.tools,
            choice=self._choice(tools),
            format=self._format(),
            effort=self.reasoning.effort if self.reasoning is not None else None,
            is_truncated=self.truncation == "auto",
            is_effort_optional=True,
            verbosity=self.text.verbosity if self.text is not None else None,
        )
        return request, tools

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


class InputTokensRequest(ConversationBody):
    """`POST /v1/responses/input_tokens`."""

    input: str | list[Item] = Field(default_factory=list)
    personality: None = None


class CompactRequest(ModelBody):
    """`POST /v1/responses/compact`."""

    input: str | list[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    image: None = None
    # What asks for nothing here.
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Json | None = None

    def decoded(self, before: Sequence[requests.Message]) -> ChatRequest:
        """Return the request for a summary of the conversation. Raises InvalidRequest."""
        turns = turns_of(self.input or [], Tools(()))
        system = [requests.Message("system", (self.instructions,))] if self.instructions else []
        if not turns and not before:
            raise InvalidRequest("there is no conversation to compact", param="input")
        return ChatRequest(
            model=self.model,
            params=Params(max_tokens=SUMMARY_TOKENS),
            messages=(*system, *before, *turns, requests.Message("user", (SUMMARIZE,))),
            thinking=False,
            is_truncated=True,
        )


class ResponsesRequest(ConversationBody):
    """`POST /v1/responses`."""

    store: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: Literal[False] | None = None
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
    max_tool_calls: Whole | None = None

    def decoded(self, before: Sequence[requests.Message]) -> tuple[ChatRequest, Tools]:
        """Return the request that all dialects share, with earlier turns before it, and its tools.

        Raises InvalidRequest.
        """
        request, tools = self.conversation_after(before)
        params = Params(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.has_logprobs else None,
        )
        return replace(request, params=params), tools

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer's text comes with log probabilities."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())
