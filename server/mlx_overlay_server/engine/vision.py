"""Models that see, by mlx-vlm, an extra of the distribution: nothing of it is imported before such a model is loaded.

Its models keep what they know of a sequence's positions in themselves, so their sequences run alone, not in a batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_overlay_server.chat.loaded import Shown
from mlx_overlay_server.engine.seen import Seen

Cache = list[Any]
_MARKS = ("image_token_id", "image_token_index")
"""What configurations call the token that stands for a part of an image."""


def is_for(path: str) -> bool:
    """Return whether a folder's model is one that mlx-vlm shows images to, and mlx-vlm is installed.

    Imports mlx-vlm for a model that has a part for images, which takes seconds.
    """
    try:
        config = json.loads(Path(path, "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # mlx-lm says what is wrong
        return False
    if not isinstance(config, dict) or not isinstance(config.get("vision_config"), Mapping):
        return False
    if config.get("model_file") is not None or _mark_of(config) is None or find_spec("mlx_vlm") is None:
        return False
    name = import_module("mlx_vlm.utils").get_model_type(config)
    return name is not None and name.isidentifier() and find_spec(f"mlx_vlm.models.{name}") is not None


def load(path: str) -> tuple[SeeingModel, dict[str, Any]]:
    """Return the model of a folder, whose weights are not read yet, and its configuration. Raises what mlx-vlm does."""
    config = json.loads(Path(path, "config.json").read_text("utf-8"))
    return SeeingModel(import_module("mlx_vlm.utils").load_model(Path(path), lazy=True)), config


class SeeingModel:
    """A model of mlx-vlm's with the methods of mlx-lm's that the engine uses."""

    runs_alone = True

    def __init__(self, inner: Any) -> None:
        """`inner` is mlx-vlm's model."""
        self._inner = inner
        self.seen = Seen()
        self.seen.attach(inner)

    @property
    def layers(self) -> Sequence[Any]:
        """The layers of its language model."""
        layers: Sequence[Any] = self._inner.layers
        return layers

    def parameters(self) -> Any:
        """Return all weights."""
        return self._inner.parameters()

    def make_cache(self) -> Cache:
        """Return an empty KV cache of one sequence."""
        cache: Cache = import_module("mlx_vlm.models.cache").make_prompt_cache(self._inner.language_model)
        return cache

    def __call__(self, tokens: mx.array, cache: Cache | None = None) -> mx.array:
        """Return the logits after each token of a text."""
        logits: mx.array = self._inner.language_model(tokens, cache=cache).logits
        return logits

    def sequence(self, tokens: Sequence[int], shown: Shown | None, cache: Cache) -> SeenSequence:
        """Look at the images of a prompt, and return what reads it and goes on with it. Raises what mlx-vlm does."""
        ids = mx.array([list(tokens)])
        given = {name: mx.array(value) for name, value in shown.arrays.items()} if shown is not None else {}
        pixels, mask = given.pop("pixel_values", None), given.pop("attention_mask", None)
        if shown is not None:
            self.seen.look_at({name: value for name, value in shown.arrays.items() if name != "attention_mask"})
        features = self._inner.get_input_embeddings(ids, pixels, mask=mask, **given).to_dict()
        embeddings = features.pop("inputs_embeds")
        known = {name: value for name, value in features.items() if value is not None}
        mx.eval(embeddings, known)
        in_pieces = import_module("mlx_vlm.generate.common")._chunked_prefill_enabled(  # noqa: SLF001 - the rule of each model
            self._inner, input_ids=ids, inputs_embeds=embeddings, prompt_cache=cache, prefill_kwargs=known
        )
        return SeenSequence(self._inner.language_model, embeddings[0], known, in_pieces=bool(in_pieces))


