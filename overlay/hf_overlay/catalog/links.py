"""Whether a link in a model's folder leads to model data, or to something that nobody meant to hand out.

Users link weights, and whole models, to other drives; caches link blobs. But a folder that was copied from somebody
else may hold a link to a private file of the user, which the gateway would then give to other programs.
"""

from __future__ import annotations

import os
import re

from hf_overlay.errors import check_descriptors

WEIGHTS = (".safetensors", ".gguf", ".bin", ".npz", ".pt", ".pth", ".onnx", ".mlpackage")
"""Ends of the names of weight files, of whatever kind of model."""

_PIPELINE = "model_index.json"
"""The file beside the folders that hold the weights of a diffusers pipeline."""
_BLOB = r"(?:sha256-)?[0-9a-f]{40,64}"
"""Names of files in the blob stores of Hugging Face, and of Ollama."""


def home_of(path: str) -> str:
    """Return the real path below which a model's own files lie: its folder, or its repo's for a snapshot."""
    home = os.path.realpath(path)
    snapshots, repo = os.path.dirname(home), os.path.dirname(os.path.dirname(home))
    is_snapshot = os.path.basename(snapshots) == "snapshots" and os.path.basename(repo).startswith("models--")
    return repo if is_snapshot else home


def leads_away(folder: str, name: str, home: str) -> bool:
    """Return whether a file of a model is none of its own, all links followed.

    `name` is the file's, relative to the model's `folder`; `home` is from `home_of`. A file is the model's own where it
    lies below `home`. One that lies elsewhere counts when its place there says that it is model data:

    - it is a blob, named by its hash;
    - it begins as weights of the link's suffix do;
    - it has the same name, relative to a folder that holds weights: a model that was linked file by file;
    - it has the link's suffix, is not hidden, and has a suffix of weights or lies beside such a file.

    Files in folders that cannot be read never count.
    """
    real = os.path.realpath(f"{folder}/{name}")
    if real.startswith(home.rstrip("/") + "/"):
        return False
    place, name_there = os.path.split(real)
    if re.fullmatch(_BLOB, name_there):
        return False
    if _begins_as_weights(real, os.path.splitext(name)[1]):
        return False
    if real.endswith(f"/{name}") and _holds_weights(real.removesuffix(f"/{name}")):
        return False
    suffix = os.path.splitext(name_there)[1]
    if name_there.startswith(".") or not suffix or suffix != os.path.splitext(name)[1]:
        return True
    return suffix not in WEIGHTS and not _holds_weights(place)


def _holds_weights(folder: str) -> bool:
    try:
        return any(each.endswith(WEIGHTS) or each == _PIPELINE for each in os.listdir(folder))
    except OSError as error:
        check_descriptors(error)
        return False


def _begins_as_weights(path: str, suffix: str) -> bool:
    """Return whether a file starts as a safetensors or a GGUF file does."""
    if suffix not in (".safetensors", ".gguf") or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        check_descriptors(error)
        return False
    # A safetensors file has the length of its header first, eight bytes, and then the header, a JSON object.
    return start[:4] == b"GGUF" if suffix == ".gguf" else start[6:] == b"\0\0{"
