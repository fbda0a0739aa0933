"""Loads a model that embeds or ranks, a slice of its weights at a time."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from hf_overlay.catalog import tasks
from mlx_lm.utils import load_model

from mlx_overlay_server.chat.loaded import context_length
from mlx_overlay_server.encoding.loaded import LoadedEncoder, Way
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.engine.encoding import bert, both_ways, facts, modernbert, rotary
from mlx_overlay_server.engine.encoding.causal import Causal
from mlx_overlay_server.engine.encoding.facts import Facts
from mlx_overlay_server.engine.encoding.pooling import Pooling
from mlx_overlay_server.engine.encoding.runner import EncodingRunner
from mlx_overlay_server.engine.loading import apart, check, fitting, parameters, result, slices, turns
from mlx_overlay_server.memory import KvSize, Shares
from mlx_overlay_server.settings import EngineOptions

_MODULES: Mapping[str, Any] = {"gte": rotary, "modernbert": modernbert, "new": rotary, "nomic_bert": rotary}


def load(
    command: Load, options: EngineOptions, group: Any, shares: Shares | None = None
) -> Generator[EncodingRunner | int | None, None, None]:
    """Load a model: yield the bytes of each slice, None for a turn without one, and the runner at the end.

    `shares`: how the memory is divided.
    Under `mlx.launch`, each rank of `group` has all of it, and all of them load it in one turn.

    Raises what mlx-lm raises, Unsuitable for a folder that must not be loaded, TimeoutError when a part does not end.
    """
    if group is not None:
        *_, runner = load(command, options, None, shares)
        yield runner
        return
    path = Path(command.path)
    checking = apart(partial(check, command, options))
    yield from turns(checking, math.inf)
    checking.result()
    model, config = load_model(path, lazy=True, get_model_classes=_classes, trust_remote_code=options.trust_remote_code)
    is_encoder = _is_encoder(config)
    is_decoder = not is_encoder or (tasks.embeds_both_ways(config) and not tasks.is_gemma(config))
    reading = apart(partial(facts.read, path, default="lasttoken" if is_decoder else "mean"))
    for part in slices([model]):
        mx.eval(part)
        yield sum(each.nbytes for each in part)
    yield from turns(reading, options.load_seconds)
    known = result(reading, options)
    nbytes = sum(part.nbytes for part in parameters(model))
    kv = KvSize() if is_encoder else mlx.kv_size(model, bits=None, group_size=64, start=0)
    fits = shares.tokens(nbytes, kv) if shares is not None else None
    context = fitting(_context(config, known), fits, path)
    whole: Any = model if is_encoder else Causal(model, _answers(command, model, known))
    pooling = Pooling(known, getattr(model, "dense", ())) if command.task == "embedding" else None
    loaded = LoadedEncoder(
        key=command.key,
        path=command.path,
        way=_way(command, known, is_encoder=is_encoder),
        nbytes=nbytes,
        vocab_size=int(config.get("vocab_size") or config["text_config"]["vocab_size"]),
        context=context,
        prompts=known.prompts,
        default_prompt=known.default_prompt,
        lowers=known.lowers,
        kv=kv,
        trusts_code=options.trust_remote_code,
    )
    yield EncodingRunner(loaded, whole, pooling, options)


def _is_encoder(config: Mapping[str, Any]) -> bool:
    return config["model_type"] in tasks.ENCODERS or tasks.embeds_both_ways(config)


def _classes(config: dict[str, Any]) -> tuple[Any, Any]:
    if tasks.embeds_both_ways(config):
        return both_ways.classes(config)
    if not _is_encoder(config):
        return mlx.headless_classes(config)
    module: Any = _MODULES.get(config["model_type"], bert)
    return module.Model, module.ModelArgs


def _way(command: Load, known: Facts, *, is_encoder: bool) -> Way:
    if command.task == "embedding":
        return "embedding"
    return "pair" if is_encoder else "template" if known.has_template else "dialogue"


def _answers(command: Load, model: Any, known: Facts) -> tuple[int, ...]:
    """Return the tokens for yes and no of a model that ranks by what it would say; () for others. Raises ValueError."""
    if command.task != "reranker" or "score" in model:
        return ()
    if not known.answers:
        raise ValueError("its tokenizer has no tokens `yes` and `no`, by which such a model ranks")
    return known.answers


def _context(config: Mapping[str, Any], known: Facts) -> int | None:
    """Return how many tokens a text may have: the least of what the model's files say."""
    positions = context_length(config)
    if positions is not None and config["model_type"] in bert.SHIFTED:
        positions -= config.get("pad_token_id", 1) + 1
    return min((each for each in (positions, known.longest) if each is not None), default=None)
