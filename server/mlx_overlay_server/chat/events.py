"""The stream of events that all dialects encode their answers from, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls", "stop_sequence"]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning that comes before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool, complete."""

    id: str
    name: str
    arguments: str
    """A JSON object, as text."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with the natural logarithm of its probability."""

    token: str
    """Its text, with U+FFFD for what is not valid UTF-8 on its own."""
    data: bytes
    """Its bytes."""
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()
    """The likeliest tokens in its place, likeliest first."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities of the tokens of the `Text` before it, without those of stop sequences."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of the prompt with the natural logarithm of its probability after the tokens before it."""

    id: int
    token: str
    """Its text, with U+FFFD for what is not valid UTF-8 on its own."""
    data: bytes
    """Its bytes in the prompt's text; none for a token that the tokenizer has added."""
    logprob: float | None
    """None for the first token, before which there is nothing."""
    rank: int = 1
    """Its place among all tokens, the likeliest being the first."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens in its place, as (id, text, log probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of all tokens of the prompt."""

    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    prompt: int
    cached: int
    """Tokens of the prompt that came from the KV cache."""
    completion: int
    reasoning: int = 0
    """Tokens of the completion that are reasoning."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is in the KV cache; the first event of every answer."""

    prompt: int
    """Its tokens."""
    cached: int
    """Tokens of it that were in the KV cache before."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of every answer."""

    reason: FinishReason
    usage: Usage
    stop_sequence: str | None = None
    """The one that ended it, if one did."""


Event = Text | Reasoning | ToolCall | Logprobs | PromptLogprobs | Started | Done
