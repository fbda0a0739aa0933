"""One request from its dialect to its events: model, prompt, engine, and back. Every dialect calls this alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat import prompt as chat
from mlx_overlay_server.chat.events import Done, Event, FinishReason, Started, Text, TokenLogprob, Usage
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader, Token
from mlx_overlay_server.chat.requests import ChatRequest, Request, TextRequest
from mlx_overlay_server.engine.commands import Item, Prefilled, Sampled, Submit
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import InvalidRequest, Overloaded, PromptTooLong, Unavailable, UnknownModel
from mlx_overlay_server.metrics import Metrics
from mlx_overlay_server.models.library import Library, Listed
from mlx_overlay_server.models.pool import Pool
from mlx_overlay_server.settings import Limits

R = TypeVar("R")


@dataclass(slots=True)
class Ticket:
    """What a request is waiting for, for whoever keeps its client patient."""

    started: float = field(default_factory=time.monotonic)
    note: Callable[[], str] = lambda: "waiting"


Batch = tuple[int, list[Event]]
"""Events of one choice: (its index, some of its events)."""


class _Job(NamedTuple):
    """One choice, ready for the engine."""

    submit: Submit
    reader: Reader
    echo: str = ""


class Service:
    """What the server does, apart from how it is asked and answered."""

    def __init__(
        self,
        library: Library,
        pool: Pool,
        engine: Engine,
        metrics: Metrics,
        limits: Limits,
        *,
        aliases: Mapping[str, str] | None = None,
        default_model: str | None = None,
    ) -> None:
        """`aliases`: names that clients insist on -> ids; `default_model` answers to names that are not known."""
        self.library = library
        self.pool = pool
        self.engine = engine
        self.metrics = metrics
        self.limits = limits
        self.aliases = aliases or {}
        self._default = default_model
        # One thread: tokenizers are not safe to call from several, and the work is the processor's anyway.
        self._worker = ThreadPoolExecutor(1, "tokenizer")
        self._open = 0
        self._is_closing = False

    # Asked by dialects ---------------------------------------------------------------------------------------

    async def models(self) -> list[Listed]:
        """Every model there is, aliases included, sorted by id."""
        listed = {each.id: each for each in await self.library.listed()}
        for alias, id_ in self.aliases.items():
            if id_ in listed:
                listed.setdefault(alias, Listed(alias, listed[id_].created))
        return sorted(listed.values())

    async def model(self, model_id: str) -> Listed:
        """One of them. Raises UnknownModel."""
        for each in await self.models():
            if each.id == model_id:
                return each
        raise UnknownModel(f"there is no model {model_id!r} here; GET /v1/models lists what there is", param="model")

    async def chat(self, request: ChatRequest, ticket: Ticket) -> AsyncIterator[Batch]:
        """The answers to a conversation, as they come. Raises ServerError."""
        self._check_messages(request)
        async for batch in self._answer(request, ticket, lambda model: self._chat_jobs(model, request)):
            yield batch

    async def complete(self, request: TextRequest, ticket: Ticket) -> AsyncIterator[Batch]:
        """The continuations of plain prompts, as they come. Raises ServerError."""
        async for batch in self._answer(request, ticket, lambda model: self._text_jobs(model, request)):
            yield batch

    async def count_tokens(self, request: ChatRequest, ticket: Ticket) -> int:
        """How many tokens a conversation's prompt has. Raises ServerError."""
        self._check_messages(request)
        with self._admitted():
            async with self.pool.use(await self._resolved(request.model, ticket)) as model:
                prompt = await self._in_worker(lambda: chat.render(model, request, self._limit(model)))
                return len(prompt.tokens)

    def close(self) -> None:
        """Take no more requests. Those that run go on."""
        self._is_closing = True

    def abort(self) -> None:
        """End what still runs or waits; its clients are told."""
        self.pool.abort()
        self.engine.abort()

    def stop(self) -> None:
        """Free what the service holds."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    # One request ---------------------------------------------------------------------------------------------

    async def _answer(
        self, request: Request, ticket: Ticket, prepare: Callable[[Loaded], list[_Job]]
    ) -> AsyncIterator[Batch]:
        with self._admitted():
            async with self.pool.use(await self._resolved(request.model, ticket)) as model:
                ticket.note = lambda: "reading the prompt"
                jobs = await self._in_worker(lambda: prepare(model))
                async for batch in self._run(model, jobs, ticket):
                    yield batch

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """A place among the open requests. Raises Unavailable or Overloaded."""
        if self._is_closing:
            raise Unavailable("the server is shutting down")
        if self._open >= self.engine.options.batch_size + self.limits.waiting_requests:
            raise Overloaded(f"{self._open} requests are running or waiting already; try again later")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def _check_messages(self, request: ChatRequest) -> None:
        if (count := len(request.messages)) > self.limits.messages:
            raise InvalidRequest(f"{count} messages are more than {self.limits.messages}", param="messages")

    async def _resolved(self, name: str, ticket: Ticket) -> str:
        """The id that a request's model name stands for. Raises InvalidRequest."""
        chat.check_unicode(name, "model")
        id_ = self.aliases.get(name, name)
        if not self.pool.is_resident(id_):
            if self._default is not None and not await self.library.is_known(id_):
                id_ = self._default
            ticket.note = lambda: self.library.progress.get(id_) or f"loading {id_}"
        return id_

    async def _run(self, model: Loaded, jobs: list[_Job], ticket: Ticket) -> AsyncIterator[Batch]:
        mailbox, ids = self.engine.submit(model, [job.submit for job in jobs])
        open_ = set(range(len(jobs)))
        cached = [0] * len(jobs)
        has_tokens = False
        try:
            while open_:
                came = _sorted(model, await mailbox.take(), ticket)
                for number, reused in came.begun.items():
                    cached[number] = reused
                    started: list[Event] = [Started(len(jobs[number].submit.prompt), reused)]
                    yield number, started + ([Text(jobs[number].echo)] if jobs[number].echo else [])
                if came.tokens and not has_tokens:
                    has_tokens = True
                    ticket.note = lambda: "generating"
                    self.metrics.first_token.observe(time.monotonic() - ticket.started)
                for number in came.tokens.keys() & open_:
                    reader = jobs[number].reader
                    events = reader.feed(came.tokens[number], came.ends.get(number))
                    if reader.reason is not None:
                        open_.remove(number)
                        self.engine.cancel([ids[number]])
                        events.append(self._done(jobs[number], cached[number]))
                    if events:
                        yield number, events
        finally:
            self.engine.cancel(ids)

    def _done(self, job: _Job, cached: int) -> Done:
        reader, prompt = job.reader, len(job.submit.prompt)
        self.metrics.prompt_tokens.inc(prompt)
        self.metrics.cached_tokens.inc(cached)
        self.metrics.cache_hits.inc(cached > 0)
        self.metrics.completion_tokens.inc(reader.tokens)
        assert reader.reason is not None  # noqa: S101 - for the type checker
        return Done(reader.reason, Usage(prompt, cached, reader.tokens, reader.reasoning_tokens), reader.stop_sequence)

    async def _in_worker(self, function: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)

    # Preparing, in the worker's thread -----------------------------------------------------------------------

    def _chat_jobs(self, model: Loaded, request: ChatRequest) -> list[_Job]:
        prompt = chat.render(model, request, self._limit(model))
        rule = grammar.constraint(model, request, is_reasoning=prompt.is_reasoning)
        limit = grammar.budget(model, request, is_reasoning=prompt.is_reasoning)
        jobs = []
        for number in range(request.n):
            submit = self._submit(model, request, prompt.tokens, number)
            submit = replace(submit, system=prompt.system, images=prompt.images, constraint=rule, budget=limit)
            if rule is not None:
                submit = replace(submit, matcher=self.engine.matcher(rule, model))
            reader = Reader(
                model,
                stop=request.stop,
                is_reasoning=prompt.is_reasoning,
                tools=request.tools if request.choice.mode != "none" else (),
                is_parallel=request.choice.parallel,
                is_call=grammar.is_forced(request),
            )
            jobs.append(_Job(submit, reader))
        return jobs

    def _text_jobs(self, model: Loaded, request: TextRequest) -> list[_Job]:
        jobs: list[_Job] = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                chat.check_unicode(prompt, "prompt")
                chat.check_length(model, prompt, self._limit(model), "prompt")
            tokens = tuple(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
            if any(not 0 <= token < model.vocab_size for token in tokens):
                raise InvalidRequest(f"tokens are numbers from 0 to {model.vocab_size - 1}", param="prompt")
            echo = (prompt if isinstance(prompt, str) else model.tokenizer.decode(list(tokens))) if request.echo else ""
            for _ in range(request.n):
                submit = self._submit(model, request, tokens, len(jobs))
                jobs.append(_Job(submit, Reader(model, stop=request.stop, has_marks=False), echo))
        return jobs

    def _limit(self, model: Loaded) -> int | None:
        """Tokens that a prompt may have."""
        limits = [each for each in (self.limits.prompt_tokens, model.context and model.context - 1) if each is not None]
        return min(limits, default=None)

    def _submit(self, model: Loaded, request: Request, tokens: Sequence[int], number: int) -> Submit:
        """A choice for the engine, within the limits. Raises InvalidRequest."""
        params = request.params
        where = "prompt" if isinstance(request, TextRequest) else "messages"
        size = len(tokens)
        if not size:
            raise InvalidRequest("the prompt is empty", param=where)
        limit = self._limit(model)
        if limit is not None and size > limit:
            raise PromptTooLong(f"prompt is too long: {size} tokens > {limit} maximum", param=where)
        if outside := [token for token in params.logit_bias if not 0 <= token < model.vocab_size]:
            raise InvalidRequest(f"{outside[0]} is no token of {request.model}", param="logit_bias")
        room = model.context - size if model.context is not None else 1 << 30
        wanted = params.max_tokens or self.limits.answer_tokens or room
        if params.seed is not None:
            params = replace(params, seed=params.seed + number)
        return Submit(0, model.key, tuple(tokens), params, min(wanted, room))


async def gathered(batches: AsyncIterator[Batch], choices: int) -> list[list[Event]]:
    """All events of each choice: for answers that are not streamed."""
    events: list[list[Event]] = [[] for _ in range(choices)]
    async for number, new in batches:
        events[number] += new
    return events


class _Came(NamedTuple):
    """What the engine has sent for the choices of a request, by their numbers."""

    begun: dict[int, int]
    """Prompts that are in the KV cache now: how many of their tokens were before."""
    tokens: dict[int, list[Token]]
    ends: dict[int, FinishReason]


def _sorted(model: Loaded, items: Iterable[tuple[int, Item]], ticket: Ticket) -> _Came:
    """Sort what came by choice. Raises what the engine tells of one."""
    came = _Came({}, {}, {})
    for number, item in items:
        if isinstance(item, Sampled):
            tokens = came.tokens.setdefault(number, [])
            if item.finish != "stop":  # the end mark is no part of the answer
                tokens.append(_token(model, item))
            if item.finish is not None:
                came.ends[number] = "stop" if item.finish == "stop" else "length"
        elif isinstance(item, Prefilled):
            ticket.note = _reading(item)
            if item.done == item.total:
                came.begun[number] = item.cached
        else:
            raise item
    return came


def _reading(item: Prefilled) -> Callable[[], str]:
    return lambda: f"reading the prompt: {item.done} of {item.total} tokens"


def _token(model: Loaded, item: Sampled) -> Token:
    if item.logprob is None:
        return Token(item.token)

    def named(token: int) -> tuple[str, bytes]:
        data = model.token_bytes(token)
        return data.decode("utf-8", "replace"), data

    top = tuple((*named(token), logprob) for token, logprob in item.top)
    return Token(item.token, TokenLogprob(*named(item.token), item.logprob, top))


def status(service: Service) -> dict[str, Any]:
    """For `/health`."""
    engine = service.engine
    stats = engine.stats
    if engine.failure is not None:
        state = "failed"
    elif not stats.is_alive:
        state = "starting"
    else:
        state = "loading" if service.pool.loading else "ready"
    return {
        "status": state,
        "loaded": service.pool.resident,
        "loading": service.pool.loading,
        "engine": {
            "active": stats.active,
            "waiting": stats.waiting,
            "failures": stats.failures,
            "last_failure": engine.failure or stats.last_failure,
        },
    }
