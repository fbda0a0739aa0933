"""Model folders that scan as models without holding weights that load: for tests of finding, not of loading."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def lay_model(
    folder: Path, files: Mapping[str, bytes] | None = None, *, model_type: str = "llama", settled: bool = False
) -> Path:
    """A folder with config.json, one weight file, a tokenizer and `files`; `settled` dates everything back by a day."""
    contents = {
        "config.json": json.dumps({"model_type": model_type}).encode(),
        "model.safetensors": weights(b"weights of " + str(folder).encode()),
        "tokenizer.json": b"{}",
        **(files or {}),
    }
    lay_files(folder, contents)
    if settled:
        settle(folder)
    return folder


def lay_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """A folder with these files alone; names may have folders in them."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def weights(content: bytes) -> bytes:
    """A whole safetensors file, whose one tensor holds these bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return struct.pack("<Q", len(header)) + header + content


def gguf(content: bytes) -> bytes:
    """A whole GGUF file, whose one tensor holds these bytes."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"w", 1, len(content), 24, 0)
    return header + bytes(-len(header) % 32) + content


def settle(folder: Path) -> None:
    """Date a folder and all that is in it back by a day, as a copy made long ago is."""
    yesterday = time.time() - 86400
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (yesterday, yesterday), follow_symlinks=False)


@contextmanager
def temporary_folder(parent: Path | None = None, prefix: str | None = None) -> Iterator[Path]:
    """A context with a folder that is removed at its end, with all that sessions have sealed in it."""
    with TemporaryDirectory(dir=parent, prefix=prefix) as path:
        try:
            yield Path(path)
        finally:
            unseal(Path(path))


def unseal(folder: Path) -> None:
    """Let this user write to all folders and files at and below one, as root can."""
    for inside, folders, files in os.walk(folder):
        for path in (inside, *(os.path.join(inside, name) for name in (*folders, *files))):
            if not os.path.islink(path):
                os.chmod(path, 0o700)
