"""Hub cache folders as huggingface_hub lays them out, and listings that show whether one was touched.

Nothing here imports huggingface_hub: the layout is written by hand, and the tests read it with the library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

# kind, mode, size, mtime in ns, detail: sha1 of a file's bytes, target of a link, or why it cannot be read
Entry = tuple[str, int, int, int, str]

_CACHEDIR_TAG = b"""\
Signature: 8a477f597d28d172789f06886806bc55
# This file is a cache directory tag created by huggingface_hub.
# For information about cache directory tags, see:
#\thttps://bford.info/cachedir/
"""


def add_repo(
    hub: Path,
    repo_id: str,
    files: Mapping[str, bytes] | Path,
    *,
    repo_type: str = "model",
    commit: str | None = None,
    refs: Sequence[str] = ("main",),
    no_exist: Sequence[str] = (),
    tree: bool = False,
    locks: bool = False,
) -> Path:
    """Lay one revision of a repo out in the cache `hub`, as after a download; return its snapshot folder.

    `files` maps names to bytes, or is a folder to copy. `commit` is derived from repo and content when None.
    A ref that exists already is moved to this commit. `no_exist` names files the hub was asked for and lacks.
    `tree` also writes the listing `trees/<commit>.json` (huggingface_hub 1.31 and 2.4 do, 0.36 does not).
    `locks` also writes what lies beside the repos: `.locks` and `CACHEDIR.TAG` (0.36 has only the first).
    """
    contents = _read_folder(files) if isinstance(files, Path) else dict(files)
    for name in (*contents, *refs, *no_exist):
        _check_name(name)
    commit = commit or _commit(repo_type, repo_id, contents)
    repo = hub / repo_folder(repo_id, repo_type)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        _add_file(repo, snapshot / name, etag(name, content), content)
    for ref in refs:
        _write(repo / "refs" / ref, commit.encode())
    for name in no_exist:
        _write(repo / ".no_exist" / commit / name, b"")
    if tree:
        _write_tree(repo / "trees" / f"{commit}.json", contents)
    if locks:
        _write(hub / "CACHEDIR.TAG", _CACHEDIR_TAG)
        for name, content in contents.items():
            lock = hub / ".locks" / repo.name / f"{etag(name, content)}.lock"
            _write(lock, b"")
            lock.chmod(0o664)
    return snapshot


def share_blobs(hub: Path, *repo_folders: str) -> None:
    """Move the blobs of LFS files into the hub's shared store, as huggingface_hub 2 lays them there."""
    store = hub / "blobs"
    _write(store / ".huggingface-shared-blobs", b"1\n")
    for blob in [path for name in repo_folders for path in sorted((hub / name / "blobs").iterdir())]:
        if len(blob.name) == 64 and not blob.is_symlink():
            shared = store / blob.name[:2] / blob.name
            _write(shared, blob.read_bytes())
            shared.chmod(0o444)
            with shared.with_name(f"{shared.name}.refs").open("a") as manifest:
                manifest.write(f"{blob.relative_to(hub)}\n")
            blob.unlink()
            blob.symlink_to(os.path.relpath(shared, blob.parent))


def repo_folder(repo_id: str, repo_type: str = "model") -> str:
    """The name of a repo's folder: "models--org--name"."""
    return "--".join([f"{repo_type}s", *repo_id.split("/")])


def etag(name: str, content: bytes) -> str:
    """The name of a file's blob: sha256 for *.safetensors (kept in LFS), git's blob id for any other file."""
    return hashlib.sha256(content).hexdigest() if _in_lfs(name) else git_blob_id(content)


def git_blob_id(content: bytes) -> str:
    """What `git hash-object` says of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listing(root: Path) -> dict[str, Entry]:
    """Everything at and under `root`, links not followed: relative name ("." for the root) -> Entry.

    Two listings are equal when no entry appeared, vanished, or changed its kind, mode, size, mtime, bytes or
    target. An entry that cannot be read has the reason as its detail ("unreadable: EACCES"); what is under
    such a folder is not listed. A `root` that does not exist raises FileNotFoundError.
    """
    root.lstat()
    found: dict[str, Entry] = {}
    _list(os.fspath(root), ".", found)
    return dict(sorted(found.items()))


def _list(path: str, name: str, found: dict[str, Entry]) -> None:
    """Without pathlib, which takes most of the time where tests list folders thousands of times."""
    try:
        status = os.lstat(path)
    except OSError as error:  # in a folder that may be listed but not searched
        found[name] = ("unknown", 0, 0, 0, _reason(error))
        return
    kind = _kind(status.st_mode)
    children: list[str] = []
    detail = ""
    try:
        if kind == "file":
            detail = _sha1(path)
        elif kind == "link":
            detail = os.readlink(path)
        elif kind == "folder":
            children = os.listdir(path)
    except OSError as error:
        detail = _reason(error)
    found[name] = (kind, stat.S_IMODE(status.st_mode), status.st_size, status.st_mtime_ns, detail)
    for child in children:
        _list(f"{path}/{child}", child if name == "." else f"{name}/{child}", found)


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISLNK(mode):
        return "link"
    return "folder" if stat.S_ISDIR(mode) else "other"  # "other" is never opened: a pipe would block


def _reason(error: OSError) -> str:
    return f"unreadable: {errno.errorcode.get(error.errno or 0, str(error.errno))}"


def _sha1(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.sha1(file.readall()).hexdigest()


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise NotADirectoryError(folder)
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise ValueError(f"not a relative file name: {name!r}")


def _commit(repo_type: str, repo_id: str, contents: Mapping[str, bytes]) -> str:
    described = [repo_type, repo_id, *(f"{name} {etag(name, contents[name])}" for name in sorted(contents))]
    return hashlib.sha1("\n".join(described).encode()).hexdigest()


def _add_file(repo: Path, pointer: Path, blob_name: str, content: bytes) -> None:
    blob = repo / "blobs" / blob_name
    if not blob.exists():
        _write(blob, content)
    target = os.path.relpath(blob, pointer.parent)
    if pointer.is_symlink() and os.readlink(pointer) == target:
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.symlink_to(target)  # FileExistsError: a commit cannot hold the same name with other bytes


def _write_tree(path: Path, contents: Mapping[str, bytes]) -> None:
    """The listing as huggingface_hub/_tree_cache.py writes it, mode included. Xet hashes are left out."""
    listed: dict[str, dict[str, object]] = {}
    for name in sorted(contents):
        content = contents[name]
        entry: dict[str, object] = {"size": len(content), "blob_id": git_blob_id(content)}
        if _in_lfs(name):
            oid = hashlib.sha256(content).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
            entry |= {"blob_id": git_blob_id(pointer.encode()), "lfs_sha256": oid, "lfs_size": len(content)}
        listed[name] = entry
    _write(path, json.dumps({"format_version": 1, "files": listed}, indent=1).encode())
    path.chmod(0o600)


def _in_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