class SeenSequence:
    """One sequence's view of a model: it knows the positions of the prompt's images, which are not those of a text."""

    def __init__(self, language: Any, embeddings: mx.array, known: dict[str, Any], *, in_pieces: bool) -> None:
        """`known`: what mlx-vlm's model found out about the whole prompt, by its own names."""
        self._language = language
        self._known = known
        self._later: dict[str, Any] = {
            name: known[name] for name in ("rope_deltas", "cross_attention_states") if name in known
        }
        self.embeddings = embeddings
        """Of the prompt's tokens."""
        self.in_pieces = in_pieces
        """Whether the prompt may be read in pieces."""

    def __call__(self, tokens: mx.array, cache: Cache, input_embeddings: mx.array | None = None) -> mx.array:
        """Return the logits after each of the next tokens; those of the prompt come with their embeddings."""
        given = self._later if input_embeddings is None else self._known
        logits: mx.array = self._language(tokens, inputs_embeds=input_embeddings, cache=cache, **given).logits
        return logits


class Processor:
    """mlx-vlm's processor of one model, made by the process that first uses it."""

    def __init__(self, path: str, mark: int) -> None:
        """`mark` is the token that stands for a part of an image."""
        self._path = path
        self._mark = mark
        self._made: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process is made of."""
        return {**vars(self), "_made": None}

    def shown(self, text: str, images: Sequence[Any]) -> tuple[list[int], Shown]:
        """Return the tokens of a prompt with images, which are Pillow's, and what the model sees of them.

        Raises ValueError where the text and the images do not go together.
        """
        try:
            inputs = self._inputs(text, list(images))
        except (IndexError, KeyError, TypeError) as error:  # as processors meet a mark without an image
            raise ValueError(f"{type(error).__name__} in the model's image processor") from None
        tokens: list[int] = inputs.pop("input_ids").tolist()[0]
        arrays = {name: _plain(value) for name, value in inputs.items() if isinstance(value, mx.array)}
        return tokens, Shown(arrays, _identity(tokens, self._mark, images))

    def _inputs(self, text: str, images: list[Any]) -> dict[str, Any]:
        utils = import_module("mlx_vlm.utils")
        if self._made is None:
            # First: it imports the model's module, which brings processors that do without PyTorch.
            own = utils.load_image_processor(Path(self._path), trust_remote_code=False)
            self._made = utils.load_processor(self._path, False, trust_remote_code=False)
            if own is not None:
                self._made.image_processor = own
        inputs: dict[str, Any] = utils.prepare_inputs(
            self._made, images=images, prompts=[text], image_token_index=self._mark
        )
        return inputs


def processor(path: str, config: Mapping[str, Any]) -> Processor:
    """Return the processor of a model that `is_for` is true of."""
    mark = _mark_of(config)
    assert mark is not None  # noqa: S101 - as is_for says
    return Processor(path, mark)


def _mark_of(config: Mapping[str, Any]) -> int | None:
    return next((config[name] for name in _MARKS if isinstance(config.get(name), int)), None)


def _plain(value: mx.array) -> Any:
    return np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)


class _Run(NamedTuple):
    """Marks of an image that follow one another."""

    start: int
    end: int


def _identity(tokens: Sequence[int], mark: int, images: Sequence[Any]) -> tuple[int, ...]:
    """Return tokens in which each mark of an image is a number of that image's own, which no token is.

    By these a KV cache is found again: the marks are the same for all images. Raises ValueError where none is there.
    """
    runs = [_Run(list_[0], list_[-1] + 1) for is_mark, list_ in _grouped(tokens, mark) if is_mark]
    if not runs:
        raise ValueError("its chat template has no place for them")
    numbers = [_number(image.tobytes() + repr(image.size).encode()) for image in images]
    if len(runs) != len(images):  # each in several parts: then only all of them together are known again
        numbers = [_number(repr(numbers).encode())] * len(runs)
    made = list(tokens)
    for number, run in zip(numbers, runs, strict=True):
        made[run.start : run.end] = [number] * (run.end - run.start)
    return tuple(made)


def _grouped(tokens: Sequence[int], mark: int) -> list[tuple[bool, list[int]]]:
    groups = itertools.groupby(range(len(tokens)), key=lambda at: tokens[at] == mark)
    return [(is_mark, list(places)) for is_mark, places in groups]


def _number(data: bytes) -> int:
    """Return a negative number for some data, the same in every process."""
    return -1 - int.from_bytes(hashlib.sha256(data).digest()[:7])
