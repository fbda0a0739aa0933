"""Turns a request into the sequences that answer it: prompt, grammar and limits, worked out in processes of their own.

Templates, tokenizers, image decoders and grammar compilers cannot be interrupted, and a request can make each of them
run for minutes. A process can be killed: when its client leaves, when its time is over, and when the server stops.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mlx_overlay_server.chat import grammar
from mlx_overlay_server.chat.events import PromptToken
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.reader import Reader
from mlx_overlay_server.chat.requests import AnyRequest, ChatRequest, Params
from mlx_overlay_server.encoding.loaded import LoadedEncoder, Passage
from mlx_overlay_server.encoding.requests import EmbedRequest, EncodeRequest
from mlx_overlay_server.engine.commands import Submit
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import Failed, Field, InvalidRequest, ServerError, Unavailable
from mlx_overlay_server.preparation.grammars import Grammars
from mlx_overlay_server.preparation.lanes import READ_TOKENIZER, Lanes, Work
from mlx_overlay_server.preparation.work import Prepared
from mlx_overlay_server.preparer import Process
from mlx_overlay_server.settings import Limits
from mlx_overlay_server.turns import turn

logger = logging.getLogger("mlx_overlay_server")

HEAVY_BYTES = 1 << 18
"""A request of this many bytes of text and schemas is expected to be slow, as is every request with an image."""
HEAVY_GRAMMAR = 1 << 14
"""A grammar of this many characters is expected to be slow. A schema of 500 properties has as many."""


_PICKLE_DEPTH = 10_000


@dataclass(slots=True)
class Answer:
    """One answer of a request: what the engine is to generate, and how its tokens become events."""

    submit: Submit
    reader: Reader
    echo: str = ""
    """Text that the answer begins with."""
    cached: int = 0
    """Tokens of the prompt that came from the KV cache; known once the prompt has been read."""
    scored: list[PromptToken] = field(default_factory=list)
    """The prompt's tokens that have been read, with log probabilities; empty where nobody asked for them."""

    @property
    def is_empty(self) -> bool:
        """Whether the request wants only its prompt read. The engine draws a token all the same."""
        return self.submit.params.max_tokens == 0


