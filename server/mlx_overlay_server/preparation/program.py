"""The program of a preparation process: it reads work from a socket, does it piece by piece, and sends results."""

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
from mlx_overlay_server.frames import LENGTH, Result, packed


def main() -> None:
    """Work until the server closes the socket."""
    server = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:  # a tokenizer may be code that reads standard input
        os.dup2(nothing.fileno(), 0)
    frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(server, frames.put), daemon=True).start()

    from mlx_overlay_server.imports import import_transformers

    import_transformers()
    from mlx_overlay_server.engine import tokenizers  # imports everything that models need, before the first one comes
    from mlx_overlay_server.preparation.work import WORK

    server.sendall(packed(None))
    models: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    """The tokenizer that was read last, by its model's key."""
    while True:
        kind, *rest = frames.get()
        if kind == "forget":
            models.pop(rest[0], None)
        elif kind == "tokenizer":
            key, arguments = rest
            data, read = tokenizers.sent(*pickle.loads(arguments))  # noqa: S301
            whole = {key: read}
            server.sendall(packed(Result(data)))
        elif kind == "model":
            key, data, tokenizer, path = rest
            # A tokenizer may be code that came with its model, which the server has put on this path.
            sys.path += [folder for folder in path if folder not in sys.path]
            known = whole.pop(key, None)
            server.sendall(packed(_result(lambda: models.__setitem__(key, _model(data, tokenizer, known)))))  # noqa: B023
        else:
            name, key, arguments = rest
            server.sendall(packed(_result(lambda: WORK[name](models[key], *pickle.loads(arguments)))))  # noqa: B023, S301


def _read(server: socket.socket, put: Callable[[Any], None]) -> None:
    """Read messages and hand them to `put`. When the server has ended, end this process, whatever it is doing."""
    try:
        with server.makefile("rb") as file:
            while head := file.read(LENGTH.size):
                put(pickle.loads(file.read(LENGTH.unpack(head)[0])))  # noqa: S301 - from the server, which started us
    finally:
        os._exit(0)


def _model(data: bytes, tokenizer: bytes, known: Any) -> Any:
    """Return a model with its whole tokenizer: `known`, else the pickled one, else the model's own."""
    from mlx_overlay_server.engine import tokenizers

    model = pickle.loads(data)  # noqa: S301
    if known is None and not tokenizer:
        return model
    return tokenizers.with_whole(model, known if known is not None else pickle.loads(tokenizer))  # noqa: S301


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
