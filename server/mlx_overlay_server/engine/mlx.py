"""Every use of mlx-lm that goes beyond its documented API: shapes of its classes, private attributes, side effects.

Each function rests on assumptions about mlx-lm's source. `tests/server/test_mlx_contract.py` has a test for each of
them, and runs with every release that `server/pyproject.toml` admits; a test that fails says what to mend here.

Import this module before anything else that imports mlx-lm: it keeps that import from changing the process's limits.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_overlay_server.engine import system
from mlx_overlay_server.memory import CONTAINER, Cost, KvSize, Machine


@contextmanager
def _file_limit_kept() -> Iterator[None]:
    """Keep imports in this context from setting the limit on open files.

    `mlx_lm.utils` lowers it to 2048 (soft) and 4096 (hard) when it is imported. Restoring it afterwards would not do:
    only root may raise a hard limit again.
    """
    original = resource.setrlimit

    def setrlimit(which: int, limits: tuple[int, int]) -> None:
        if which != resource.RLIMIT_NOFILE:
            original(which, limits)

    resource.setrlimit = setrlimit
    try:
        yield
    finally:
        resource.setrlimit = original


with _file_limit_kept():
    from mlx_lm.models.cache import (
        ArraysCache,
        CacheList,
        KVCache,
        QuantizedKVCache,
        RotatingKVCache,
        can_trim_prompt_cache,
        make_prompt_cache,
        trim_prompt_cache,
    )

Cache = list[Any]
"""mlx-lm's KV cache of one sequence: one cache object per layer."""

# Memory ----------------------------------------------------------------------------------------------------------


_RECOMMENDED = "max_recommended_working_set_size"
"""A fact about a device that Metal alone has."""


def machine() -> Machine:
    """Return what MLX says about the memory it takes from."""
    facts = mx.device_info()
    recommended = facts.get(_RECOMMENDED)
    if recommended is None:
        most = mx.get_memory_limit()
        container = system.limit() if mx.default_device() == mx.Device(mx.cpu) else None  # a GPU's is its own
        return Machine(most if container is None else min(most, int(container * CONTAINER)))
    return Machine(int(recommended), is_metal=True)


def reach() -> int | None:
    """Return how many bytes MLX can have by now: what it has, and what is free in the machine; None: nobody knows.

    It is known where MLX takes from the memory that all programs share: on the CPU, and on Apple's GPUs.
    """
    is_shared = mx.default_device() == mx.Device(mx.cpu) or _RECOMMENDED in mx.device_info()
    free = system.free() if is_shared else None
    return None if free is None else mx.get_active_memory() + mx.get_cache_memory() + free


