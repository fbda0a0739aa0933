"""Arrays outside of MLX: as NumPy sees them, with the name that safetensors has for the type of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TYPES: Mapping[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": np.uint16,  # NumPy has no such type: its bits
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "C64": np.complex64,
}
"""Names of types -> NumPy's types of the same bits. MLX has all of them on every device."""

Tokens = npt.NDArray[np.int64]


class Array(NamedTuple):
    """An array of numbers."""

    type: str
    """Its type's name."""
    values: npt.NDArray[Any]
