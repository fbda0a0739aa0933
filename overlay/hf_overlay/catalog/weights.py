"""Whether a model's weights are all there: every shard that its index or its numbering names, and all bytes of each."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable

from hf_overlay.catalog import links
from hf_overlay.catalog.files import Unfit, read_json
from hf_overlay.catalog.memo import Memo, stamp
from hf_overlay.models import Code, File
from hf_overlay.progress import alive

SUFFIXES = links.WEIGHTS
_INDEX = "model.safetensors.index.json"
_SHARD = r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.gguf)"
_DATA_END = rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d+)\s*\]'
_MAX_HEADER = 100_000_000
"""The longest header that readers of safetensors accept."""
_READ_HEADER = 2**24
"""A header longer than this is not read: such a file only has to hold it."""

Problems = Memo[str]
"""For weight files, by path: what is wrong with the file; empty when it is whole."""


def check(
    path: str,
    files: Collection[File],
    broken: Collection[str],
    *,
    required: bool,
    problems: Problems,
    begins: str = "model",
) -> None:
    """Raise Unfit while weights in the folder `path` are missing, cut off or still being copied; OSError.

    `broken` are links that lead nowhere. `required` is set for models that mlx-lm or the server shall load: they need
    a `.safetensors` file whose name begins with `begins`, and their GGUF files, which nobody reads then, may be
    incomplete. Where GGUF files are all the weights there are, those in folders of their own count, too. `problems`
    remembers files that are unchanged, so that each is read once.
    """
    suffixes = (".safetensors",) if required else (".safetensors", ".gguf")
    sizes = {file.name: file.size for file in files}
    is_gguf = not required and not any(name.endswith((".safetensors", ".bin")) for name in sizes)
    found = {name for name in sizes if name.endswith(suffixes) and (is_gguf or "/" not in name)}
    named = _named_in_index(path) if _INDEX in sizes else set()
    for name in found:
        if shard := re.fullmatch(_SHARD, name):
            named.update(f"{shard[1]}-{number:05}-of-{shard[3]}{shard[4]}" for number in range(1, int(shard[3]) + 1))
    if missing := sorted(named - sizes.keys()):
        kind = "a broken link" if missing[0] in broken else "missing"
        text = f"{len(missing)} of {len(named)} shards not there ({missing[0]} is {kind}): still being copied?"
        raise Unfit(Code.INCOMPLETE, text)
    if empty := sorted(name for name in named | found if sizes[name] == 0):
        raise Unfit(Code.INCOMPLETE, f"{empty[0]} is empty: still being copied?")
    is_pipeline = "model_index.json" in sizes
    for name in sorted(sizes):
        is_read = name in found or (name.endswith(suffixes) and (name in named or is_pipeline))
        if is_read and (problem := _problem(f"{path}/{name}", sizes[name], problems)):
            raise Unfit(Code.INCOMPLETE, f"{name} {problem}")
    # The pattern is the one that mlx_lm.utils.load_model globs for; mlx_audio.utils.load_weights takes every name.
    if required and not any(name.startswith(begins) for name in found):
        if dangling := [name for name in broken if name.endswith(".safetensors")]:
            raise Unfit(Code.BROKEN_LINK, f"{dangling[0]} is a broken link")
        raise Unfit(Code.NO_WEIGHTS, _why_none(sizes, begins))


def _why_none(names: Iterable[str], begins: str) -> str:
    """Return why a folder has no weights that are read, as the end of a sentence."""
    pickle = next((name for name in sorted(names) if name.startswith("pytorch_model") and name.endswith(".bin")), None)
    if pickle is None:
        return f"has no weights ({begins}*.safetensors)"
    return (
        f"has weights in {pickle} alone, a pickle, which may hold code and is never opened: have transformers write "
        "model.safetensors (from_pretrained, then save_pretrained)"
    )


def _named_in_index(path: str) -> set[str]:
    weight_map = read_json(f"{path}/{_INDEX}").get("weight_map")
    if not isinstance(weight_map, dict):
        raise Unfit(Code.BAD_CONFIG, f"{_INDEX} has no weight_map; copy it again")
    return {str(shard) for shard in weight_map.values()}


def _problem(path: str, size: int, problems: Problems) -> str:
    problem = problems.recall(path)
    if problem is None:
        # System calls, and the stamp from the open file: of all that a first scan does for a model, this takes longest.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            looked = ((path, stamp(os.fstat(fd))),)
            problem = _gguf_problem(fd, size) if path.endswith(".gguf") else safetensors_problem(fd, size)
        finally:
            os.close(fd)
        problems.remember(path, problem, looked)
    return problem


def _gguf_problem(fd: int, size: int) -> str:
    from hf_overlay.catalog import gguf  # only where there is such a file

    return gguf.problem(fd, size)


def safetensors_problem(fd: int, size: int) -> str:
    """How the safetensors file of `size` bytes open at `fd` is not whole, by its header; empty when it is.

    Raises OSError.

    The file is 8 bytes with the length of the header, the header, and the tensors, whose last byte the header tells.
    More bytes than that do no harm to a reader.
    """
    alive()
    start = os.read(fd, 9)
    if len(start) < 9:
        return f"holds {size} bytes, less than a header: still being copied?"
    length = int.from_bytes(start[:8], "little")
    if not 0 < length <= _MAX_HEADER or start[8:] != b"{":
        return "is not a safetensors file; copy or download it again"
    end = 8 + length
    if end <= size and length <= _READ_HEADER:
        header = os.read(fd, length - 1)
        if not _ends_at(header, size - end):
            end += max(map(int, re.findall(_DATA_END, header)), default=0)
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
