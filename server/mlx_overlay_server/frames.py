"""The messages between the server and its preparation processes.

They speak frames over a socket: eight bytes with a length, then a pickled value.

    to the process                                          from the process
                                                            None, once it is ready
    ("tokenizer", key of its model, pickled arguments)      Result, of `engine.tokenizers.sent`
    ("model", key, the pickled Loaded, its pickled whole    Result
        tokenizer; b"": it was just read, sys.path)
    ("forget", key)                                         nothing
    ("work", name, key of a model, pickled arguments)       Result
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, NamedTuple

from mlx_overlay_server.errors import ServerError

LENGTH = struct.Struct("<Q")


class Result(NamedTuple):
    """The outcome of a piece of work: a value, an error for the client, or an error that nobody expected."""

    value: Any = None
    refusal: ServerError | None = None
    unexpected: str | None = None
    """The unexpected error's type and its place in the code. Its text is left out: it may hold a prompt."""


def packed(value: object) -> bytes:
    """Return a value as a frame."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data
