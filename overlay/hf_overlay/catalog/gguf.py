"""The length of a GGUF file, by its header.

The header is a fixed part, the metadata as key-value pairs, and a description of each tensor. The tensors' data follow,
aligned. Most of a header is the tokenizer's vocabulary, whose strings can only be passed one by one: 4 MB and 30 ms for
a large one. The layout, and the sizes of tensors, are those of gguf-py 0.19 (gguf_reader.py, constants.py).
"""

from __future__ import annotations

import os
import struct
from typing import Final

from hf_overlay.progress import alive

MAX_HEADER = 2**25
"""A longer header than this, in bytes, is not read: no vocabulary comes near."""
_READS: Final = (2**16, 2**20, 2**22, MAX_HEADER)
"""How much of the file is read, step by step, until the header ends in it."""

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_START = struct.Struct("<4sIQQ")
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a type of metadata -> bytes of a value; strings and arrays are none of them."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = b"general.alignment"
_MAX_DIMENSIONS = 4

_TENSOR_BYTES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Number of a type of tensor -> elements in a block, and bytes of a block."""


class _Unknown(Exception):
    """The header holds something that this module does not know, as a later version may."""


def problem(fd: int, size: int) -> str:
    """How the GGUF file of `size` bytes open at `fd` is not whole; empty when it is, or nothing shows that.

    Raises OSError.
    """
    header = b""
    for limit in _READS:
        header += os.pread(fd, limit - len(header), len(header))
        alive()
        if not header.startswith(b"GGUF"[: len(header)]):
            return "is not a GGUF file; copy or download it again"
        try:
            end = _end(header)
        except (struct.error, OverflowError):  # the header goes on, or something in it is longer than any file
            if len(header) >= size:
                return f"holds {size} bytes, less than its header: still being copied?"
        except _Unknown:
            return ""
        else:
            return f"holds {size} of {end} bytes: still being copied?" if size < end else ""
    return ""


def _end(data: bytes) -> int:
    """The length of the whole file that begins with `data`; raises struct.error where `data` is not all of its header.

    Of tensors of an unknown type, only the first byte counts.
    """
    _, version, tensors, pairs = _START.unpack_from(data)
    if version not in (2, 3):  # in files for big-endian machines, the bytes of this number are the other way round
        raise _Unknown
    alignment = 32
    position: int = _START.size
    for _ in range(pairs):
        key = position + 8
        position = key + _U64(data, position)[0]
        (kind,) = _U32(data, position)
        if kind == 4 and data[key:position] == _ALIGNMENT:
            (alignment,) = _U32(data, position + 4)
        position = _after_value(data, position + 4, kind)
    end = 0
    for _ in range(tensors):
        position += 8 + _U64(data, position)[0]
        (dimensions,) = _U32(data, position)
        if dimensions > _MAX_DIMENSIONS:
            raise _Unknown
        elements = 1
        for number in range(dimensions):
            elements *= _U64(data, position + 4 + 8 * number)[0]
        position += 4 + 8 * dimensions
        (kind,) = _U32(data, position)
        (offset,) = _U64(data, position + 4)
        position += 12
        block, block_bytes = _TENSOR_BYTES.get(kind, (elements or 1, 1))
        end = max(end, offset + elements // block * block_bytes)
    if position > len(data):
        raise struct.error
    if alignment == 0:
        raise _Unknown
    return position + -position % alignment + end if tensors else position


def _after_value(data: bytes, position: int, kind: int) -> int:
    """The position after a value of metadata that begins at `position`."""
    count = 1
    if kind == _ARRAY:
        (kind,) = _U32(data, position)
        (count,) = _U64(data, position + 4)
        position += 12
    if kind != _STRING:
        return position + count * _bytes_of(kind)
    for _ in range(count):
        position += 8 + _U64(data, position)[0]
    return position


def _bytes_of(kind: int) -> int:
    if kind not in _VALUE_BYTES:
        raise _Unknown
    return _VALUE_BYTES[kind]