class Preparation:
    """Renders templates, decodes images, tokenizes and compiles grammars. Call its methods on the event loop."""

    def __init__(self, engine: Engine, limits: Limits, first: Process | None = None) -> None:
        """`first`: a process that has been started already."""
        self._engine = engine
        self._limits = limits
        self._lanes = Lanes(limits.preparation_seconds, first)
        self._grammars = Grammars()
        self._known: dict[str, weakref.finalize[..., Loaded | LoadedEncoder]] = {}
        """For each model that the lanes know, by its key: the finalizer that lets them forget it after it was unloaded.
        """

    def start(self) -> None:
        """Start the processes, and return while they import what they need."""
        self._loop = asyncio.get_running_loop()
        self._lanes.start()

    def abort(self) -> None:
        """Stop all preparation; its clients get an error."""
        self._lanes.abort()

    async def stop(self) -> None:
        """Stop all preparation, and end the processes."""
        for each in self._known.values():
            each.detach()
        await self._lanes.stop()

    def read_tokenizer(self, key: str, path: str, options: Mapping[str, Any], end_tokens: Any) -> bytes:
        """Read a model's tokenizer in a process. This is a `ReadTokenizer`; any other thread may call it."""
        arguments = pickle.dumps((path, options, end_tokens))
        return asyncio.run_coroutine_threadsafe(self._read_tokenizer(key, arguments), self._loop).result()

    async def _read_tokenizer(self, key: str, arguments: bytes) -> bytes:
        seconds = self._engine.options.load_seconds
        work = Work(READ_TOKENIZER, key, arguments, lambda: _unread(seconds), is_slow=False, seconds=seconds)
        data: bytes = (await self._lanes.run(work)).value
        return data

    async def answers(self, model: Loaded, request: AnyRequest) -> list[Answer]:
        """Prepare every answer of a request, in the order of their indexes.

        Raises InvalidRequest, also when that takes too long, and Failed.
        """
        field: Field = "messages" if isinstance(request, ChatRequest) else "prompts"
        prepared: list[Prepared] = await self._run("prepare", model, request, field)
        answers: list[Answer] = []
        for each in prepared:
            matchers = await self._matchers(model, each, request.n)
            for number in range(request.n):
                submit = Submit(
                    self._engine.new_id(),
                    model.key,
                    each.prompt.tokens,
                    _seeded(request.params, len(answers)),
                    each.max_tokens,
                    system=each.prompt.system,
                    constraint=each.constraint,
                    budget=each.budget,
                    images=each.prompt.images,
                    shown=each.prompt.shown,
                    matcher=matchers[number],
                )
                answers.append(Answer(submit, _reader(model, request, each), each.echo))
        return answers

    async def count_tokens(self, model: Loaded, request: ChatRequest) -> int:
        """Count the tokens of a conversation's prompt. Raises what `answers` raises."""
        count: int = await self._run("count_tokens", model, request, "messages")
        return count

    async def passages(self, model: LoadedEncoder, request: EncodeRequest) -> tuple[Passage, ...]:
        """Prepare the texts of a request for a model that embeds or ranks, in their order.

        Raises what `answers` raises.
        """
        field: Field = "texts" if isinstance(request, EmbedRequest) else "documents"
        made: tuple[Passage, ...] = await self._run("passages", model, request, field)
        return made

    async def _matchers(self, model: Loaded, prepared: Prepared, count: int) -> Sequence[Any]:
        constraint = prepared.constraint
        if constraint is None:
            return [None] * count
        grammar_ = await self._grammars.get(
            (model.key, constraint.grammar),
            check=lambda: self._run("check_grammar", model, constraint, constraint.field or "format"),
            make=lambda: grammar.compiled(constraint, model),
        )
        return await asyncio.to_thread(self._engine.matchers, constraint, model, grammar_, count)

    async def _run(self, name: str, model: Loaded | LoadedEncoder, subject: Any, field: Field) -> Any:
        """Run one of the functions of `work.WORK` in a process."""
        await self._teach(model)
        await turn()
        arguments = _pickled((subject, self._limits))
        await turn()
        heavy = HEAVY_GRAMMAR if name == "check_grammar" else HEAVY_BYTES
        is_slow = len(arguments) > heavy or (isinstance(subject, ChatRequest) and subject.has_images)
        work = Work(name, model.key, arguments, lambda: self._too_slow(field), is_slow)
        result = await self._lanes.run(work)
        if result.refusal is not None:
            raise result.refusal
        if result.unexpected is not None:
            logger.error("unexpected %s in preparation", result.unexpected)
            raise Failed(
                f"unexpected {result.unexpected.partition(' ')[0]}; the server's log says where", code="internal_error"
            )
        return result.value

    async def _teach(self, model: Loaded | LoadedEncoder) -> None:
        """Make a model known to the processes, which forget it after it was unloaded."""
        if model.key in self._known:
            return
        try:
            data = await asyncio.to_thread(pickle.dumps, _without_tokenizer(model), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # noqa: BLE001 - tokenizers are code that may come with the model
            raise Failed(f"the model's tokenizer cannot be copied to another process: {type(error).__name__}") from None
        if model.key not in self._known:
            forget = partial(asyncio.get_running_loop().call_soon_threadsafe, self._forget, model.key)
            self._known[model.key] = weakref.finalize(model, forget)
            self._known[model.key].atexit = False
            self._lanes.learn(model.key, data, b"" if isinstance(model, LoadedEncoder) else model.whole)

    def _forget(self, key: str) -> None:
        self._known.pop(key, None)
        self._lanes.forget(key)
        self._grammars.forget(key)

    def _too_slow(self, field: Field) -> ServerError:
        what = "this schema is" if field in ("format", "tools") else "this request is"
        return InvalidRequest(
            f"{what} too expensive: preparing it takes more than {self._limits.preparation_seconds:g} seconds, the "
            "limit of this server; send a smaller one",
            field=field,
            code="too_expensive",
        )


def _without_tokenizer(model: Loaded | LoadedEncoder) -> Loaded | LoadedEncoder:
    """Return a model without the part of its tokenizer for answers, which a process replaces by the whole tokenizer."""
    if isinstance(model, LoadedEncoder) or not model.whole:
        return model
    nothing: Any = None
    return replace(model, tokenizer=nothing, detokenizer=nothing, make_grammar_tokenizer=nothing, whole=b"")


def _unread(seconds: float) -> ServerError:
    return Unavailable(
        f"the model cannot be loaded: its tokenizer could not be read within {seconds:g} s; look at the disk, or raise "
        "--load-seconds",
        code="model_load_failed",
    )


def _pickled(value: object) -> bytes:
    """Pickle a request.

    Its JSON may be nested a thousand levels deep, as deep as the parser allows, and pickling recurses a few times for
    each level. So the limit on recursion is raised meanwhile.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _PICKLE_DEPTH))
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    finally:
        sys.setrecursionlimit(limit)


def _reader(model: Loaded, request: AnyRequest, prepared: Prepared) -> Reader:
    least = request.params.min_tokens
    if not isinstance(request, ChatRequest):
        return Reader(model, stop=request.stop, has_marks=False, continues_text=True, min_tokens=least)
    return Reader(
        model,
        stop=request.stop,
        is_reasoning=prepared.prompt.is_reasoning,
        tools=request.tools if request.choice.mode != "none" else (),
        is_parallel=request.choice.parallel,
        is_call=grammar.is_forced(request),
        is_formatted=request.format is not None,
        continues_text=prepared.prompt.continues_text,
        min_tokens=least,
    )


def _seeded(params: Params, number: int) -> Params:
    """Give each answer of a request with a seed a seed of its own."""
    return params if params.seed is None else replace(params, seed=params.seed + number)
