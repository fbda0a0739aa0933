"""Sorts the items that the engine has sent for a request by the answers that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mlx_overlay_server.chat.events import FinishReason, TokenLogprob
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Token
from mlx_overlay_server.engine.commands import Item, Prefilled, PromptScores, Sampled, Scored
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.scores import named


@dataclass(slots=True)
class News:
    """The items that have come for one sequence since the mailbox was emptied last."""

    cached: int | None = None
    """How many tokens of the prompt had their KV cache reused; None until the prompt has been read."""
    scores: list[Scored] = field(default_factory=list)
    """The log probabilities of the prompt's tokens that have come."""
    has_sampled: bool = False
    tokens: list[Token] = field(default_factory=list)
    end: FinishReason | None = None


def received(
    model: Loaded, items: Iterable[tuple[int, Item]], note: Callable[[Callable[[], str]], None]
) -> dict[int, News]:
    """Return what came for each sequence, by its id. Raises the ServerError that one of them ended in.

    `note` is called with a function that says how much of a prompt has been read.
    """
    came: dict[int, News] = {}
    for id_, item in items:
        if isinstance(item, Sampled):
            news = came.setdefault(id_, News())
            news.has_sampled = True
            if item.finish != "stop":  # the end token is not part of the answer
                news.tokens.append(_token(model, item))
            if item.finish is not None:
                news.end = "stop" if item.finish == "stop" else "length"
        elif isinstance(item, Prefilled):
            note(_reading(item))
            if item.done == item.total:
                came.setdefault(id_, News()).cached = item.cached
        elif isinstance(item, PromptScores):
            came.setdefault(id_, News()).scores += item.tokens
        elif isinstance(item, ServerError):
            raise item
    return came


def _reading(item: Prefilled) -> Callable[[], str]:
    return lambda: f"reading the prompt: {item.done} of {item.total} tokens"


def _token(model: Loaded, item: Sampled) -> Token:
    if item.logprob is None:
        return Token(item.token)
    top = tuple((*named(model, token), logprob) for token, logprob in item.top)
    return Token(item.token, TokenLogprob(*named(model, item.token), item.logprob, top))
