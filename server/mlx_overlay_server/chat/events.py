"""What comes back, as frozen values: the one stream of events that all dialects encode."""

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
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call of a tool."""

    id: str
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its bytes and the natural logarithm of its probability."""

    token: str
    data: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()
    """The likeliest tokens in its place, likeliest first."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of every token that the text before it was made of, stop sequences left out."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    prompt: int
    cached: int
    """Of the prompt: taken from the KV cache."""
    completion: int
    reasoning: int = 0
    """Of the completion."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt is in the engine's hands; comes before anything else of a choice."""

    prompt: int
    cached: int


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a choice."""

    reason: FinishReason
    usage: Usage
    stop_sequence: str | None = None


Event = Text | Reasoning | ToolCall | Logprobs | Started | Done
