"""Loads a model slice by slice, so that the sequences of other models go on meanwhile."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from hf_overlay.mounts import may_hang
from hf_overlay.patience import NoAnswer, Patience
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.processors import load_processor
from mlx_lm.utils import load_adapters, load_model, sharded_load

from mlx_overlay_server.chat.loaded import Loaded, context_length
from mlx_overlay_server.engine import folder, looking, mlx, mlx_tokenizers, tokenizers, vision
from mlx_overlay_server.engine.commands import Load, ReadTokenizer
from mlx_overlay_server.engine.disk.identity import identity
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.runner import Runner
from mlx_overlay_server.engine.seen import KEPT_BYTES
from mlx_overlay_server.errors import Unavailable
from mlx_overlay_server.memory import GROWTH, LEAST_TOKENS, Cost, KvSize, Shares, advice
from mlx_overlay_server.settings import EngineOptions

logger = logging.getLogger("mlx_overlay_server")

T = TypeVar("T")

SLICE_BYTES = 1 << 28
"""Bytes of weights that are read before other models make a step."""


def load(
    command: Load,
    options: EngineOptions,
    group: Any,
    prefixes: PrefixCache,
    shares: Shares | None = None,
    read_tokenizer: ReadTokenizer | None = None,
) -> Generator[Runner | int | None, None, None]:
    """Load a model in steps: yield the bytes of each slice of weights, and at the end the runner.

    It yields None while it waits for something, so that other models can make steps. `shares` says how the memory is
    divided. `read_tokenizer` reads the model's tokenizer in another process; None: it is read in this one.

    Raises what mlx-lm raises, Unsuitable for a folder that must not be loaded, and TimeoutError for a part that takes
    too long.
    """
    path = Path(command.path)
    identities: list[str] = []
    config_extra = {"trust_remote_code": options.trust_remote_code}
    draft = None
    checking = apart(partial(check, command, options))
    if group is not None:  # the ranks must make equally many steps, so this does not yield while it waits
        wait([checking])
        checking.result()
        model, tokenizer, config = sharded_load(
            command.path,
            pipeline_group=group if options.is_pipeline else None,
            tensor_group=None if options.is_pipeline else group,
            return_config=True,
            tokenizer_config=config_extra,
            trust_remote_code=options.trust_remote_code,
        )
        read = tokenizers.described(tokenizer)
    else:
        yield from turns(checking, math.inf)
        identities = checking.result()
        only_reads = command.adapter_path or command.draft_path or options.kv_bits
        seeing = apart(lambda: not only_reads and vision.is_for(command.path))
        yield from turns(seeing, options.load_seconds)
        if result(seeing, options):
            model, config = vision.load(command.path)
            logger.info("%s runs with mlx-vlm, for images: it answers one request after the other, not a batch", path)
        else:
            model, config = load_model(path, lazy=True, trust_remote_code=options.trust_remote_code)
        if command.adapter_path is not None:
            model = load_adapters(model, command.adapter_path)
            model.eval()
        if command.draft_path is not None:
            draft, _ = load_model(Path(command.draft_path), lazy=True, trust_remote_code=options.trust_remote_code)
        _check_quantised((model, draft), options)
        nbytes, kv = _sizes((model, draft), options)
        if shares is not None and not shares.has_room(nbytes, kv, context_length(config)):
            raise _no_room(nbytes, kv, shares)
        end_tokens = folder.end_tokens(config.get("eos_token_id"), path)
        reading = apart(partial(_read_tokenizer, read_tokenizer, command, config_extra, end_tokens))
        for part in slices([model, *([draft] if draft is not None else [])]):
            mx.eval(part)
            yield sum(each.nbytes for each in part)
        yield from turns(reading, options.load_seconds)
        read = result(reading, options)
    vocab_size = _vocab_size(config, read.tokenizer)
    nbytes, kv = _sizes((model, draft), options)
    cost, limit = (mlx.cost(config), shares.computing) if shares is not None else (Cost(), 0)
    is_seeing = isinstance(model, vision.SeeingModel)
    loaded = Loaded(
        key=command.key,
        path=command.path,
        tokenizer=read.tokenizer,
        marks=read.marks,
        detokenizer=partial(mlx_tokenizers.detokenizer, read.tokenizer),
        make_grammar_tokenizer=partial(mlx_tokenizers.grammar_tokenizer, read.tokenizer, vocab_size),
        letter=read.letter,
        whole=read.whole,
        longest_token=read.longest_token,
        nbytes=nbytes,
        vocab_size=vocab_size,
        context=fitting(context_length(config), shares.tokens(nbytes, kv) if shares is not None else None, path),
        kv=kv,
        defaults=folder.sampling_defaults(path),
        has_own_calls=read.has_own_calls,
        processor=None if group is not None or is_seeing else load_processor(model, config),
        vision=vision.processor(command.path, config) if is_seeing else None,
    )
    if prefixes.disk is not None and identities and not is_seeing:
        models = [model] if draft is None else [model, draft]
        prefixes.disk.register(
            command.key,
            identities,
            lambda: [layer for each in models for layer in make_prompt_cache(each)],
            bits=options.kv_bits,
            group_size=options.kv_group_size,
            start=options.quantized_kv_start,
        )
    yield Runner(
        loaded,
        model,
        draft,
        options,
        prefixes,
        fits=lambda context: cost.tokens(context, limit),
        look=looking.look(
            config, mlx.cost(looking.vision_shape(config)), whole=mlx.cost(config) if is_seeing else Cost()
        ),
        group=group,
    )


def check(command: Load, options: EngineOptions) -> list[str]:
    """Check all files that a load opens, and read weights ahead from disks that may stop answering.

    Returns the identities of the model, the adapter and the draft model, which name their KV caches on disk. A disk
    that hangs holds up only the thread that this runs in. Raises TimeoutError after `load_seconds` without progress.
    """
    patience = Patience(options.load_seconds)
    paths = (command.path, command.adapter_path, command.draft_path)
    try:
        for path in filter(None, paths):
            patience.ask(path, partial(folder.check, path))
            if may_hang(path):
                patience.ask(path, partial(folder.read_ahead, path))
        return [patience.ask(path, partial(identity, path)) if path is not None else "" for path in paths]
    except NoAnswer:
        raise _no_progress(options) from None


def _read_tokenizer(
    elsewhere: ReadTokenizer | None, command: Load, options: Mapping[str, Any], end_tokens: Any
) -> tokenizers.Read:
    if elsewhere is None:
        return tokenizers.read_here(command.path, options, end_tokens)
    return tokenizers.received(elsewhere(command.key, command.path, options, end_tokens))


def apart(work: Callable[[], T]) -> Future[T]:
    """Run a function that may never return, in a daemon thread that nothing waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it; some of it calls sys.exit
            future.set_exception(error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return future


def turns(future: Future[Any], seconds: float) -> Iterator[None]:
    """Yield None until a future is done, or for some seconds."""
    deadline = time.monotonic() + seconds
    while not wait([future], timeout=0.005).done and time.monotonic() < deadline:
        yield None


def result(future: Future[T], options: EngineOptions) -> T:
    """Return a future's result. Raises what the function raised, and TimeoutError if it has not returned yet."""
    if not future.done():
        raise _no_progress(options)
    return future.result()


def _no_progress(options: EngineOptions) -> TimeoutError:
    seconds = f"{options.load_seconds:g} s"
    return TimeoutError(f"its files could not be read within {seconds}; look at the disk, or raise --load-seconds")


def parameters(model: Any) -> list[mx.array]:
    return [value for _, value in tree_flatten(model.parameters())]


def _sizes(models: Iterable[Any], options: EngineOptions) -> tuple[int, KvSize]:
    """Return the bytes of models' weights, and what a sequence takes in their KV caches. Computes nothing.

    What a model that sees keeps of images counts as weights, whether it is there or not.
    While a batch grows, MLX copies the KV cache of one layer after the other: room for one copy is part of the latter.
    """
    nbytes, kv = 0, KvSize()
    for each in models:
        if each is not None:
            nbytes += sum(part.nbytes for part in parameters(each))
            nbytes += KEPT_BYTES if isinstance(each, vision.SeeingModel) else 0
            size = mlx.kv_size(
                each, bits=options.kv_bits, group_size=options.kv_group_size, start=options.quantized_kv_start
            )
            kv = kv.beside(size.with_copy(len(make_prompt_cache(each))))
    return nbytes, kv


def _check_quantised(models: Iterable[Any], options: EngineOptions) -> None:
    """Raise Unavailable if KV caches are to be quantised, and those of a model cannot be."""
    if options.kv_bits is None:
        return
    for each in models:
        if each is None:
            continue
        why = mlx.why_not_quantised(each, bits=options.kv_bits, group_size=options.kv_group_size)
        if why is not None:
            raise Unavailable(
                f"the model's KV caches cannot be quantised: {why} Set another kv_group_size than "
                f"{options.kv_group_size}, or kv_bits = 0 in a profile for this model",
                code="kv_not_quantisable",
            )


def _no_room(nbytes: int, kv: KvSize, shares: Shares) -> Unavailable:
    needed = (nbytes + kv.nbytes(LEAST_TOKENS + GROWTH)) / 1e9
    return Unavailable(
        f"the model needs {needed:.2f} GB, for its weights and one sequence of {LEAST_TOKENS} tokens, and "
        f"may have {shares.held / 1e9:.2f} GB; {advice()}",
        code="model_too_large",
    )


def slices(models: Iterable[Any]) -> Iterator[list[mx.array]]:
    part: list[mx.array] = []
    size = 0
    for model in models:
        for value in parameters(model):
            part.append(value)
            size += value.nbytes
            if size >= SLICE_BYTES:
                yield part
                part, size = [], 0
    yield part


def _vocab_size(config: dict[str, Any], tokenizer: Any) -> int:
    """Return how many columns the model's logits have."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return int(size or len(tokenizer))


def fitting(context: int | None, fits: int | None, path: Path) -> int | None:
    """Return the number of tokens that fit in memory if that is less than a model's context, else the context.

    None: neither is known.
    """
    if context is None or fits is None or fits >= context:
        return context if context is not None else fits
    logger.warning("%s: there is memory for %d tokens, of the %d that the model's context has", path, fits, context)
    return fits