def wire(nbytes: int) -> None:
    """Let Metal wire so many bytes, which keeps models from being paged out.

    Call it before anything is computed: the limit must not change while something is. On macOS before 15 and on other
    systems nothing is wired.
    """
    mx.set_wired_limit(nbytes)


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Let MLX begin nothing more while so many bytes are in use and something is computed that may free some of them.

    It computes ahead of what it waits for: without a limit, what a step no longer needs is freed long after what it
    makes is allocated. A limit that is lower already stays.
    """
    before = mx.set_memory_limit(min(nbytes, mx.get_memory_limit()))
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def limit_pool(nbytes: int) -> None:
    """Let MLX keep at most so many bytes of freed buffers to use again. A limit that is lower already stays."""
    before = mx.set_cache_limit(nbytes)
    if before < nbytes:
        mx.set_cache_limit(before)


def clear_pool() -> None:
    """Give the freed buffers that MLX keeps back to the system."""
    mx.clear_cache()


def settle() -> None:
    """Wait until nothing is computed any more. Raises the errors that MLX keeps for whoever uses it next."""
    mx.synchronize(mx.default_stream(mx.default_device()))


def drain() -> None:
    """Wait until nothing is computed any more, and drop the errors that MLX keeps for whoever uses it next.

    An error of the GPU is handed on to the CPU's stream where that waits for the GPU, and stays there as well.
    """
    for device in (mx.default_device(), mx.Device(mx.cpu)):
        for _ in range(2):  # the first call raises an error that is kept, and thereby ends it
            try:
                mx.synchronize(mx.default_stream(device))
            except RuntimeError:
                continue
            break


# Batches ---------------------------------------------------------------------------------------------------------


def can_batch(model: Any) -> bool:
    """Return whether a model's sequences can share a continuous batch: each layer's cache must be able to merge."""
    if getattr(model, "runs_alone", False):
        return False
    cache = make_prompt_cache(model)
    has_states = any(isinstance(leaf, ArraysCache) for leaf in leaves(cache))
    return all(hasattr(layer, "merge") for layer in cache) and (not has_states or _minds_padding(model))


def _minds_padding(model: Any) -> bool:
    """Return whether a recurrent model leaves out of its states what pads the shorter prompts of a batch.

    BatchGenerator tells each ArraysCache how long the prompts are. Not all models of mlx-lm 0.32 look: Jamba, Mamba 1,
    RWKV 7, RecurrentGemma and OLMo Hybrid, for instance, give wrong text for all prompts but the longest.
    """
    modules = {type(part).__module__ for part in model.modules()}
    return any(".lengths" in inspect.getsource(sys.modules[name]) for name in modules if name.startswith("mlx_lm."))


def can_cut(model: Any) -> bool:
    """Return whether a model's KV caches can be cut at any token, however long they are.

    Those of sliding windows say so of themselves only until their windows are full.
    """
    cache = make_prompt_cache(model)
    return can_trim_prompt_cache(cache) and not any(isinstance(leaf, RotatingKVCache) for leaf in leaves(cache))


def leaves(cache: Sequence[Any]) -> list[Any]:
    """Return the layers of a KV cache, and where one of them is made of several caches, these."""
    return [leaf for layer in cache for leaf in (leaves(layer.caches) if isinstance(layer, CacheList) else [layer])]


def is_quantised(cache: Sequence[Any]) -> bool:
    """Return whether a KV cache has layers that are quantised."""
    return any(isinstance(leaf, QuantizedKVCache) for leaf in leaves(cache))


def kv_size(model: Any, *, bits: int | None, group_size: int, start: int) -> KvSize:
    """Return what the KV cache of a model's sequences takes. Nothing is computed: MLX knows shapes before it computes.

    `bits` and `group_size` are those of a cache that is quantised from `start` tokens on; None: it is not.
    """
    try:
        cache = make_prompt_cache(model)
        sizes = [_grown(model, cache) for _ in range(_GROWTHS)]
        grown = leaves(cache)
        width = next((8 * leaf.keys.dtype.size for leaf in grown if isinstance(leaf, KVCache)), 16)
    except Exception:  # noqa: BLE001 - a model may do anything while it is traced; without the size it still runs
        return KvSize()
    fixed = sum(leaf.nbytes for leaf in grown if isinstance(leaf, ArraysCache))
    token = (sizes[-1] - sizes[-2]) // _GROWTH_TOKENS
    early = (sizes[0] - fixed) // _GROWTH_TOKENS
    if bits is not None:
        return KvSize(int(token * (bits + 2 * width / group_size) / width), early, start, fixed, is_quantised=True)
    windows = sizes[-1] - fixed - token * _GROWTH_TOKENS * _GROWTHS
    return KvSize(token, early, windows // (early - token) if early > token else 0, fixed)


def why_not_quantised(model: Any, *, bits: int, group_size: int) -> str | None:
    """Return why mlx-lm cannot quantise a model's KV cache; None when it can. Nothing is computed."""
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    for layer in cache:
        if hasattr(layer, "to_quantized"):
            try:
                layer.to_quantized(group_size=group_size, bits=bits)
            except (NotImplementedError, ValueError) as error:
                return str(error).partition(" However")[0] or "its kind is not supported"
    return None


_FUSED_HEADS = (64, 80, 128)
"""Sizes of heads for which MLX's attention on a GPU keeps no score for each pair of tokens."""
_NUMBER = 4
"""Bytes of a number while something is computed."""


