"""Checks a model's folder before mlx-lm opens it, since folders come from anywhere.

mlx-lm and transformers open every file that has the right name. A named pipe would block them for ever, and a link to a
device never ends.
"""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_overlay.progress import alive

logger = logging.getLogger("mlx_overlay_server")

MAX_CONFIG_BYTES = 128 * 2**20
"""The most bytes of a file that is not weights. The largest tokenizers known have about 40 MB."""
_PIECE_BYTES = 1 << 22
_WEIGHTS = ".safetensors"
_CONFIGS = (".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_TEMPLATES = "additional_chat_templates"

_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 1 << 31),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 100),
}
"""The values of generation_config.json that are used, each with its smallest and largest sensible value."""


class Unsuitable(Exception):
    """The folder holds a file that must not be opened. The text says which and why, without the folder's path."""


def check(path: str) -> None:
    """Check that every file that a load opens is a regular file of a sensible size, and can be read.

    This takes as long as the disk does, so call it where it can be given up on; it reports progress. Raises Unsuitable
    or OSError.
    """
    modules = [name for name in _names(path) if name[0].isdigit()]  # of sentence-transformers, such as 1_Pooling
    for folder, prefix in ((path, ""), *((os.path.join(path, name), f"{name}/") for name in (_TEMPLATES, *modules))):
        for name in _names(folder):
            alive()
            if name.endswith((_WEIGHTS, *_CONFIGS)):
                _check_file(os.path.join(folder, name), prefix + name)


def read_ahead(path: str) -> None:
    """Read a model's weights once, so that the next reader finds them in the system's page cache.

    Weights larger than half of the memory are left out, since the page cache could not hold them. Raises OSError.
    """
    names = [name for name in _names(path) if name.endswith(_WEIGHTS)]
    size = sum(os.path.getsize(f"{path}/{name}") for name in names)
    if size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
        return
    piece = bytearray(_PIECE_BYTES)
    for name in names:
        with open(f"{path}/{name}", "rb", buffering=0) as file:
            while file.readinto(piece):
                alive()


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _check_file(path: str, name: str) -> None:
    try:
        if stat.S_ISDIR(_regular(os.stat(path), name).st_mode):
            return
        # A pipe may have taken the file's place: do not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:  # a broken link counts as no file
        return
    with os.fdopen(descriptor, "rb") as file:
        size = _regular(os.fstat(descriptor), name).st_size
        if name.endswith(_WEIGHTS):
            file.read(8)  # a disk that is gone fails here, where a load can be given up, and not on the engine's thread
        elif size > MAX_CONFIG_BYTES:
            raise Unsuitable(
                f"{name} has {size / 2**20:.0f} MiB; a file that is not weights may have {MAX_CONFIG_BYTES >> 20}"
            )


def _regular(status: os.stat_result, name: str) -> os.stat_result:
    """Return the status of a file or folder. Raises Unsuitable for anything else."""
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise Unsuitable(f"{name} is not a regular file")
    return status


def sampling_defaults(path: Path) -> dict[str, Any]:
    """Return a model's own sampling parameters, from its generation_config.json.

    They are {} when the file is missing or unreadable. Values that make no sense are left out, with a line in the log.
    """
    try:
        found = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(_usable(found, path)) if isinstance(found, dict) else {}


def _usable(found: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    if isinstance(found.get("do_sample"), bool):
        yield "do_sample", found["do_sample"]
    for name, (least, most) in _RANGES.items():
        value = found.get(name)
        if value is None:
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
            yield name, value
        else:
            logger.warning(
                "%s/generation_config.json: %s is ignored, because it is not a number from %g to %g",
                path,
                name,
                least,
                most,
            )


def end_tokens(value: Any, path: Path) -> int | list[int] | None:
    """Return the `eos_token_id` of a configuration; None where it is missing, or is no token ids, which is logged."""
    ids = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        return value  # type: ignore[no-any-return]
    logger.warning("%s: eos_token_id is ignored, because it is not a token id or a list of them", path)
    return None
