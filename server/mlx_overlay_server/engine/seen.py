"""What models that see made of images, kept for the next turn of a conversation about them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

KEPT_BYTES = 1 << 27
"""What may be kept of a model's images. It counts as part of the model's weights. A large picture takes some 10 MB."""

_PARTS = ("multi_modal_projector", "embed_vision", "connector", "vision_tower", "visual", "vision_model")
"""What mlx-vlm's models call the part that images pass last before they are among the tokens; the first counts."""


class _Made(NamedTuple):
    value: Any
    nbytes: int


class Seen:
    """What one model made of images, by their pixels; what was used least lately goes first."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._made: OrderedDict[bytes, _Made] = OrderedDict()
        self._kept = 0
        """Bytes of all of it."""
        self._images = b""
        """What the images that are looked at are known by."""
        self._calls = 0
        """How often the model's part was asked about them."""

    def __len__(self) -> int:
        return len(self._made)

    def forget(self) -> None:
        """Drop all of it."""
        self._made.clear()
        self._kept = 0

    def attach(self, model: Any) -> None:
        """Have a model of mlx-vlm's look at no image again, if the part of it that does has one of the known names."""
        part = next((model[name] for name in _PARTS if callable(model.get(name))), None)
        if part is None:
            return
        own, seen = type(part), self

        class Remembering(own):  # type: ignore[misc, valid-type]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return seen.recalled(lambda: own.__call__(self, *args, **kwargs))

        part.__class__ = Remembering  # a module in its place would lose the names of its weights

    def look_at(self, arrays: Mapping[str, Any]) -> None:
        """Say which images come next: numpy's arrays, by the names that the model has for them."""
        digest = hashlib.sha256()
        for name, array in sorted(arrays.items()):
            digest.update(repr((name, array.shape, str(array.dtype))).encode())
            digest.update(memoryview(array).cast("B") if array.flags.c_contiguous else array.tobytes())
        self._images, self._calls = digest.digest(), 0

    def recalled(self, make: Callable[[], Any]) -> Any:
        """Return what is known of the images, or make it. Nothing that leads there is computed, then."""
        key = self._images + self._calls.to_bytes(4)
        self._calls += 1
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key].value
        value = make()
        arrays = [each for _, each in tree_flatten(value) if isinstance(each, mx.array)]
        nbytes = sum(each.nbytes for each in arrays)
        if nbytes <= self._max_bytes:
            mx.eval(arrays)
            self._made[key] = _Made(value, nbytes)
            self._kept += nbytes
            while self._kept > self._max_bytes:
                self._kept -= self._made.popitem(last=False)[1].nbytes
        return value
