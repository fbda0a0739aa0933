"""Loads a model slice by slice, so that the sequences of other models go on meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import make_text_state_machine
from mlx_lm.processors import load_processor
from mlx_lm.utils import load_adapters, load_model, load_tokenizer, sharded_load

from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.engine import mlx
from mlx_overlay_server.engine.commands import Load
from mlx_overlay_server.engine.prefix_cache import PrefixCache
from mlx_overlay_server.engine.runner import Runner
from mlx_overlay_server.settings import EngineOptions

SLICE_BYTES = 1 << 28
"""Bytes of weights that are read between two steps of other models."""


def load(command: Load, options: EngineOptions, group: Any, prefixes: PrefixCache) -> Iterator[Runner | None]:
    """Load a model: yield None after each slice, and the runner at the end. Raises what mlx-lm raises."""
    path = Path(command.path)
    config_extra = {"trust_remote_code": options.trust_remote_code}
    draft = None
    if group is not None:
        model, tokenizer, config = sharded_load(
            command.path,
            pipeline_group=group if options.is_pipeline else None,
            tensor_group=None if options.is_pipeline else group,
            return_config=True,
            tokenizer_config=config_extra,
            trust_remote_code=options.trust_remote_code,
        )
    else:
        model, config = load_model(path, lazy=True, trust_remote_code=options.trust_remote_code)
        if command.adapter_path is not None:
            model = load_adapters(model, command.adapter_path)
            model.eval()
        if command.draft_path is not None:
            draft, _ = load_model(Path(command.draft_path), lazy=True, trust_remote_code=options.trust_remote_code)
        with ThreadPoolExecutor(1, "tokenizer") as executor:
            loading = executor.submit(load_tokenizer, path, config_extra, config.get("eos_token_id"))
            for part in _slices([model, *([draft] if draft is not None else [])]):
                mx.eval(part)
                yield None
            while not wait([loading], timeout=0.005).done:
                yield None
            tokenizer = loading.result()
    has_own_calls = tokenizer.has_tool_calling
    mlx.prepare_tokenizer(tokenizer)
    vocab_size = _vocab_size(config, tokenizer)
    loaded = Loaded(
        key=command.key,
        path=command.path,
        tokenizer=tokenizer,
        marks=make_text_state_machine(tokenizer),
        detokenizer=partial(mlx.detokenizer, tokenizer),
        make_grammar_tokenizer=partial(mlx.grammar_tokenizer, tokenizer, vocab_size),
        longest_token=max(map(len, tokenizer.get_vocab()), default=1),
        nbytes=sum(part.nbytes for each in (model, draft) if each is not None for part in _parameters(each)),
        vocab_size=vocab_size,
        context=_context(config),
        defaults=_generation_config(path),
        has_own_calls=has_own_calls,
        processor=load_processor(model, config) if group is None else None,
    )
    yield Runner(loaded, model, draft, options, prefixes)


def _parameters(model: Any) -> list[mx.array]:
    return [value for _, value in tree_flatten(model.parameters())]


def _slices(models: Iterable[Any]) -> Iterator[list[mx.array]]:
    part: list[mx.array] = []
    size = 0
    for model in models:
        for value in _parameters(model):
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


def _context(config: dict[str, Any]) -> int | None:
    """Return how many tokens prompt and answer may have together; None when the config does not say."""
    for part in (config, config.get("text_config", {})):
        for name in ("max_position_embeddings", "max_sequence_length", "seq_length", "n_positions"):
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def _generation_config(path: Path) -> dict[str, Any]:
    """Return a model's own sampling defaults; {} when its file is missing or unreadable."""
    try:
        found = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
