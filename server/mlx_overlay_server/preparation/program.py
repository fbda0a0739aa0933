"""The program of a preparation process: it reads work, does one piece after the other, and writes the results."""

from __future__ import annotations

import os
import pickle
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.preparation.frames import LENGTH, Result, packed


def main() -> None:
    """Work until the server closes the socket."""
    server = socket.socket(fileno=os.dup(0))
    frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(server, frames.put), daemon=True).start()

    from mlx_overlay_server.engine import mlx  # noqa: F401 - imports all that models need: before the first one comes
    from mlx_overlay_server.preparation.work import WORK

    server.sendall(packed(None))
    models: dict[str, Any] = {}
    while True:
        kind, *rest = frames.get()
        if kind == "forget":
            models.pop(rest[0], None)
        elif kind == "model":
            key, data, path = rest
            # A tokenizer may be code that came with its model: it is where the server has found it.
            sys.path += [folder for folder in path if folder not in sys.path]
            server.sendall(packed(_result(lambda: models.__setitem__(key, pickle.loads(data)))))  # noqa: B023, S301
        else:
            name, key, arguments = rest
            server.sendall(packed(_result(lambda: WORK[name](models[key], *pickle.loads(arguments)))))  # noqa: B023, S301


def _read(server: socket.socket, put: Callable[[Any], None]) -> None:
    """Read frames. The process ends with the server, whatever it is doing."""
    try:
        with server.makefile("rb") as file:
            while head := file.read(LENGTH.size):
                put(pickle.loads(file.read(LENGTH.unpack(head)[0])))  # noqa: S301 - from the server, which started us
    finally:
        os._exit(0)


def _result(work: Callable[[], Any]) -> Result:
    try:
        return Result(work())
    except ServerError as error:
        return Result(refusal=error)
    except BaseException as error:  # noqa: BLE001 - the boundary; a panic in a tokenizer written in Rust is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = f" at {place[0].filename}:{place[0].lineno}" if place else ""
        return Result(unexpected=f"{type(error).__name__}{where}")


if __name__ == "__main__":
    main()
