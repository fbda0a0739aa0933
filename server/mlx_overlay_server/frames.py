"""The messages between the server and the programs of its own that run beside it.

They speak frames over a socket, which is the program's standard input: eight bytes with a length, then a pickled value.
What a preparation process is told (`preparation/program.py`):

    to the process                                          from the process
                                                            None, once it is ready
    ("tokenizer", key of its model, pickled arguments)      Result, of `engine.tokenizers.sent`
    ("model", key, the pickled Loaded, its pickled whole    Result
        tokenizer; b"": it was just read, sys.path)
    ("forget", key)                                         nothing
    ("work", name, key of a model, pickled arguments)       Result

What a process that transcribes or speaks is told (`speech/program.py`):

                                                            None, once it is ready
    ("load", the model's folder)                            Result
    ("recording", some bytes of it), any number of times    nothing
    ("run", a TranscribeRequest)                            Results of str, any number of them, then of a Transcript
    ("run", a SpeakRequest)                                 Results of Sound, any number of them, then one of None
"""

from __future__ import annotations

import os
import pickle
import queue
import socket
import struct
import threading
import traceback
from collections.abc import Callable
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


# For the programs.


def connected() -> tuple[socket.socket, queue.SimpleQueue[Any]]:
    """Return the socket to the server, and the messages from it as they come. The process ends with the server."""
    server = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:  # a library, or code that came with a model, may read its input
        os.dup2(nothing.fileno(), 0)
    frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(server, frames.put), daemon=True).start()
    return server, frames


def result_of(work: Callable[[], Any]) -> Result:
    """Return what became of a piece of work."""
    try:
        return Result(work())
    except ServerError as error:
        return Result(refusal=error)
    except BaseException as error:  # noqa: BLE001 - the boundary; a panic in a library written in Rust is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" at {place[0].filename}:{place[0].lineno}" if place else ""
        return Result(unexpected=f"{type(error).__name__}{where}")


def _read(server: socket.socket, put: Callable[[Any], None]) -> None:
    """Read frames. The process ends with the server, whatever it is doing."""
    try:
        with server.makefile("rb") as file:
            while head := file.read(LENGTH.size):
                put(pickle.loads(file.read(LENGTH.unpack(head)[0])))  # noqa: S301 - from the server, which started us
    finally:
        os._exit(0)
