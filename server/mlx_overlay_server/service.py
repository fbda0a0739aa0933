"""The way of one request through the server: model, preparation, engine, events. Every dialect calls this."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hf_overlay import Task

from mlx_overlay_server import access, profiles
from mlx_overlay_server.chat import prompt as chat
from mlx_overlay_server.chat.events import Done, Event, FinishReason, Usage
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.requests import AnyRequest, ChatRequest, TextRequest
from mlx_overlay_server.encoding.loaded import AnyLoaded, LoadedEncoder
from mlx_overlay_server.encoding.requests import EmbedRequest, EncodeRequest
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import InvalidRequest, Overloaded, Unavailable, UnknownModel
from mlx_overlay_server.live import Live, Target
from mlx_overlay_server.memory import KvSize
from mlx_overlay_server.metrics import Metrics
from mlx_overlay_server.models.library import Library, Listed
from mlx_overlay_server.models.pool import Pool
from mlx_overlay_server.news import received
from mlx_overlay_server.preparation import Answer, Preparation
from mlx_overlay_server.recent import Recent, RequestRecord
from mlx_overlay_server.scores import add_scored, beginning
from mlx_overlay_server.settings import Limits, Settings
from mlx_overlay_server.speech.processes import Speech
from mlx_overlay_server.speech.values import LoadedSpeech, Piece, Sound, SpeechRequest, Transcript
from mlx_overlay_server.ticket import Ticket, stopped
from mlx_overlay_server.turns import Turns

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


R = TypeVar("R", bound=ChatRequest | TextRequest)
Batch = tuple[int, list[Event]]
"""Events of one answer: (index of the answer, its events in order)."""


class Encodings(NamedTuple):
    """The result of a request that embeds or ranks texts."""

    rows: npt.NDArray[np.float32]
    """For each text its vector; or one number, the logit of its score."""
    tokens: int
    """Tokens of all texts."""


class Service:
    """Lists models, answers requests and counts tokens, for all dialects."""

    def __init__(
        self,
        library: Library,
        pool: Pool,
        engine: Engine,
        metrics: Metrics,
        limits: Limits,
        preparation: Preparation,
        *,
        speech: Speech | None = None,
        live: Live | None = None,
        recent: Recent | None = None,
    ) -> None:
        """`live` holds the settings in force.

        `speech` runs the models that transcribe or speak; `recent` keeps records of requests. None: this service gets
        one of its own.
        """
        self.library = library
        self.pool = pool
        self.engine = engine
        self.metrics = metrics
        self.limits = limits
        self.live = live or Live(Settings())
        self.recent = recent or Recent()
        self.turns = Turns()
        self._preparation = preparation
        self._speech = speech or Speech(engine.options.load_seconds)
        self._open = 0
        self._is_closing = False

    @property
    def has_work(self) -> bool:
        """Whether a client waits for an answer."""
        return self._open > 0

    @property
    def open(self) -> int:
        """The number of requests that are admitted and have not ended."""
        return self._open

    @property
    def is_closing(self) -> bool:
        """Whether new requests are refused, because the server is stopping."""
        return self._is_closing

    async def entries(self) -> list[Listed]:
        """List every model once, under its own id."""
        return [self._sized(each) for each in await self.library.listed()]

    async def models(self) -> list[Listed]:
        """List every model that the request's key may use, under its id and its other names, sorted."""
        own = {each.id: each for each in await self.entries()}
        listed = {id_: each for id_, each in own.items() if access.may_use(id_)}
        for name in (*self.live.settings.profiles, *self.live.settings.aliases):
            target = self.live.target(name)
            source = self.live.source(target.id)
            if source in own and access.may_use(name, target.id, source):
                usable = target.profile.context if target.profile is not None else None
                listed[name] = own[source]._replace(id=name, usable=_least(own[source].usable, usable))
        return sorted(listed.values())

    async def model(self, model_id: str) -> Listed:
        """Find one model by its id or alias; the default model answers to other names. Raises ServerError."""
        listed = {each.id: each for each in await self.models()}
        if model_id in listed:
            return listed[model_id]
        default = self.default_model
        if default in listed and await self.library.known(model_id) is None:
            return listed[default]._replace(id=model_id)
        raise UnknownModel(f"there is no model {model_id!r} here; GET /v1/models lists what there is", field="model")

    def is_default(self, model_id: str) -> bool:
        """Return whether a model is the default: it answers requests with an unknown name or with none."""
        default = self.default_model
        return default is not None and self.live.source(self.live.target(default).id) == model_id

    def _sized(self, listed: Listed) -> Listed:
        """Return a row of the list with its usable tokens: those that fit in memory and in the server's limits."""
        shares = self.engine.stats.memory
        fits = shares.tokens(listed.nbytes, KvSize(listed.kv_bytes)) if shares is not None else None
        model = self.pool.model(listed.id)
        known = (model.context if model is not None else None, listed.context, fits, self.limits.prompt_tokens)
        return listed._replace(usable=_least(*known))

    @property
    def default_model(self) -> str | None:
        """The name of the model that answers requests with an unknown name, or with none."""
        return self.live.settings.default_model

    async def answer(self, request: AnyRequest, ticket: Ticket) -> AsyncGenerator[Batch]:
        """Generate the answers to a request, and yield their events as they come. Raises ServerError."""
        with self.recent.following(request.model, ticket) as record, self._admitted(request):
            async with AsyncExitStack() as held:
                async with ticket.stoppable():
                    request, record.model = await self._resolved(request, ticket)
                    model = _generating(request.model, await held.enter_async_context(self.pool.use(record.model)))
                    ticket.note = lambda: "reading the prompt"
                    answers = await self._preparation.answers(model, request)
                batches = self._run(model, answers, ticket, record)
                await held.enter_async_context(aclosing(batches))  # cancels before the model is released
                async for batch in batches:
                    yield batch

    async def encode(self, request: EncodeRequest, ticket: Ticket) -> Encodings:
        """Embed or rank the texts of a request. Raises ServerError."""
        task: Task = "embedding" if isinstance(request, EmbedRequest) else "reranker"
        with self.recent.following(request.model, ticket) as record, self._admitted(request):
            async with ticket.stoppable():
                record.model = (await self._target(request.model, ticket, task)).id
                async with self.pool.use(record.model) as model:
                    if not isinstance(model, LoadedEncoder) or model.task != task:
                        raise _wrong_task(request.model, model.task, task)
                    ticket.note = lambda: "reading texts"
                    passages = await self._preparation.passages(model, request)
                    rows = await self.engine.encode(model, passages)
            record.tokens_in = sum(len(passage.tokens) for passage in passages)
            self.metrics.texts.inc(len(passages))
            self.metrics.text_tokens.inc(record.tokens_in)
            return Encodings(rows, record.tokens_in)

    async def sound(
        self, request: SpeechRequest, ticket: Ticket, recording: AsyncIterator[bytes] | None = None
    ) -> AsyncGenerator[Piece]:
        """Yield the transcript of a recording, or a text as pieces of sound. Raises ServerError."""
        with self.recent.following(request.model, ticket) as record, self._admitted(request):
            async with AsyncExitStack() as held:
                async with ticket.stoppable():
                    record.model = (await self._target(request.model, ticket, request.task)).id
                    model = await held.enter_async_context(self.pool.use(record.model))
                    if not isinstance(model, LoadedSpeech) or model.task != request.task:
                        raise _wrong_task(request.model, model.task, request.task)
                ticket.note = lambda: "transcribing" if request.task == "transcription" else "speaking"
                made = await held.enter_async_context(aclosing(self._speech.run(model, request, recording)))
                while True:
                    async with ticket.stoppable():
                        piece = await anext(made, None)
                    if piece is None:
                        return
                    if isinstance(piece, Transcript):
                        self.metrics.heard_seconds.inc(piece.seconds)
                    elif isinstance(piece, Sound):
                        self.metrics.spoken_seconds.inc(piece.seconds)
                    yield piece

    async def count_tokens(self, request: ChatRequest, ticket: Ticket) -> int:
        """Count the tokens of a conversation's prompt. Raises ServerError."""
        with self._admitted(request):
            request, id_ = await self._resolved(request, ticket)
            async with self.pool.use(id_) as model:
                return await self._preparation.count_tokens(_generating(request.model, model), request)

    def close(self) -> None:
        """Refuse new requests from now on. Running ones go on."""
        self._is_closing = True
        self.turns.close()

    def start(self) -> None:
        """Start the engine and the preparation. Both get ready after this returns."""
        self.engine.start()
        self._preparation.start()

    def abort(self) -> None:
        """End every request that runs or waits. Its client gets an error."""
        self._preparation.abort()
        self._speech.abort()
        self.pool.abort()
        self.engine.abort()

    async def stop(self) -> None:
        """End the processes of the preparation, and of models that transcribe or speak."""
        await self._preparation.stop()
        await self._speech.stop()

    @contextmanager
    def _admitted(self, request: AnyRequest | EncodeRequest | SpeechRequest) -> Iterator[None]:
        """Take a place among the open requests. Raises InvalidRequest, Unavailable or Overloaded."""
        if isinstance(request, ChatRequest) and (count := len(request.messages)) > self.limits.messages:
            raise InvalidRequest(
                f"the conversation has {count} messages, and this server takes {self.limits.messages}: send fewer, or "
                "raise --max-messages",
                field="messages",
            )
        if self._is_closing:
            raise Unavailable("the server is shutting down")
        if self._open >= self.engine.options.batch_size + self.limits.waiting_requests:
            raise Overloaded(f"{self._open} requests are running or waiting already; try again later")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    async def _resolved(self, request: R, ticket: Ticket) -> tuple[R, str]:
        """Return a request with the values of its model's profile, and the name under which that model is loaded.

        Raises InvalidRequest, and Forbidden for a model that the request's key may not use.
        """
        target = await self._target(request.model, ticket, "text")
        return (request if target.profile is None else profiles.applied(target.profile, request)), target.id

    async def _target(self, name: str, ticket: Ticket, task: Task) -> Target:
        """Return what a request's name of a model stands for.

        Raises InvalidRequest, also for a model that does something else than `task` (it is not loaded for that), and
        Forbidden for a model that the request's key may not use.
        """
        chat.check_unicode(name, "model")
        target = self.live.target(name)
        model = self.pool.model(target.id)
        does = model.task if model is not None else None
        if does is None:
            id_ = self.live.source(target.id)
            known = await self.library.known(id_)
            if known is None and self.default_model is not None:
                target = self.live.target(self.default_model)
                known = await self.library.known(self.live.source(target.id))
            does = known.task if known is not None else None
            ticket.note = lambda: self.library.progress.get(id_) or f"loading {target.id}"
        access.check_model(name, target.id, self.live.source(target.id))
        if does not in (None, task):
            raise _wrong_task(name, does, task)
        return target

    async def _run(
        self, model: Loaded, answers: Sequence[Answer], ticket: Ticket, record: RequestRecord
    ) -> AsyncGenerator[Batch]:
        open_ = {answer.submit.id: (index, answer) for index, answer in enumerate(answers)}
        mailbox = self.engine.submit(answer.submit for answer in answers)
        ticket.on_stop = lambda: mailbox.put(answers[0].submit.id, stopped())
        has_tokens = False

        def note(said: Callable[[], str]) -> None:
            ticket.note = said

        try:
            while open_:
                if ticket.is_stopped:
                    raise stopped()
                came = received(model, await mailbox.take(), note)
                for id_, news in came.items():
                    if id_ not in open_:  # sampled before the cancellation arrived
                        continue
                    index, answer = open_[id_]
                    add_scored(model, answer, news.scores)
                    if news.cached is not None:
                        answer.cached = news.cached
                        record.tokens_in += len(answer.submit.prompt)
                        record.tokens_cached += news.cached
                        yield index, beginning(answer)
                    if not news.has_sampled:
                        continue
                    if not has_tokens:
                        has_tokens = True
                        ticket.note = lambda: "generating"
                        self.metrics.first_token.observe(time.monotonic() - ticket.started)
                    if answer.is_empty:
                        news.tokens, news.end = [], "length"
                    before = answer.reader.tokens
                    events = answer.reader.feed(news.tokens, news.end)
                    self.recent.count(record, ticket, answer.reader.tokens - before)
                    if answer.reader.reason is not None:
                        del open_[id_]
                        record.reason = answer.reader.reason
                        self.engine.cancel([id_])
                        events.append(self._done(answer, answer.reader.reason))
                    if events:
                        yield index, events
        finally:
            self.engine.cancel(open_)

    def _done(self, answer: Answer, reason: FinishReason) -> Done:
        reader, prompt = answer.reader, len(answer.submit.prompt)
        self.metrics.prompt_tokens.inc(prompt)
        self.metrics.cached_tokens.inc(answer.cached)
        self.metrics.cache_hits.inc(answer.cached > 0)
        self.metrics.completion_tokens.inc(reader.tokens)
        return Done(reason, Usage(prompt, answer.cached, reader.tokens, reader.reasoning_tokens), reader.stop_sequence)


