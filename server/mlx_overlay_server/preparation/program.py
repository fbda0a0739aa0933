"""The program of a preparation process: it reads work from a socket, does it piece by piece, and sends results."""

from __future__ import annotations

import pickle
import sys
from typing import Any

from mlx_overlay_server.frames import Result, connected, packed, result_of


def main() -> None:
    """Work until the server closes the socket."""
    server, frames = connected()

    from mlx_overlay_server.imports import import_transformers

    import_transformers()
    from mlx_overlay_server import garbage
    from mlx_overlay_server.engine import tokenizers  # imports everything that models need, before the first one comes
    from mlx_overlay_server.preparation.work import WORK

    garbage.begin()

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
            server.sendall(packed(result_of(lambda: models.__setitem__(key, _model(data, tokenizer, known)))))  # noqa: B023
        else:
            name, key, arguments = rest
            server.sendall(packed(result_of(lambda: WORK[name](models[key], *pickle.loads(arguments)))))  # noqa: B023, S301


def _model(data: bytes, tokenizer: bytes, known: Any) -> Any:
    """Return a model with its whole tokenizer: `known`, else the pickled one, else the model's own."""
    from mlx_overlay_server.engine import tokenizers

    model = pickle.loads(data)  # noqa: S301
    if known is None and not tokenizer:
        return model
    return tokenizers.with_whole(model, known if known is not None else pickle.loads(tokenizer))  # noqa: S301


if __name__ == "__main__":
    main()
