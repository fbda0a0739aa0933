"""Programs that use the Hub, each with an environment of its own, without paying for each one's imports.

huggingface_hub reads its environment once, when it is imported; what it imports itself costs most of the time and does
not read it. So one process a release imports the latter and forks a program for each `Clients.start`. Only
`python client.py` imports huggingface_hub.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.processes import SECONDS, answer_to, answering

_HEAVY = ("filelock", "fsspec", "httpx", "packaging.version", "requests", "tqdm.auto", "typer", "yaml")


class Clients:
    """The process that forks them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._process = answering(__file__, environ)

    @contextmanager
    def start(self, environ: Mapping[str, str]) -> Iterator[Callable[..., Any]]:
        """A program in that environment: `call(name, **arguments)` is the answer of one of CALLS below.

        That is a value, or `{"raises": the name of the error}`.
        """
        assert self._ask({"environ": dict(environ)}) == "started"

        def call(name: str, **arguments: Any) -> Any:
            return self._ask({"call": name, "arguments": arguments})

        try:
            yield call
        finally:
            self._ask({"end": True})

    def close(self) -> None:
        self._process.communicate(timeout=SECONDS)

    def _ask(self, request: object) -> Any:
        line = answer_to(self._process, json.dumps(request))
        assert line, f"the client ended, or hung and was killed, in {request}"
        reply = json.loads(line)
        assert "crash" not in reply, f"{request}: {reply.get('crash')}"
        return reply["value"]


@contextmanager
def open_clients(environ: Mapping[str, str]) -> Iterator[Clients]:
    """Clients of the release that `environ` leads Python to."""
    clients = Clients(environ)
    try:
        yield clients
    finally:
        clients.close()


# In the program ------------------------------------------------------------------------------------------------


def _snapshot(**arguments: Any) -> object:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(**arguments))
    return {_in_cache(path): _sha1(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _file(**arguments: Any) -> object:
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(**arguments))
    return {_in_cache(path): _sha1(path)}


def _info(**arguments: Any) -> object:
    from huggingface_hub import HfApi

    return repr(HfApi().repo_info(**arguments))


def _names(**arguments: Any) -> object:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(**arguments)


def _exists(**arguments: Any) -> object:
    from huggingface_hub import HfApi

    return HfApi().file_exists(**arguments)


CALLS: dict[str, Callable[..., object]] = {
    "snapshot": _snapshot,
    "file": _file,
    "info": _info,
    "names": _names,
    "exists": _exists,
}


def _answer(name: str, arguments: dict[str, Any]) -> dict[str, object]:
    try:
        return {"value": CALLS[name](**arguments)}
    except Exception as error:  # noqa: BLE001 - the asking process shall see it
        # OSError and ValueError are what a client's own errors are, up to the releases' differences.
        if isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("huggingface_hub."):
            return {"value": {"raises": type(error).__name__}}
        return {"crash": traceback.format_exc()}


def _in_cache(path: Path) -> str:
    """A path from its repo's folder on: where the cache is differs."""
    parts = path.parts
    repo = next(number for number, part in enumerate(parts) if "--" in part and part.split("--")[0].endswith("s"))
    return "/".join(parts[repo:])


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _serve() -> None:
    # Clients print; only answers may go to the asking process.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for name in _HEAVY:
        with suppress(ImportError):  # not every release needs every one
            importlib.import_module(name)
    is_program = False

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    # One request is written after the other's answer, so none is in a buffer when there are two processes.
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "environ" in request:
            if pid := os.fork():
                os.waitpid(pid, 0)  # it reads on in our place
                reply({"value": "ended"})
            else:
                is_program = True
                os.environ.clear()
                os.environ.update(request["environ"])
                reply({"value": "started"})
        elif "end" in request:
            break
        else:
            reply(_answer(request["call"], request["arguments"]))
    if is_program:
        os._exit(0)  # without what the forking process has yet to flush


if __name__ == "__main__":
    _serve()
