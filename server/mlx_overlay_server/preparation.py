"""From a request to the sequences that answer it: prompt, grammar and limits, in a thread beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat import prompt as chat
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader
from mlx_overlay_server.chat.requests import AnyRequest, ChatRequest, Params, TextRequest
from mlx_overlay_server.engine.commands import Submit
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import Field, InvalidRequest, PromptTooLong
from mlx_overlay_server.settings import Limits


@dataclass(slots=True)
class Answer:
    """One answer of a request on its way: what the engine generates, and how its tokens become events."""

    submit: Submit
    reader: Reader
    echo: str = ""
    """Text that the answer begins with."""
    cached: int = 0
    """Tokens of the prompt that came from the KV cache; known once the prompt is read."""


class Preparation:
    """Renders templates, tokenizes and compiles grammars.

    It has one thread: tokenizers are not safe to call from several, and the work is bound by the CPU anyway.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, "preparation")

    async def answers(self, model: Loaded, request: AnyRequest) -> list[Answer]:
        """Prepare every answer of a request, in the order of their indexes. Raises InvalidRequest."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answers, model, request)

    async def count_tokens(self, model: Loaded, request: ChatRequest) -> int:
        """Count the tokens of a conversation's prompt. Raises InvalidRequest."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._count, model, request)

    def stop(self) -> None:
        """Let the thread end after what it is doing now."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # In the thread.

    def _answers(self, model: Loaded, request: AnyRequest) -> list[Answer]:
        return self._chat(model, request) if isinstance(request, ChatRequest) else self._text(model, request)

    def _count(self, model: Loaded, request: ChatRequest) -> int:
        return len(chat.render(model, request, self._prompt_limit(model)).tokens)

    def _chat(self, model: Loaded, request: ChatRequest) -> list[Answer]:
        prompt = chat.render(model, request, self._prompt_limit(model))
        rule = grammar.constraint(model, request, is_reasoning=prompt.is_reasoning)
        budget = grammar.budget(model, request, is_reasoning=prompt.is_reasoning)
        max_tokens = self._answer_limit(model, request, prompt.tokens, "messages")
        answers = []
        for number in range(request.n):
            submit = Submit(
                self._engine.new_id(),
                model.key,
                prompt.tokens,
                _seeded(request.params, number),
                max_tokens,
                system=prompt.system,
                constraint=rule,
                budget=budget,
                images=prompt.images,
                matcher=self._engine.matcher(rule, model) if rule is not None else None,
            )
            reader = Reader(
                model,
                stop=request.stop,
                is_reasoning=prompt.is_reasoning,
                tools=request.tools if request.choice.mode != "none" else (),
                is_parallel=request.choice.parallel,
                is_call=grammar.is_forced(request),
                continues_text=prompt.continues_text,
            )
            answers.append(Answer(submit, reader))
        return answers

    def _text(self, model: Loaded, request: TextRequest) -> list[Answer]:
        answers: list[Answer] = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                chat.check_unicode(prompt, "prompts")
                chat.check_length(model, prompt, self._prompt_limit(model), "prompts")
            tokens = tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
            if any(not 0 <= token < model.vocab_size for token in tokens):
                raise InvalidRequest(f"tokens are numbers from 0 to {model.vocab_size - 1}", field="prompts")
            echo = (prompt if isinstance(prompt, str) else model.tokenizer.decode(list(tokens))) if request.echo else ""
            max_tokens = self._answer_limit(model, request, tokens, "prompts")
            for _ in range(request.n):
                params = _seeded(request.params, len(answers))
                submit = Submit(self._engine.new_id(), model.key, tokens, params, max_tokens)
                reader = Reader(model, stop=request.stop, has_marks=False, continues_text=True)
                answers.append(Answer(submit, reader, echo))
        return answers

    def _prompt_limit(self, model: Loaded) -> int | None:
        """Return how many tokens a prompt may have; None: any number."""
        limits = [self._limits.prompt_tokens, model.context and model.context - 1]
        return min((limit for limit in limits if limit is not None), default=None)

    def _answer_limit(self, model: Loaded, request: AnyRequest, prompt: Sequence[int], field: Field) -> int:
        """Return how many tokens an answer to a prompt may have. Raises InvalidRequest if the prompt leaves none."""
        size = len(prompt)
        if not size:
            raise InvalidRequest("the prompt is empty", field=field)
        limit = self._prompt_limit(model)
        if limit is not None and size > limit:
            raise PromptTooLong(f"prompt is too long: {size} tokens > {limit} maximum", field=field)
        if outside := [token for token in request.params.logit_bias if not 0 <= token < model.vocab_size]:
            raise InvalidRequest(
                f"{outside[0]} is not a token of {request.model}; they go from 0 to {model.vocab_size - 1}",
                field="logit_bias",
            )
        room = model.context - size if model.context is not None else 1 << 30
        return min(request.params.max_tokens or self._limits.answer_tokens or room, room)


def _seeded(params: Params, number: int) -> Params:
    """Give each answer of a seeded request a seed of its own."""
    return params if params.seed is None else replace(params, seed=params.seed + number)
