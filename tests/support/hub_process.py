"""A client of the Hub cache in a process of its own: one operation a line on stdin, one answer a line on stdout.

Importing a huggingface_hub takes a quarter of a second, calling it milliseconds; so a test keeps one such process
for each release (see hubs.py) and asks it again and again. Only `python hub_process.py` imports huggingface_hub.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

Files = dict[str, str]
"""Name -> sha1 of the bytes."""

# What is counted in a process that is to be killed: everything that changes a disk, and taking locks.
_CHANGES = frozenset(
    {
        *("os.mkdir", "os.symlink", "os.link", "os.rename", "os.remove", "os.rmdir"),
        *("os.chmod", "os.utime", "os.truncate", "fcntl.flock"),
    }
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# Reading -------------------------------------------------------------------------------------------------------


def version() -> str:
    import huggingface_hub

    return str(huggingface_hub.__version__)


def scan(hub: str) -> dict[str, list[str]]:
    """`type/id` -> commits."""
    return {
        f"{repo.repo_type}/{repo.repo_id}": sorted(revision.commit_hash for revision in repo.revisions)
        for repo in _scan(hub).repos
    }


def snapshot(hub: str, model_id: str) -> Files:
    """The files that `snapshot_download` finds without a network."""
    from huggingface_hub import snapshot_download

    return _read(Path(snapshot_download(model_id, cache_dir=hub, local_files_only=True)))


def file(hub: str, model_id: str, name: str) -> Files:
    """One file by `hf_hub_download` without a network."""
    from huggingface_hub import hf_hub_download

    return {name: _sha1(Path(hf_hub_download(model_id, name, cache_dir=hub, local_files_only=True)))}


def cached(hub: str, model_id: str, name: str) -> Files:
    """One file by `try_to_load_from_cache`."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model_id, name, cache_dir=hub)
    if not isinstance(path, str):
        raise FileNotFoundError(name)
    return {name: _sha1(Path(path))}


