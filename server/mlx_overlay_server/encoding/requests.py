"""The requests that embed or rank texts, as frozen values that all dialects share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """A vector for each of some texts."""

    model: str
    texts: tuple[str | tuple[int, ...], ...]
    """Texts, or token ids, which are taken as they are."""
    prompt: str | None = None
    """The name of the prompt that goes before each text; None: the model's default, if it has one."""
    truncates: bool = False
    """Whether to cut the end of a text that is too long, instead of refusing it."""


@dataclass(frozen=True, slots=True)
class RankRequest:
    """How well each of some documents answers a query."""

    model: str
    query: str
    documents: tuple[str, ...]
    instruction: str | None = None
    """What the query is for, for models that take it; None: what the model was trained with."""
    max_tokens: int | None = None
    """Tokens of a document that count; None: as many as the model takes."""
    truncates: bool = True
    """Whether to cut the end of a document that is too long, instead of refusing it."""


EncodeRequest = EmbedRequest | RankRequest
