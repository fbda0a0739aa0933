"""How a KV cache is kept in files: the names of its blocks, and what is in a file. Knows no MLX.

What grows by a row for each token is cut into blocks of `BLOCK` tokens, so that conversations share the files of what
they begin with. A block's name is a hash of the model, of the block before it and of its tokens: so it stands for all
tokens up to its end. What cannot be cut, such as sliding windows and recurrent states, is kept as a state after a
number of tokens: a file that holds it whole, together with the rows of the tokens since the last block.

A file has the layout of safetensors: the length of a header as eight bytes, the header as JSON, arrays one after
another. Its metadata hold the file's name, and a checksum of all that is in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mlx_overlay_server.engine.arrays import TYPES, Array, Tokens
from mlx_overlay_server.engine.disk.store import SUFFIX, Store

BLOCK = 256
"""Tokens of a block."""
_DIGEST_BYTES = 20
_LENGTH_BYTES = 8


class Damaged(Exception):
    """A file does not hold what its name says."""


class Content(NamedTuple):
    """What a file holds."""

    arrays: dict[str, Array]
    outline: Any = None
    """Anything that JSON can say."""


class Chain(NamedTuple):
    """The names of a sequence's blocks."""

    root: str
    """The hash of what comes before the first block: the model."""
    tokens: Tokens
    blocks: tuple[str, ...]
    """Names of the files of all full blocks."""

    def state(self, size: int) -> str:
        """Return the name of the file of the state after `size` tokens."""
        full, tail = divmod(size, BLOCK)
        before = self.before(full)
        last = _digest(bytes.fromhex(before), self.tokens[full * BLOCK : size])
        return f"{before}-{tail}-{last}{SUFFIX}"

    def before(self, count: int) -> str:
        """Return the hash that stands for the first `count` blocks."""
        return self.blocks[count - 1].removesuffix(SUFFIX) if count else self.root


def chain(root: str, tokens: Tokens) -> Chain:
    """Return the names of a sequence's blocks. `root`: the hash of all else that its KV cache depends on."""
    blocks: list[str] = []
    digest = root
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        digest = _digest(bytes.fromhex(digest), tokens[start : start + BLOCK])
        blocks.append(digest + SUFFIX)
    return Chain(root, tokens, tuple(blocks))