def force_download(hub: str, model_id: str, name: str | None) -> Files:
    """A forced download of one file or all, which this offline process cannot do."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if name is None:
        return _read(Path(snapshot_download(model_id, cache_dir=hub, force_download=True)))
    return {name: _sha1(Path(hf_hub_download(model_id, name, cache_dir=hub, force_download=True)))}


def download(hub: str, model_id: str, endpoint: str) -> str:
    """The snapshot that `snapshot_download` fetches from a Hub, in a process that is online and whom modes stop."""
    from huggingface_hub import snapshot_download

    from tests.support.permissions import respected

    with respected():
        return str(snapshot_download(model_id, cache_dir=hub, endpoint=endpoint))


# Deleting ------------------------------------------------------------------------------------------------------


def remove(hub: str, targets: Sequence[str]) -> str:
    """`hf cache rm` of `model/ORG/NAME` or commits; 0.x has no such command, there it is what 1.x does for it."""
    if not version().startswith("0."):
        return _hf("rm", *targets, "--yes", "--cache-dir", hub)
    info = _scan(hub)
    commits = {
        revision.commit_hash
        for repo in info.repos
        for revision in repo.revisions
        if f"{repo.repo_type}/{repo.repo_id}" in targets or revision.commit_hash in targets
    }
    info.delete_revisions(*sorted(commits)).execute()
    return "done"


def prune(hub: str) -> str:
    """`hf cache prune`; 0.x has no such command, there it is the deletion of all revisions without a ref."""
    if not version().startswith("0."):
        return _hf("prune", "--yes", "--cache-dir", hub)
    info = _scan(hub)
    commits = [revision.commit_hash for repo in info.repos for revision in repo.revisions if not revision.refs]
    info.delete_revisions(*sorted(commits)).execute()
    return "done"


def delete_revisions(hub: str, commits: Sequence[str]) -> str:
    _scan(hub).delete_revisions(*commits).execute()
    return "done"


def delete_all_revisions(hub: str) -> str:
    info = _scan(hub)
    info.delete_revisions(*(revision.commit_hash for repo in info.repos for revision in repo.revisions)).execute()
    return "done"


def delete_files(hub: str, model_id: str, name: str | None) -> str:
    """`delete_files` of one name, or of every file; releases before 1.32 do not have it."""
    info = _scan(hub)
    if not hasattr(info, "delete_files"):
        return "not in this release"
    info.delete_files(
        *(
            entry
            for repo in info.repos
            if repo.repo_id == model_id
            for revision in repo.revisions
            for entry in revision.files
            if name in (None, entry.file_name)
        )
    ).execute()
    return "done"


def manage_delete(hub: str, pattern: str) -> str:
    """What `python -m mlx_lm manage --delete --pattern PATTERN` does once confirmed: one scan for all deletions."""
    info = _scan(hub)
    for repo in sorted(info.repos, key=lambda repo: repo.repo_path):
        if pattern in repo.repo_id:
            for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
                info.delete_revisions(revision.commit_hash).execute()
    return "done"


# Being killed --------------------------------------------------------------------------------------------------


def own_a_session(
    link: str, targets: Sequence[str], environ: Mapping[str, str], refreshes: int, kill_at: int
) -> dict[str, bool]:
    """Let a child own a session, and kill it with signal 9 right before its change number `kill_at` to a disk.

    The model path is `link`, which the child makes lead to the next of `targets` before each refresh. After the
    refreshes it ends the session (with `kill_at` 0 it is killed instead). `killed` is False when it came to that end.
    """
    from hf_overlay import open_session  # here, so that the child's steps are a session's alone

    child = os.fork()
    if child == 0:
        _own(open_session, link, targets, environ, refreshes, kill_at)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the owner of a session failed: exit status {os.WEXITSTATUS(status)}")
    return {"killed": os.WIFSIGNALED(status)}


def _own(
    open_session: Callable[..., Any],
    link: str,
    targets: Sequence[str],
    environ: Mapping[str, str],
    refreshes: int,
    kill_at: int,
) -> None:
    changes = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in _CHANGES or (event == "open" and arguments[2] & _WRITES):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        sys.addaudithook(count)
        _point(link, targets[0])
        with open_session([link], environ=environ) as session:
            for number in range(refreshes):
                _point(link, targets[(number + 1) % len(targets)])
                session.refresh()
            if kill_at == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        status = 0
    except BaseException:  # noqa: BLE001 - a fork must never go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _point(link: str, target: str) -> None:
    following = f"{link}.next"
    if os.path.lexists(following):  # left by one that was killed
        os.unlink(following)
    os.symlink(target, following)
    os.replace(following, link)


# The process ---------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[..., Any]] = {
    operation.__name__: operation
    for operation in (
        version,
        scan,
        snapshot,
        file,
        cached,
        force_download,
        download,
        remove,
        prune,
        delete_revisions,
        delete_all_revisions,
        delete_files,
        manage_delete,
        own_a_session,
    )
}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """`value`; or `error`, where a client may well say no; or `crash`, which is never right."""
    try:
        return {"value": OPERATIONS[request["operation"]](**request["arguments"])}
    except Exception as error:  # noqa: BLE001 - the asking process shall see it
        # OSError and ValueError are what a client's own errors are, up to the releases' differences.
        if isinstance(error, (OSError, ValueError)) or type(error).__module__.startswith("huggingface_hub."):
            return {"error": f"{type(error).__name__}: {error}"}
        return {"crash": traceback.format_exc()}


def _scan(hub: str) -> Any:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(hub)


def _hf(*arguments: str) -> str:
    """`hf cache …` in this process; raises OSError when it ends with a status of its own, as it does for errors."""
    from huggingface_hub.cli.hf import main

    sys.argv = ["hf", "cache", *arguments]
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise OSError(f"exit status {end.code}: {printed.getvalue()}") from None
    return "done"


def _read(folder: Path) -> Files:
    return {str(path.relative_to(folder)): _sha1(path) for path in folder.rglob("*") if path.is_file()}


def _sha1(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _serve() -> None:
    # Clients print; only answers may go to the asking process.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in iter(sys.stdin.readline, ""):
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
