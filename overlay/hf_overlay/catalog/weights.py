"""Whether a model's weights are all there: every shard that its index or its numbering names, and all bytes of each."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection

from hf_overlay.catalog.files import Unfit, read_json
from hf_overlay.catalog.memo import Memo, stamps
from hf_overlay.models import Code, File

SUFFIXES = (".safetensors", ".gguf", ".bin", ".npz", ".pt", ".pth", ".onnx", ".mlpackage")
"""Ends of the names of weight files, of whatever kind of model."""
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_DATA_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d+)\s*\]')
_MAX_HEADER = 100_000_000
"""The longest header that readers of safetensors accept."""
_READ_HEADER = 2**24
"""A header longer than this is not read: such a file only has to hold it."""

Problems = Memo[str]
"""For weight files, by path: what is wrong with the file; empty when it is whole."""


def check(path: str, files: Collection[File], broken: Collection[str], *, required: bool, problems: Problems) -> None:
    """Raise Unfit while weights in the folder `path` are missing, cut off or still being copied; OSError.

    `broken` are links that lead nowhere. `required` is set for models that mlx-lm shall load: they need a
    `model*.safetensors`. `problems` remembers files that are unchanged, so that each is read once.
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
    is_pipeline = "model_index.json" in sizes
    for name in sorted(sizes):
        is_read = name.endswith((".safetensors", ".gguf")) and ("/" not in name or name in named or is_pipeline)
        if is_read and (problem := _problem(f"{path}/{name}", sizes[name], problems)):
            raise Unfit(Code.INCOMPLETE, f"{name} {problem}")
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


def _problem(path: str, size: int, problems: Problems) -> str:
    problem = problems.recall(path)
    if problem is None:
        looked = stamps([path])
        problem = gguf_problem(path, size) if path.endswith(".gguf") else safetensors_problem(path, size)
        problems.remember(path, problem, looked)
    return problem


def safetensors_problem(path: str, size: int) -> str:
    """How a safetensors file of `size` bytes is not whole, by its header; empty when it is. Raises OSError.

    The file is 8 bytes with the length of the header, the header, and the tensors, whose last byte the header tells.
    More bytes than that do no harm to a reader.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(9)
        if len(start) < 9:
            return f"holds {size} bytes, less than a header: still being copied?"
        (length,) = struct.unpack_from("<Q", start)
        if not 0 < length <= _MAX_HEADER or start[8:] != b"{":
            return "is not a safetensors file; copy or download it again"
        end = 8 + length
        if end <= size and length <= _READ_HEADER:
            header = file.read(length - 1)
            if not _ends_at(header, size - end):
                end += max(map(int, _DATA_END.findall(header)), default=0)
    return f"holds {size} of {end} bytes: still being copied?" if size < end else ""


def _ends_at(header: bytes, end: int) -> bool:
    """Whether the tensors are `end` bytes, as far as two quick searches can tell; False: look at all of them.

    Tensors follow each other without gaps. So where one ends and none begins, there is the end.
    """
    tail = b",%d]" % end
    found = header.rfind(tail)
    while found >= 0 and not header.startswith(b'"data_offsets":', header.rfind(b"[", 0, found) - 15):
        found = header.rfind(tail, 0, found)
    return found >= 0 and b'"data_offsets":[%d,' % end not in header


def gguf_problem(path: str, size: int) -> str:
    """How a GGUF file of `size` bytes is certainly not whole; empty when nothing shows that. Raises OSError.

    Only the fixed part of its header is read. Where the tensors end is known to those who parse all metadata.
    """
    with open(path, "rb", buffering=0) as file:
        start = file.read(24)
    if not start.startswith(b"GGUF"[: len(start)]):
        return "is not a GGUF file; copy or download it again"
    if len(start) < 24:
        return f"holds {size} bytes, less than a header: still being copied?"
    version, tensors, entries = struct.unpack_from("<IQQ", start, 4)
    if version == 1 or version > 0xFFFF:  # other layouts, of which hardly any are left
        return ""
    least = (
        24 + 33 * tensors + 13 * entries
    )  # a tensor: name, rank, one size, type, offset, a byte; an entry: key, type
    return f"holds {size} of at least {least} bytes: still being copied?" if size < least else ""