def cost(config: dict[str, Any]) -> Cost:
    """Estimate what a pass computes with, from a model's config.json; nothing where it does not say."""
    inner = config.get("text_config")
    shape = {**config, **inner} if isinstance(inner, dict) else config
    hidden, heads = (shape.get(name) for name in ("hidden_size", "num_attention_heads"))
    if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
        return Cost()
    between = shape.get("intermediate_size")
    head = shape.get("head_dim") or hidden // heads
    is_fused = mx.default_device() != mx.Device(mx.cpu) and head in _FUSED_HEADS
    token = (8 * hidden + 4 * (between if isinstance(between, int) else 4 * hidden)) * _NUMBER
    return Cost(token, 0 if is_fused else 3 * heads * _NUMBER // 2)


_GROWTH_TOKENS = 1024
_GROWTHS = 6  # beyond the longest sliding windows of today's models


def _grown(model: Any, cache: Cache) -> int:
    """Let a KV cache take more tokens, without computing them, and return its size in bytes."""
    model(mx.zeros((1, _GROWTH_TOKENS), dtype=mx.int32), cache=cache)
    return sum(layer.nbytes for layer in cache)


# Sequences that run alone ----------------------------------------------------------------------------------------


def close_alone(drawn: Any, cache: Cache, size: int) -> int | None:
    """End a generator of tokens, and cut its KV cache to what may be reused.

    `size` is how many tokens the sequence has. Returns how many of them the cache holds afterwards; None when the
    cache cannot be cut, and so must not be kept.
    """
    drawn.close()  # its `finally` takes rejected guesses of a draft model back out of the caches
    if not cache or not all(hasattr(layer, "offset") and layer.is_trimmable() for layer in cache):
        return None
    kept = min(*(layer.offset for layer in cache), size)
    for layer in cache:  # the last token was drawn but not read, and a draft model's caches may be a token ahead
        layer.trim(layer.offset - kept)
    return int(kept)


# Caches that are kept --------------------------------------------------------------------------------------------


def compact(cache: Cache) -> Cache:
    """Return a copy of a KV cache that holds its tokens and nothing more, in buffers of its own, not evaluated yet.

    A cache that leaves a batch may be a view on the buffers of the whole batch, and has room for tokens to come.
    """
    return [_compact(layer) for layer in cache]


def _compact(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_compact, layer.caches))
    own = copy.copy(layer)
    if hasattr(layer, "keys_and_values") and not layer.empty():
        own.keys, own.values = tree_map(_contiguous, layer.keys_and_values())  # the tokens without the room behind
    else:
        own.state = tree_map(_contiguous, layer.state)
    return own


def _contiguous(value: Any) -> Any:
    return mx.contiguous(value) if isinstance(value, mx.array) else value


def head(cache: Cache, *, dropping: int) -> Cache | None:
    """Return a compact copy of a KV cache without its last `dropping` tokens; None when its kind cannot be cut."""
    if not can_trim_prompt_cache(cache):
        return None
    cut = copy.deepcopy(cache)  # lazy: arrays are shared until one is written to
    trim_prompt_cache(cut, dropping)
    return compact(cut)


def evaluate(cache: Cache) -> None:
    """Compute a KV cache's arrays now, so that it holds on to none of the arrays they are made from."""
    mx.eval([layer.state for layer in cache])


# Images ----------------------------------------------------------------------------------------------------------


def image_embeddings(model: Any, tokens: Sequence[int], images: Sequence[Any]) -> mx.array:
    """Return the input embeddings of a prompt with images, evaluated; `images` are NumPy arrays of pixel values."""
    pixels = [mx.array(image) for image in images]
    embeddings: mx.array = model.embed_inputs(mx.array(list(tokens)), pixel_values=pixels)
    mx.eval(embeddings)
    return embeddings


# Hidden states ---------------------------------------------------------------------------------------------------


def headless_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes (model, arguments) for a model whose head may be missing, or another one.

    Calling such a model gives hidden states.

    sentence-transformers saves models without a head, and the names of their weights do not begin with `model.`. A
    model that was trained to rank has a head `score`.
    """
    model_class, arguments = importlib.import_module("mlx_lm.utils")._get_classes(config)  # noqa: SLF001 - no other way

    class Headless(model_class):  # type: ignore[misc, valid-type]
        def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
            hidden: mx.array = inner_model(self)(tokens, cache)
            return hidden

        def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
            if not any(name.startswith(("model.", "language_model.")) for name in weights):
                weights = {name if name == _SCORE else f"model.{name}": each for name, each in weights.items()}
            score = weights.pop(_SCORE, None)
            if hasattr(super(), "sanitize"):
                weights = super().sanitize(weights)
            if "lm_head" in self and not any(name.startswith("lm_head.") for name in weights):
                del self["lm_head"]
            if score is not None:
                self.score = nn.Linear(score.shape[1], score.shape[0], bias=False)
                weights[_SCORE] = score
            return weights

    return Headless, arguments


_SCORE = "score.weight"


def inner_model(model: Any) -> Any:
    """Return the part of a model that gives hidden states: called with tokens and a KV cache. Raises ValueError."""
    inner = getattr(_language_model(model), "model", None)
    if not hasattr(inner, "embed_tokens"):
        raise ValueError(f"models of the class {type(model).__module__} do not show their hidden states")
    return inner


def new_cache(model: Any) -> Cache:
    """Return an empty KV cache."""
    return list(make_prompt_cache(model))


def logits_of(model: Any) -> Any:
    """Return what makes logits of hidden states: a matrix of its own, or that of the embeddings."""
    language = _language_model(model)
    return language["lm_head"] if "lm_head" in language else inner_model(model).embed_tokens.as_linear


def _language_model(model: Any) -> Any:
    return model.get("language_model", model)