def root(*parts: str) -> str:
    """Return the hash that stands for some texts in their order."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _digest(before: bytes, tokens: Tokens) -> str:
    data = before + tokens.astype("<i8").tobytes()
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def encode(name: str, content: Content) -> list[memoryview | bytes]:
    """Return the bytes of a file, in parts."""
    header: dict[str, Any] = {}
    data: list[memoryview] = []
    offset = checksum = 0
    for key, array in content.arrays.items():
        values = np.ascontiguousarray(array.values)
        shape = list(array.values.shape)  # ascontiguousarray makes a number a vector
        header[key] = {"dtype": array.type, "shape": shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
        if values.nbytes:
            data.append(values.reshape(-1).view(np.uint8).data)
            checksum = zlib.crc32(data[-1], checksum)
    metadata = {"format": "mlx", "name": name, "outline": json.dumps(content.outline)}
    metadata["checksum"] = _checksum(header, metadata, checksum)
    head = _json({"__metadata__": metadata, **header})
    head += b" " * (-len(head) % _LENGTH_BYTES)  # arrays begin where any type may
    return [len(head).to_bytes(_LENGTH_BYTES, "little"), head, *data]


def decode(name: str, file: memoryview) -> Content:
    """Return what a file holds. Raises Damaged."""
    try:
        return _decode(name, file)
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        raise Damaged(name) from None


def _decode(name: str, file: memoryview) -> Content:
    start = _LENGTH_BYTES + int.from_bytes(file[:_LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(bytes(file[_LENGTH_BYTES:start]))
    metadata = header.pop("__metadata__")
    checksum = metadata.pop("checksum")
    data = file[start:]
    if metadata["name"] != name or checksum != _checksum(header, metadata, zlib.crc32(data)):
        raise ValueError("not what was written")
    arrays = {key: _array(facts, data) for key, facts in header.items()}
    if sum(array.values.nbytes for array in arrays.values()) != len(data):
        raise ValueError("too short or too long")
    return Content(arrays, json.loads(metadata["outline"]))


def _array(facts: Mapping[str, Any], data: memoryview) -> Array:
    start, end = facts["data_offsets"]
    shape, type_ = tuple(facts["shape"]), TYPES[facts["dtype"]]
    if math.prod(shape) * np.dtype(type_).itemsize != end - start:
        raise ValueError("a shape that does not fit")
    flat = np.frombuffer(data[start:end], dtype=type_) if end > start else np.empty(0, dtype=type_)
    return Array(facts["dtype"], flat.reshape(shape))


def _checksum(header: Mapping[str, Any], metadata: Mapping[str, str], data: int) -> str:
    return f"{zlib.crc32(_json([header, metadata]), data):08x}"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Plan(NamedTuple):
    """What to read of a sequence."""

    size: int
    """Its tokens at the start, of which all is in these files."""
    blocks: tuple[str, ...]
    state: str | None
    """Its file, for kinds of KV caches that have states."""
    nbytes: int
    """Bytes of all these files."""


def plan(names: Chain, store: Store, *, has_rows: bool, has_states: bool, budget: int) -> Plan | None:
    """Return what to read for most tokens of a sequence, within a budget of bytes; None for none.

    `has_rows`, `has_states`: what its kind of KV cache holds.
    """
    count = nbytes = 0
    sizes = [0]
    """Bytes of the first blocks, by their number."""
    while count < len(names.blocks):
        if has_rows:
            nbytes += store.size(names.blocks[count])
            if names.blocks[count] not in store or nbytes > budget:
                break
        count += 1
        sizes.append(nbytes)
    if not has_states:
        return Plan(count * BLOCK, names.blocks[:count], None, sizes[count]) if count else None
    for full in range(count, -1, -1):
        tails = sorted((_tail(name) for name in store.states(names.before(full) + SUFFIX)), reverse=True)
        for size in (full * BLOCK + tail for tail in tails if full * BLOCK + tail <= len(names.tokens)):
            state = names.state(size)
            needed = sizes[full] + store.size(state)
            if state in store and needed <= budget:
                return Plan(size, names.blocks[:full] if has_rows else (), state, needed)
    return None


def _tail(name: str) -> int:
    return int(name.split("-")[1])


def rows(arrays: Mapping[str, Array], start: int, end: int) -> dict[str, Array]:
    """Return the rows of some tokens of arrays that have one row for each token."""
    return {key: Array(each.type, each.values[:, :, start:end]) for key, each in arrays.items()}


class Gathered:
    """Arrays of many tokens that are put together from those of their blocks."""

    def __init__(self, size: int) -> None:
        """`size`: tokens in all."""
        self._size = size
        self.done = 0
        """Tokens that are there."""
        self._arrays: dict[str, Array] = {}

    def add(self, part: Mapping[str, Array], count: int) -> None:
        """Add the next tokens. Raises Damaged where these are not so many, or not of the kind of those before."""
        if any(each.values.shape[2:3] != (count,) for each in part.values()):
            raise Damaged("a block of another size")
        shapes = {key: (each.type, each.values.shape[:2], each.values.shape[3:]) for key, each in part.items()}
        if not self.done:
            for key, each in part.items():
                before, after = each.values.shape[:2], each.values.shape[3:]
                made = np.empty((*before, self._size, *after), dtype=each.values.dtype)
                self._arrays[key] = Array(each.type, made)
        mine = {key: (each.type, each.values.shape[:2], each.values.shape[3:]) for key, each in self._arrays.items()}
        if shapes != mine:
            raise Damaged("blocks of different kinds")
        for key, each in part.items():
            self._arrays[key].values[:, :, self.done : self.done + count] = each.values
        self.done += count

    def arrays(self) -> dict[str, Array]:
        """Return the arrays, of the tokens that are there."""
        return rows(self._arrays, 0, self.done)
