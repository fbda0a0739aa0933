"""Every read call of huggingface_hub, in a process of its own, as values that can be compared between two caches.

Importing a huggingface_hub costs a quarter of a second, a call less than a millisecond; so a test keeps one process
for each release and hands it whole lists of calls. Only `python reader.py` imports huggingface_hub.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import SECONDS, answer_to, answering

Call = tuple[str, dict[str, Any]]
"""An operation of this file and its arguments, without the cache."""


class Reader:
    """A process that reads caches with one release."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """`environ` makes that release the one that is imported."""
        self._process = answering(__file__, environ)

    def read(self, cache: str | os.PathLike[str], calls: Sequence[Call]) -> list[Any]:
        """The answer of each call: a value, or `{"raises": its name}`."""
        answers = self._ask({"cache": os.fspath(cache), "calls": calls})
        assert isinstance(answers, list)
        return answers

    def constants(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Every path in huggingface_hub.constants, as it is computed in an environment."""
        constants = self._ask({"environ": dict(environ)})
        assert isinstance(constants, dict)
        return constants

    def close(self) -> None:
        self._process.communicate(timeout=SECONDS)

    def _ask(self, request: object) -> Any:
        line = answer_to(self._process, json.dumps(request))
        assert line, "the process that reads caches ended, or was killed because it hung"
        return json.loads(line)


class _Readers(Mapping[str, Reader]):
    """A reader for each release, started when it is first asked for."""

    def __init__(self, environments: Mapping[str, Mapping[str, str]], stack: ExitStack) -> None:
        self._environments = environments
        self._stack = stack
        self._started: dict[str, Reader] = {}

    def __getitem__(self, release: str) -> Reader:
        if release not in self._started:
            self._started[release] = Reader(self._environments[release])
            self._stack.callback(self._started[release].close)
        return self._started[release]

    def __iter__(self) -> Iterator[str]:
        return iter(self._environments)

    def __len__(self) -> int:
        return len(self._environments)


@contextmanager
def open_readers(home: Path, environments: Mapping[str, Mapping[str, str]]) -> Iterator[Mapping[str, Reader]]:
    """A reader for each release, given what it takes to import it; `home` is for what clients write of their own."""
    alone = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_VERBOSITY": "critical"}
    with ExitStack() as stack:
        yield _Readers({release: {**alone, **environ} for release, environ in environments.items()}, stack)


# In the process ------------------------------------------------------------------------------------------------


def scan(cache: str) -> dict[str, Any]:
    """Everything `scan_cache_dir` reports but times and blobs, which two caches cannot share."""
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(cache)
    return {
        "repos": sorted((_repo(cache, repo) for repo in info.repos), key=lambda repo: str(repo["path"])),
        "warnings": sorted(_without(cache, str(warning)) for warning in info.warnings),
        "incomplete": sorted(_relative(cache, each.file_path) for each in getattr(info, "incomplete_files", ())),
        "size": info.size_on_disk,
    }


def snapshot(cache: str, **arguments: Any) -> dict[str, Any]:
    """`snapshot_download` without a network: the folder, and the bytes of all that is in it."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(cache_dir=cache, local_files_only=True, **arguments)
    names = sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.exists(os.path.join(parent, name))
    )
    return {"path": _relative(cache, folder), "files": {name: _sha1(os.path.join(folder, name)) for name in names}}


def file(cache: str, **arguments: Any) -> list[str]:
    """`hf_hub_download` without a network: the path and its bytes."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(cache_dir=cache, local_files_only=True, **arguments)
    return [_relative(cache, path), _sha1(path)]


def cached(cache: str, **arguments: Any) -> Any:
    """`try_to_load_from_cache`: the path and its bytes, null, or `known to be absent`."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(cache_dir=cache, **arguments)
    if path is None:
        return None
    return [_relative(cache, path), _sha1(path)] if isinstance(path, str) else "known to be absent"


def tree(cache: str, **arguments: Any) -> Any:
    """`get_cached_repo_tree`: size and blob id by name; null in releases that do not have it."""
    import huggingface_hub

    if not hasattr(huggingface_hub, "get_cached_repo_tree"):
        return None
    files = huggingface_hub.get_cached_repo_tree(cache_dir=cache, **arguments)
    return {file.path: [file.size, file.blob_id] for file in files}


_OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation for operation in (scan, snapshot, file, cached, tree)
}


def _repo(cache: str, repo: Any) -> dict[str, Any]:
    return {
        "path": _relative(cache, repo.repo_path),
        "id": repo.repo_id,
        "type": repo.repo_type,
        "size": repo.size_on_disk,
        "files": repo.nb_files,
        "refs": sorted(repo.refs),
        "revisions": sorted(
            (
                {
                    "path": _relative(cache, revision.snapshot_path),
                    "commit": revision.commit_hash,
                    "size": revision.size_on_disk,
                    "refs": sorted(revision.refs),
                    "files": sorted(
                        (_relative(cache, file.file_path), file.file_name, file.size_on_disk) for file in revision.files
                    ),
                }
                for revision in repo.revisions
            ),
            key=lambda revision: str(revision["path"]),
        ),
    }


def _relative(cache: str, path: str | os.PathLike[str]) -> str:
    """A path in the cache, which some calls resolve and some do not, relative to it."""
    path = os.fspath(path)
    for top in (cache, os.path.realpath(cache)):
        if path.startswith(f"{top}/"):
            return path[len(top) + 1 :]
    return f"outside of the cache: {path}"


def _without(cache: str, text: str) -> str:
    return text.replace(os.path.realpath(cache), "<cache>").replace(cache, "<cache>")


def _sha1(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _answer(cache: str, operation: str, arguments: dict[str, Any]) -> Any:
    try:
        return _OPERATIONS[operation](cache, **arguments)
    except Exception as error:  # noqa: BLE001 - which error a call raises is what is compared
        return {"raises": type(error).__name__}


def _constants(environ: Mapping[str, str]) -> dict[str, str]:
    from huggingface_hub import constants

    own = dict(os.environ)
    _set_environment(environ)
    found = {
        name: value
        for name, value in vars(importlib.reload(constants)).items()
        if isinstance(value, str) and name.startswith(("HF_", "HUGGINGFACE_", "CHECK_"))
    }
    _set_environment(own)  # for what is read afterwards
    importlib.reload(constants)
    return found


def _set_environment(environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


def _serve() -> None:
    # Clients print; only answers may go to the asking process.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "environ" in request:
            answer: object = _constants(request["environ"])
        else:
            answer = [_answer(request["cache"], *call) for call in request["calls"]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
