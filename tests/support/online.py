"""A person at a shell whose Hub is a loopback one: programs started with and without the overlay, and what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

from tests.support import hubs
from tests.support.hfcache import repo_folder
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import OVERLAY, PYTHON, Finished, eventually, finish, read_line, start

# Calls what it is told on stdin: a function of huggingface_hub, a method of HfApi, or a dotted name of another package.
# It answers on a pipe of its own, as clients print too.
_CLIENT = """
import importlib, json, os, sys

replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
import huggingface_hub


def find(name):
    first, *rest = name.split(".")
    if not rest:
        return getattr(huggingface_hub, name, None) or getattr(huggingface_hub.HfApi(), name)
    found = importlib.import_module(first)
    for each in rest:
        found = getattr(found, each)
    return found


def plain(value):
    return vars(value) if hasattr(value, "__dict__") else list(value) if hasattr(value, "__iter__") else str(value)


for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        value = find(name)(*arguments.pop("", ()), **arguments)
        reply = {"value": list(value) if hasattr(value, "__next__") else value}
        text = json.dumps(reply, default=plain)
    except Exception as error:
        text = json.dumps({"error": type(error).__name__, "message": str(error)})
    replies.write(text + "\\n")
    replies.flush()
"""


class Failure(NamedTuple):
    """The exception that a call raised."""

    error: str
    message: str


class Client:
    """An unmodified huggingface_hub in a process of its own."""

    def __init__(self, process: Popen[bytes], errors: Path) -> None:
        self._process = process
        self._errors = errors
        self.environ: dict[str, str] = self.get("os.environ.copy")

    def get(self, call: str, *positional: Any, **arguments: Any) -> Any:
        """What a call returns."""
        reply = self.ask(call, *positional, **arguments)
        assert "error" not in reply, f"{call}{positional} failed: {reply}"
        return reply["value"]

    def failure(self, call: str, *positional: Any, **arguments: Any) -> Failure:
        """What a call raises."""
        reply = self.ask(call, *positional, **arguments)
        assert "error" in reply, f"{call}{positional} did not fail but gave {reply}"
        return Failure(**{name: reply[name] for name in Failure._fields})

    def said(self) -> str:
        """All that it, and hf-overlay around it, wrote to stderr so far."""
        return self._errors.read_text("utf-8", "surrogateescape")

    def end(self) -> None:
        """Close its stdin and wait until it, and the session around it, are over: without complaint."""
        self.close()
        assert self._process.returncode == 0, self.said()

    def close(self) -> None:
        """The same, whatever it says to that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        eventually(lambda: self._process.poll() is not None, "the client ends when its stdin does")

    def ask(self, call: str, *positional: Any, **arguments: Any) -> dict[str, Any]:
        """Its value, or its error and message."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([call, {"": positional, **arguments}]).encode() + b"\n")
        line = read_line(self._process.stdout)
        assert line, f"the client ended in {call}: {self.said()}"
        reply: dict[str, Any] = json.loads(line)
        return reply


@dataclass(frozen=True)
class Person:
    """A home, a drive with models, a shell's environment, and the Hub that it leads to."""

    hub: LoopbackHub
    home: Path
    models: Path
    environ: Mapping[str, str]

    @property
    def cache(self) -> Path:
        """The real one."""
        return self.home / ".cache" / "huggingface" / "hub"

    @property
    def sessions(self) -> Path:
        return self.home / "sessions"

    def overlaid(self, *command: str, options: Sequence[str] = ()) -> list[str]:
        """A command, as `hf-overlay run` takes it."""
        return [OVERLAY, "run", "--model-path", str(self.models), *options, "--", *command]

    def finish(self, *command: str, options: Sequence[str] = (), **more: str) -> Finished:
        """Run a command through the overlay to its end; `more` is set in the shell before."""
        return finish(self.overlaid(*command, options=options), {**self.environ, **more})

    def succeed(self, *command: str, options: Sequence[str] = (), **more: str) -> Finished:
        """The same, where it must exit 0."""
        done = self.finish(*command, options=options, **more)
        assert done.status == 0, f"{' '.join(command)} exited {done.status}: {done.out}{done.err}"
        return done

    @contextmanager
    def client(
        self, *, release: str = hubs.INSTALLED, options: Sequence[str] = (), before: Sequence[str] = (), **more: str
    ) -> Iterator[Client]:
        """A client in a session of its own, which has ended when the context has.

        `before` is a command that the client's is handed to, such as `env -u NAME`.
        """
        with_release = ("env", *(f"{name}={value}" for name, value in hubs.environment(release).items()))
        command = self.overlaid(*with_release, *before, PYTHON, "-c", _CLIENT, options=options)
        with _client(command, {**self.environ, **more}, self.home) as client:
            yield client

    @contextmanager
    def plain_client(self, *, release: str = hubs.INSTALLED, **more: str) -> Iterator[Client]:
        """A client that knows nothing of an overlay."""
        environ = {**self.environ, **hubs.environment(release), **more}
        with _client([PYTHON, "-c", _CLIENT], environ, self.home) as client:
            yield client

    @contextmanager
    def offline_client(self, *, release: str = hubs.INSTALLED) -> Iterator[Client]:
        """A client that knows nothing of an overlay nor of a network: it has the real cache alone."""
        with self.plain_client(release=release, HF_HUB_OFFLINE="1") as client:
            yield client

    def asked_about(self, repo_id: str) -> list[str]:
        """Requests at the Hub that have to do with a repo in any way."""
        return [f"{request.method} {request.target}" for request in self.hub.requests if repo_id in request.target]

    def downloads(self, repo_id: str) -> dict[str, int]:
        """How often the last byte of each file of a repo went out."""
        names = [name for about, name in self.hub.finished_files() if about == repo_id]
        return {name: names.count(name) for name in names}


