"""The words the other modules share: what a scan finds, as plain values."""

from __future__ import annotations

from typing import Literal, NamedTuple


class File(NamedTuple):
    """One file of a model; a link to it is followed, so size and time are its target's."""

    name: str
    """Relative to the model's folder, with `/`."""
    size: int
    """Bytes."""
    mtime_ns: int
    etag: str | None = None
    """The Hub's, where the folder proves it."""


class Model(NamedTuple):
    """A folder that can be loaded."""

    id: str
    source: Literal["custom", "cache"]
    path: str
    """The folder to load: the user's own, or a snapshot in a Hugging Face cache."""
    model_type: str | None
    """As in config.json; None where there is none (only with all kinds)."""
    size_bytes: int
    files: tuple[File, ...]
    root: str
    """The model path, or the cache, it was found in."""
    commit: str | None = None
    """The Hub's, where the folder proves it: a cached snapshot, or what `hf download --local-dir` left."""


class Reject(NamedTuple):
    """A folder that looks like a model and is not offered."""

    path: str
    id: str | None
    reason: str
    root: str


class Source(NamedTuple):
    """What one scan found in one model path, or in the real cache."""

    root: str
    problem: str | None
    """Why the whole root could not be used; None when it could."""
    models: tuple[Model, ...] = ()
    rejects: tuple[Reject, ...] = ()
    junk: int = 0
    """AppleDouble files (`._name`) seen and left out."""
    device: int | None = None
    """st_dev of the root: another one under the same path means that the drive was taken away."""
