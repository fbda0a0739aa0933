"""What tells a model's files from any others: KV caches that one model has made are never used with another."""

from __future__ import annotations

import hashlib
import os
import stat

_WHOLE_BYTES = 1 << 20
"""Bytes of a file's beginning that are read: smaller files, and headers of weights, are read whole."""
_SAMPLES = 32
_SAMPLE_BYTES = 4096
_KINDS = (".safetensors", ".py")
_CONFIGS = ("config.json", "adapter_config.json")


def identity(folder: str) -> str:
    """Return a text that is another one for each model, draft model or adapter, whatever its folder is called.

    It stands for the names, sizes and times of the files that decide what a model computes, and for samples of what is
    in them, since weights may be replaced by others of the same size and time. Takes as long as the disk does. Raises
    OSError.
    """
    digest = hashlib.blake2b(digest_size=20)
    for name in sorted(os.listdir(folder)):
        if name.endswith(_KINDS) or name in _CONFIGS:
            _add(digest, os.path.join(folder, name), name)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, path: str, name: str) -> None:
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        return
    digest.update(f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    with open(path, "rb", buffering=0) as file:
        digest.update(file.read(_WHOLE_BYTES))
        if facts.st_size > _WHOLE_BYTES:
            for number in range(1, _SAMPLES + 1):
                file.seek((facts.st_size - _SAMPLE_BYTES) * number // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
