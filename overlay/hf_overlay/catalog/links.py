"""Whether a link in a model's folder leads to model data, or to something that nobody meant to hand out.

Users link weights, and whole models, to other drives; caches link blobs. But a folder that was copied from somebody
else may hold a link to a private file of the user, which the gateway would then give to other programs.
"""

from __future__ import annotations

import os
import re

WEIGHTS = (".safetensors", ".gguf", ".bin", ".npz", ".pt", ".pth", ".onnx", ".mlpackage")
"""Ends of the names of weight files, of whatever kind of model."""

_BLOB = re.compile(r"(?:sha256-)?[0-9a-f]{40,64}")
"""Names of files in the blob stores of Hugging Face, and of Ollama."""


def home_of(path: str) -> str:
    """Return the real path below which a model's own files lie: its folder, or its repo's for a snapshot."""
    home = os.path.realpath(path)
    snapshots, repo = os.path.dirname(home), os.path.dirname(os.path.dirname(home))
    is_snapshot = os.path.basename(snapshots) == "snapshots" and os.path.basename(repo).startswith("models--")
    return repo if is_snapshot else home


def leads_away(path: str, home: str) -> bool:
    """Return whether a file of a model is none of its own, all links followed; `home` is from `home_of`.

    A file is the model's own where it lies below `home`. One that lies elsewhere counts when its name there says that
    it is model data: a blob, named by its hash; or a file with the same suffix as the link, which has a suffix of
    weights or lies beside such a file. Hidden files never count, nor do those in folders that cannot be read.
    """
    real = os.path.realpath(path)
    if real.startswith(home.rstrip("/") + "/"):
        return False
    folder, name = os.path.split(real)
    if _BLOB.fullmatch(name):
        return False
    suffix = os.path.splitext(name)[1]
    if name.startswith(".") or not suffix or suffix != os.path.splitext(path)[1]:
        return True
    try:
        return suffix not in WEIGHTS and not any(each.endswith(WEIGHTS) for each in os.listdir(folder))
    except OSError:
        return True
