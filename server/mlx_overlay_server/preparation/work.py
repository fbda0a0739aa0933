"""The work of preparing a request. The functions take and return plain values, and run in the preparation processes."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat import prompt as chat
from mlx_overlay_server.chat.grammar import Budget, Constraint
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import Prompt
from mlx_overlay_server.chat.requests import AnyRequest, ChatRequest, TextRequest
from mlx_overlay_server.encoding.loaded import LoadedEncoder, Passage
from mlx_overlay_server.encoding.requests import EncodeRequest
from mlx_overlay_server.errors import Field, InvalidRequest, PromptTooLong
from mlx_overlay_server.settings import Limits


@dataclass(frozen=True, slots=True)
class Prepared:
    """One prompt of a request, ready for the engine. Each of the request's `n` answers continues it."""

    prompt: Prompt
    max_tokens: int
    """Tokens that an answer may have."""
    echo: str = ""
    """Text that the answers begin with."""
    constraint: Constraint | None = None
    """The grammar of the answers; whether it compiles has not been checked."""
    budget: Budget | None = None


MAX_SCORES = 100_000
"""The most log probabilities of prompt tokens that a request may ask for. So many are encoded in a fraction of a
second.
"""


def prepare(model: Loaded, request: AnyRequest, limits: Limits) -> list[Prepared]:
    """Turn a request into prompts: one for a conversation, one for each plain prompt. Raises InvalidRequest."""
    is_chat = isinstance(request, ChatRequest)
    prepared = [_chat(model, request, limits)] if isinstance(request, ChatRequest) else _text(model, request, limits)
    if (wanted := request.params.prompt_logprobs) is not None:
        field: Field = "messages" if is_chat else "prompts"
        if any(each.prompt.has_images for each in prepared):
            raise InvalidRequest("log probabilities of a prompt with images are not computed", field=field)
        count = sum(len(each.prompt.tokens) for each in prepared) * (1 + wanted) * request.n
        if count > MAX_SCORES:
            raise InvalidRequest(
                f"{count} log probabilities of the prompt's tokens are more than {MAX_SCORES}; send a shorter prompt, "
                "or ask for fewer alternatives",
                field=field,
            )
    return prepared


def count_tokens(model: Loaded, request: ChatRequest, limits: Limits) -> int:
    """Count the tokens of a conversation's prompt. Raises InvalidRequest."""
    return len(chat.render(model, request, _prompt_limit(model, request, limits)).tokens)


def check_grammar(model: Loaded, constraint: Constraint, limits: Limits) -> None:  # noqa: ARG001 - as all of these
    """Raise InvalidRequest for a grammar that does not compile. This takes as long as compiling it."""
    grammar.compiled(constraint, model)


def passages(model: LoadedEncoder, request: EncodeRequest, limits: Limits) -> tuple[Passage, ...]:
    """Return the texts of a request as a model that embeds or ranks reads them. Raises InvalidRequest."""
    from mlx_overlay_server.encoding import texts  # imported here, because a server that only chats does not need it

    return tuple(texts.read(model, request, limits))


WORK: dict[str, Callable[[Any, Any, Limits], Any]] = {
    each.__name__: each for each in (prepare, count_tokens, check_grammar, passages)
}
"""The functions that a preparation process runs, by their names."""


def _chat(model: Loaded, request: ChatRequest, limits: Limits) -> Prepared:
    if request.is_truncated and (limit := _prompt_limit(model, request, limits)) is not None:
        request = truncated(model, request, limit)
    prompt = chat.render(model, request, _prompt_limit(model, request, limits))
    return Prepared(
        prompt,
        _answer_limit(model, request, prompt.tokens, limits, "messages"),
        constraint=grammar.constraint(model, request, is_reasoning=prompt.is_reasoning),
        budget=grammar.budget(model, request, is_reasoning=prompt.is_reasoning),
    )


def truncated(model: Loaded, request: ChatRequest, limit: int) -> ChatRequest:
    """Return a request without its oldest turns, as many as must go for the prompt to leave room for an answer.

    `limit`: tokens that a prompt may have. The room is `max_tokens`, or without it a quarter of the limit; never more
    than half of it. System messages at the start stay, what is left begins with a user's message, and the last user's
    message and what follows it always stay. Raises InvalidRequest.
    """
    messages = request.messages
    first = next((at for at, turn in enumerate(messages) if turn.role != "system"), len(messages))
    starts = [first, *(at for at, turn in enumerate(messages) if at > first and turn.role == "user")]
    room = min(request.params.max_tokens or limit // 4, limit // 2)

    def fits(start: int) -> bool:
        left = replace(request, messages=(*messages[:first], *messages[start:]))
        try:
            return len(chat.render(model, left, limit).tokens) <= limit - room
        except PromptTooLong:
            return False

    if fits(first):
        return request
    # The fewer turns are left, the shorter the prompt, so a binary search finds the first start that fits.
    at = bisect.bisect_left(starts, 1, hi=len(starts) - 1, key=fits)
    return replace(request, messages=(*messages[:first], *messages[starts[at] :]))


def _text(model: Loaded, request: TextRequest, limits: Limits) -> list[Prepared]:
    made: list[Prepared] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            chat.check_unicode(prompt, "prompts")
            chat.check_length(model, prompt, _prompt_limit(model, request, limits), "prompts")
        tokens = tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        if any(not 0 <= token < model.vocab_size for token in tokens):
            raise InvalidRequest(f"tokens are numbers from 0 to {model.vocab_size - 1}", field="prompts")
        echo = (prompt if isinstance(prompt, str) else model.tokenizer.decode(list(tokens))) if request.echo else ""
        made.append(Prepared(Prompt(tokens), _answer_limit(model, request, tokens, limits, "prompts"), echo))
    return made


def _context(model: Loaded, request: AnyRequest) -> int | None:
    """Return how many tokens prompt and answer may have together; None: any number."""
    return min((each for each in (model.context, request.context) if each is not None), default=None)


def _prompt_limit(model: Loaded, request: AnyRequest, limits: Limits) -> int | None:
    """Return how many tokens a prompt may have; None: any number."""
    context = _context(model, request)
    known = [limits.prompt_tokens, context and context - 1]
    return min((limit for limit in known if limit is not None), default=None)


def _answer_limit(model: Loaded, request: AnyRequest, prompt: Sequence[int], limits: Limits, field: Field) -> int:
    """Return how many tokens an answer to a prompt may have. Raises InvalidRequest if the prompt leaves none."""
    size = len(prompt)
    if not size:
        raise InvalidRequest("the prompt is empty", field=field)
    limit = _prompt_limit(model, request, limits)
    if limit is not None and size > limit:
        raise PromptTooLong(f"prompt is too long: {size} tokens > {limit} maximum", field=field)
    if outside := [token for token in request.params.logit_bias if not 0 <= token < model.vocab_size]:
        raise InvalidRequest(
            f"{outside[0]} is not a token of {request.model}; they go from 0 to {model.vocab_size - 1}",
            field="logit_bias",
        )
    context = _context(model, request)
    room = context - size if context is not None else 1 << 30
    if request.params.max_tokens == 0:
        return 1  # the engine reads a prompt to its end by drawing the next token
    return min(request.params.max_tokens or limits.answer_tokens or room, room)
