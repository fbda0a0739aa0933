"""Whether a model's weights are all there: every shard that its index or its numbering names, none of them empty."""

from __future__ import annotations

import re
from collections.abc import Collection

from hf_overlay.catalog import links
from hf_overlay.catalog.files import Unfit, read_json
from hf_overlay.models import Code, File

SUFFIXES = links.WEIGHTS
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def check(path: str, files: Collection[File], broken: Collection[str], *, required: bool) -> None:
    """Raise Unfit while weights in the folder `path` are missing, empty or still being copied.

    `broken` are links that lead nowhere. `required` is set for models that mlx-lm shall load: they need a
    `model*.safetensors`.
    """
    sizes = {file.name: file.size for file in files}
    found = {name for name in sizes if name.endswith(".safetensors") and "/" not in name}
    named = _named_in_index(path) if _INDEX in sizes else set()
    for name in found:
        if shard := _SHARD.fullmatch(name):
            named.update(f"{shard[1]}-{number:05}-of-{shard[3]}.safetensors" for number in range(1, int(shard[3]) + 1))
    if missing := sorted(named - sizes.keys()):
        kind = "a broken link" if missing[0] in broken else "missing"
        text = f"{len(missing)} of {len(named)} shards not there ({missing[0]} is {kind}): still being copied?"
        raise Unfit(Code.INCOMPLETE, text)
    if empty := sorted(name for name in named | found if sizes[name] == 0):
        raise Unfit(Code.INCOMPLETE, f"{empty[0]} is empty: still being copied?")
    # The pattern is the one mlx_lm.utils.load_model globs for.
    if required and not any(name.startswith("model") for name in found):
        if dangling := [name for name in broken if name.endswith(".safetensors")]:
            raise Unfit(Code.BROKEN_LINK, f"{dangling[0]} is a broken link")
        raise Unfit(Code.NO_WEIGHTS, "has no weights (model*.safetensors)")


def _named_in_index(path: str) -> set[str]:
    weight_map = read_json(f"{path}/{_INDEX}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise Unfit(Code.BAD_CONFIG, f"{_INDEX} has no weight_map; copy it again")
    return {str(shard) for shard in weight_map.values()}