def _generating(name: str, model: AnyLoaded) -> Loaded:
    """Return a model if it generates text. Raises InvalidRequest if not."""
    if not isinstance(model, Loaded):
        raise _wrong_task(name, model.task, "text")
    return model


_DOES: dict[Task, tuple[str, str]] = {
    "text": ("generates text", "/v1/chat/completions"),
    "embedding": ("embeds texts", "/v1/embeddings"),
    "reranker": ("ranks documents", "/v1/rerank"),
    "transcription": ("transcribes recordings", "/v1/audio/transcriptions"),
    "speech": ("speaks texts", "/v1/audio/speech"),
}
"""For each task: what such a model does, in words, and the route for it."""


def _wrong_task(name: str, does: Task, task: Task) -> InvalidRequest:
    words, place = _DOES[does]
    return InvalidRequest(
        f"{name} {words} and nothing else: send requests for it to {place}; for this one, GET /v1/models lists models "
        f"of the kind {task!r}",
        field="model",
        code="wrong_kind",
    )


async def gathered(batches: AsyncIterator[Batch], answers: int) -> list[list[Event]]:
    """Wait for all events of each of `answers` answers, for a response that is not streamed."""
    events: list[list[Event]] = [[] for _ in range(answers)]
    async for index, new in batches:
        events[index] += new
    return events


def _least(*numbers: int | None) -> int | None:
    """Return the least of the numbers that are known; None where none is."""
    return min((each for each in numbers if each is not None), default=None)