@contextmanager
def at_a_shell(top: Path, **options: Any) -> Iterator[Person]:
    """A person with nothing yet but an empty folder for models, as on a drive. `options` are LoopbackHub's.

    In the end the real cache must stand alone (P4), and no session be left.
    """
    home, models = top / "home", top / "drive" / "models"
    home.mkdir()
    models.mkdir(parents=True)
    with LoopbackHub(**options) as hub:
        # The overlay these tests import, wherever it lies, is also the one in processes they start.
        environ = hub.environment(home, HF_OVERLAY_DIR=str(home / "sessions"), **hubs.environment(hubs.INSTALLED))
        person = Person(hub, home, models, environ)
        yield person
        assert not leads_outside(person.cache), f"P4: the real cache depends on what is not in it: {person.cache}"
        left = sorted(entry.name for entry in person.sessions.glob("session-*"))
        assert not left, f"sessions were left behind: {left}"


@contextmanager
def _client(command: Sequence[str], environ: Mapping[str, str], home: Path) -> Iterator[Client]:
    errors = home / f"stderr-{len(list(home.glob('stderr-*')))}"
    with errors.open("wb") as log, start(command, environ, stderr=log) as process:
        client = Client(process, errors)
        try:
            yield client
        finally:
            client.close()
        client.end()


def contents(folder: str | Path) -> dict[str, bytes]:
    """Name -> bytes of what a program finds in a folder, links followed; not what clients keep in it for themselves."""
    top = Path(folder)
    files = [path for path in top.rglob("*") if path.is_file() and ".cache" not in path.relative_to(top).parts]
    return {path.relative_to(top).as_posix(): path.read_bytes() for path in files}


def cached(cache: Path, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
    """What main of a repo holds in a cache, read as bytes from the disk; nothing where it is not there."""
    repo = cache / repo_folder(repo_id, repo_type)
    main = repo / "refs" / "main"
    return contents(repo / "snapshots" / main.read_text()) if main.is_file() else {}


def leads_outside(cache: Path) -> list[str]:
    """Links in a cache that are broken or lead out of it."""
    top = os.path.realpath(cache) + os.sep
    links = [path for path in cache.rglob("*") if path.is_symlink()]
    return [str(link) for link in links if not os.path.realpath(link).startswith(top) or not link.exists()]


def incomplete(cache: Path) -> list[str]:
    """Partial downloads in a cache."""
    return [str(path) for path in cache.rglob("*.incomplete")]
