"""The first events of an answer: its prompt as an echo and with log probabilities, where they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from mlx_overlay_server.chat.events import Event, PromptLogprobs, PromptToken, Started, Text
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine.commands import Scored
from mlx_overlay_server.preparation import Answer


def named(model: Loaded, token: int) -> tuple[str, bytes]:
    """Return a token's text and bytes."""
    data = model.token_bytes(token)
    return data.decode("utf-8", "replace"), data


def beginning(answer: Answer) -> list[Event]:
    """Return an answer's first events, once its prompt has been read."""
    events: list[Event] = [Started(len(answer.submit.prompt), answer.cached)]
    if answer.scored:
        events.append(PromptLogprobs(_as_in_text(answer.scored, answer.echo)))
    if answer.echo:
        events.append(Text(answer.echo))
    return events


def add_scored(model: Loaded, answer: Answer, scores: Sequence[Scored]) -> None:
    """Add the tokens of a prompt that have been read, with their log probabilities. The first token has none."""
    if answer.submit.params.prompt_logprobs is None:
        return
    first = len(answer.scored)
    given: Sequence[Scored | None] = scores if first else (None, *scores)
    name = functools.cache(functools.partial(named, model))
    for id_, score in zip(answer.submit.prompt[first:], given, strict=False):
        if score is None:
            answer.scored.append(PromptToken(id_, *name(id_), None))
            continue
        top = tuple((token, name(token)[0], logprob) for token, logprob in score.top)
        answer.scored.append(PromptToken(id_, *name(id_), score.logprob, score.rank, top))


def _as_in_text(tokens: Sequence[PromptToken], text: str) -> tuple[PromptToken, ...]:
    """Return tokens with the bytes that they stand for in the prompt's text, where there is a text.

    A mark that the tokenizer put before the text, and a space that decoders drop, stand for no bytes.
    """
    extra = sum(len(each.data) for each in tokens) - len(text.encode("utf-8", "replace")) if text else 0
    made: list[PromptToken] = []
    for each in tokens:
        made.append(each if extra <= 0 else replace(each, data=each.data[extra:]))
        extra -= len(each.data)
    return tuple(made)
