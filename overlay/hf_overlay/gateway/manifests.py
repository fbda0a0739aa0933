"""Finds the GGUF file that a tag such as `Q4_K_M` names, for llama.cpp.

llama.cpp up to 2025 asks the Hub's registry route `GET /v2/<id>/manifests/<tag>` which file `-hf org/name:tag` means,
and reads `ggufFile` and `mmprojFile` from the answer (common/download.cpp, common_get_hf_file). Later releases choose
among all files themselves; the choice made here is the same (find_best_model).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_overlay.models import File

_BESIDE_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""Parts of the names of GGUF files that are not models by themselves."""
_SPLIT = re.compile(r"-(\d{5})-of-\d{5}\.gguf$", re.IGNORECASE)
_WITHOUT_TAG = ("Q4_K_M", r"Q4_\w+", "Q8_0")
"""Patterns of the tags that are looked for when none is given, in this order."""
LATEST = "latest"
"""The tag that means that none is given."""


def chosen(files: Iterable[File], tag: str) -> tuple[File, File | None] | None:
    """Return the GGUF file that a tag means (the first one of a split model), and its projector or None.

    Returns None when no file has the tag, or there is no GGUF file.
    """
    ggufs = [file for file in files if file.name.lower().endswith(".gguf")]
    models = [file for file in ggufs if _is_model(file.name)]
    wanted = _WITHOUT_TAG if tag == LATEST else (re.escape(tag),)
    found = next((file for each in wanted for file in models if _is_tagged(file.name, each)), None)
    if found is None and tag == LATEST:
        found = next(iter(models), None)
    if found is None:
        return None
    return found, next((file for file in ggufs if "mmproj" in _last(file.name)), None)


def _is_model(name: str) -> bool:
    split = _SPLIT.search(name)
    is_first = split is None or int(split[1]) == 1
    return is_first and not any(each in _last(name) for each in _BESIDE_MODELS)


def _is_tagged(name: str, pattern: str) -> bool:
    return re.search(rf"(?:^|[-._/]){pattern}(?:[-./]|$)", name, re.IGNORECASE) is not None


def _last(name: str) -> str:
    return name.rpartition("/")[2].lower()
