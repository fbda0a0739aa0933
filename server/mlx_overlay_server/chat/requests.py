"""The request that all dialects decode theirs to, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Verbosity = Literal["low", "medium", "high"]

OURS = frozenset({"messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
                   "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
                   "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"})  # fmt: skip
"""Arguments of chat templates that only the server sets."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a message, as the bytes of its file."""

    data: bytes
    where: str
    """Its place in the request as the client wrote it, for error messages."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of an earlier turn."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[str | Image, ...] = ()
    """Texts and images in their order."""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    """In a tool message: the call it answers."""
    name: str | None = None
    """The author's, where the client gives one."""

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str | None
    parameters: Mapping[str, Any] | None
    """A JSON schema."""


def described(tool: Tool) -> dict[str, Any]:
    """Return a tool in OpenAI's form, which chat templates and mlx-lm's tool parsers expect."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description or ""}
    function["parameters"] = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools that the model may, or must, call."""

    mode: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    """With `required`: this one."""
    parallel: bool = True
    """Whether one answer may hold several calls."""


@dataclass(frozen=True, slots=True)
class Format:
    """A JSON form that the answer must have."""

    schema: Mapping[str, Any] | None
    """A JSON schema; None: any JSON object."""


@dataclass(frozen=True, slots=True)
class Params:
    """Sampling parameters. None: as the model's generation_config.json says, else the API's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    """Multiplies, over prompt and answer; 1: none."""
    repetition_context: int | None = None
    """Tokens that the repetition penalty looks back on; None: all."""
    presence_penalty: float = 0.0
    """Subtracted once for each token the answer already has."""
    frequency_penalty: float = 0.0
    """Subtracted each time the answer already has the token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    """None: as many as the model's context holds; 0: the prompt is read, and there is no answer."""
    min_tokens: int = 0
    """Tokens that the answer has at least: until then nothing ends it but `max_tokens`."""
    logprobs: int | None = None
    """Alternatives to report for each token; None: no log probabilities at all."""
    prompt_logprobs: int | None = None
    """The same for each token of the prompt."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request for `n` answers."""

    model: str
    params: Params = Params()
    stop: tuple[str, ...] = ()
    n: int = 1
    context: int | None = None
    """Tokens that prompt and answer may have together, where the model could take more."""

    @property
    def answers(self) -> int:
        """The number of answers it asks for."""
        return self.n


@dataclass(frozen=True, slots=True)
class ChatRequest(Request):
    """An answer to a conversation."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()
    format: Format | None = None
    continues: bool = False
    """Whether a last assistant message is a prefill, which the answer continues."""
    thinking: bool | None = None
    """Whether to reason first; None: as the model's template does."""
    reasoning_budget: int | None = None
    """Tokens that the reasoning may take; None: any number."""
    effort: str | None = None
    """The reasoning effort, in the words of the template."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    """A chat template in place of the model's own."""
    verbosity: Verbosity | None = None
    """How much the answer says; None or medium: as the model does."""
    is_truncated: bool = False
    """Whether the oldest turns may be left out where the prompt would not leave room for an answer."""
    is_effort_optional: bool = False
    """Whether to ignore `effort` where the template has no such setting, instead of refusing."""

    @property
    def has_images(self) -> bool:
        """Whether any message holds an image."""
        return any(isinstance(part, Image) for message in self.messages for part in message.content)


@dataclass(frozen=True, slots=True)
class TextRequest(Request):
    """A continuation of plain prompts: `n` for each of them, in their order."""

    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or token ids."""
    echo: bool = False
    """Whether an answer begins with its prompt."""

    @property
    def answers(self) -> int:
        """The number of answers it asks for: `n` for each prompt."""
        return self.n * len(self.prompts)


AnyRequest = ChatRequest | TextRequest
"""Every kind of request that is answered with generated text."""
