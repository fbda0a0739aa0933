"""The Hub's routes: which repo a request path names, and the Hub's answers about a model in a user's folder.

Routes, fields and headers are those that huggingface_hub 0.36 to 2.4 uses (hf_api.py, file_download.py,
utils/_http.py). This module knows nothing of networks: it turns requests into answers.
"""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

from hf_overlay import hfcache
from hf_overlay.catalog import links
from hf_overlay.gateway import manifests
from hf_overlay.gateway.exchange import Answer, Request, in_json
from hf_overlay.models import File, Model
from hf_overlay.patience import NoAnswer

_PIECE_BYTES = 1 << 22
"""Bytes of a file that are read at once."""
_NEVER = "1970-01-01T00:00:00.000Z"
"""The date of entries that have none in a folder."""

# Request paths ---------------------------------------------------------------------------------------------------

_COMMIT = re.compile(r"[0-9a-f]{40}")
_API = re.compile(r"/api/(models|datasets|spaces|kernels)/(.+)")
_RESOLVE = re.compile(r"/(?:(datasets|spaces|kernels)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
_MANIFEST = re.compile(r"/v2/([^/]+/[^/]+)/manifests/([^/]+)")
_API_PARTS = frozenset(
    {"revision", "tree", "paths-info", "refs", "commits", "commit", "preupload", "treesize", "xet-read-token",
     "xet-write-token", "resolve", "branch", "tag", "settings", "compare", "discussions", "super-squash"}
)  # fmt: skip


class Target(NamedTuple):
    """The repo that a request path names, and the part of the repo."""

    kind: str
    """`models`, `datasets`, …"""
    repo_id: str
    part: str
    """The first part of the path after the id: `info` (where there is none), `resolve`, `tree`, `paths-info`, …"""
    revision: str | None
    path: str
    """The rest of the path after the revision, decoded: a file or folder in the repo; for `manifests`, the tag."""

    @property
    def folder(self) -> str:
        """The name of the repo's folder in a Hugging Face cache."""
        return hfcache.repo_folder(self.repo_id, self.kind)

    def precedes_download(self, method: str) -> bool:
        """Whether a client that gets a good answer may download next."""
        if self.part == "resolve":
            return method in ("HEAD", "GET")
        is_pinned = self.part == "tree" and _COMMIT.fullmatch(self.revision or "") is not None
        return method == "GET" and (self.part == "revision" or is_pinned)

    def precedes_writing(self, method: str) -> bool:
        """Whether a client that gets a good answer may write to its cache next, be it only a branch's commit."""
        return self.precedes_download(method) or (method == "GET" and self.part == "refs")


def parse(path: str, is_model: Callable[[str], bool]) -> Target | None:
    """Return what a request path, percent-encoded, asks for; None when it names no repo.

    `/api/models/a/b` may be the repo `a/b`, or the part `b` of the repo `a`. It is the former where the user has a
    model `a/b`, which `is_model` tells.
    """
    if match := _RESOLVE.fullmatch(path):
        kind, repo_id, revision, rest = match.groups()
        return Target(kind or "models", unquote(repo_id), "resolve", unquote(revision), unquote(rest))
    if match := _MANIFEST.fullmatch(path):
        return Target("models", unquote(match[1]), "manifests", None, unquote(match[2]))
    match = _API.fullmatch(path)
    if match is None:
        return None
    kind, rest = match.groups()
    names = [unquote(name) for name in rest.rstrip("/").split("/")]
    is_flat = len(names) == 1 or (names[1] in _API_PARTS and not is_model("/".join(names[:2])))
    size = 1 if is_flat else 2
    part, *tail = names[size:] or ["info"]
    return Target(kind, "/".join(names[:size]), part, tail[0] if tail else None, "/".join(tail[1:]))


# Answers for a user's model --------------------------------------------------------------------------------------


Ask = Callable[[str, Callable[[], Any]], Any]
"""Lets a function look at the disk of a model path, and returns its result. Raises NoAnswer if it hangs."""


def answer(request: Request, target: Target, model: Model, commit: str, ask: Ask) -> Answer:
    """Return the Hub's answer about a user's model, whose one revision is `commit`."""
    if request.method not in ("GET", "HEAD") and target.part != "paths-info":
        message = (
            f"{model.id} is served from {model.path}, which is only read; to reach the Hub's: --exclude {model.id}"
        )
        return error(403, "", message)
    if target.revision not in (None, "main", "HEAD", commit):
        message = (
            f"{model.id} is served from {model.path}, which holds one revision (main, {commit}), and not "
            f"{target.revision}; to load another one from the Hub, run with --exclude {model.id}"
        )
        return error(404, "RevisionNotFound", message)
    if target.part in ("info", "revision"):
        return in_json(_info(model, commit))
    if target.part == "tree":
        return _tree_answer(request, target, model, commit)
    if target.part == "paths-info":
        wanted = _form(request)
        entries = [_entry(model, file) for file in model.files if file.name in wanted.get("paths", ())]
        return in_json(_with_commit(entries, commit) if _is_set(wanted.get("expand")) else entries)
    if target.part == "refs":
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
        return in_json({"branches": [branch], "tags": [], "converts": [], "pullRequests": []})
    if target.part == "manifests":
        return _manifest(model, target.path)
    if target.part == "resolve":
        try:
            return _file(request, model, commit, target.path, ask)
        except NoAnswer:
            message = f"{model.id} is in {model.root}, which does not answer; check its drive or server"
            return not_now(target, message, has_copy=False)
    message = (
        f"{model.id} is served from {model.path}, which has no {target.part}; to ask the Hub: --exclude {model.id}"
    )
    return error(404, "EntryNotFound", message)


def error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error in the Hub's form. `code` becomes X-Error-Code; clients print the message, X-Error-Message."""
    shape = {"X-Error-Message": quote(message, safe=" !#$%&'()*+,-./:;<=>?@[]^_`{|}~")}
    if code:
        shape["X-Error-Code"] = code
    return in_json({"error": message}, status, {**shape, **(headers or {})}.items())


def not_now(target: Target, message: str, *, has_copy: bool) -> Answer:
    """Return the answer about a repo that may not be downloaded now, chosen so that clients show `message` at once.

    403 sends clients to their cache immediately, whereas old releases repeat a request for 20 seconds after 504. Where
    the cache has no copy (`has_copy`), the client's exception must carry the message. For errors about a file, clients
    pass on only that there is no such repo; for errors about a repo, the command `hf` hides that message.
    """
    if target.part == "resolve" and not has_copy:
        return error(404, "RepoNotFound", message)
    return error(403, "", message)


def _info(model: Model, commit: str) -> dict[str, object]:
    return {
        "_id": commit[:24],
        "id": model.id,
        "modelId": model.id,
        "sha": commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "lastModified": _NEVER,
        "createdAt": _NEVER,
        "siblings": [{"rfilename": file.name, **_sizes(model, file)} for file in model.files],
    }


def _tree_answer(request: Request, target: Target, model: Model, commit: str) -> Answer:
    if _verifies(request) and any(file.etag is None for file in model.files):
        message = f"{model.path} was not made by hf download, so there are no checksums to verify its files with"
        return error(400, "", message)  # among all error codes, the one for which `hf` shows the message alone
    query = parse_qs(request.query, keep_blank_values=True)
    entries = _tree(model, target.path, is_recursive="recursive" in query)
    if not entries:
        return error(404, "EntryNotFound", f"{model.path} has no {target.path}")
    return in_json(_with_commit(entries, commit) if _is_set(query.get("expand")) else entries)


def _manifest(model: Model, tag: str) -> Answer:
    """Return the answer to llama.cpp's question which GGUF file a tag means."""
    chosen = manifests.chosen(model.files, tag)
    if chosen is None:
        return error(404, "EntryNotFound", f"{model.path} has no GGUF file for the tag {tag}")
    found = {"ggufFile": chosen[0], "mmprojFile": chosen[1]}
    files = {name: {"rfilename": file.name, **_sizes(model, file)} for name, file in found.items() if file is not None}
    return in_json({"schemaVersion": 2, **files})


def _verifies(request: Request) -> bool:
    """Return whether a listing is for `hf cache verify`, which would compare the files with our made-up ids.

    huggingface_hub 1.32 and later mark the requests that belong to a download, which tells the others apart.
    """
    version = re.search(r"hf_hub/(\d+)\.(\d+)", request.header("user-agent") or "")
    marks_downloads = version is not None and (int(version[1]), int(version[2])) >= (1, 32)
    is_pinned = _COMMIT.search(request.path.rpartition("/tree/")[2]) is not None
    return marks_downloads and is_pinned and request.header("x-hf-download-counter") is None


def _tree(model: Model, below: str, *, is_recursive: bool) -> list[dict[str, object]]:
    """Return the files and folders below the folder `below` (empty: all of the model), as the Hub lists them."""
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, object]] = {}
    for file in model.files:
        if not file.name.startswith(prefix):
            continue
        parts = file.name[len(prefix) :].split("/")
        for depth in range(1, len(parts) if is_recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            entries.setdefault(folder, {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40})
        if is_recursive or len(parts) == 1:
            entries[file.name] = _entry(model, file)
    return list(entries.values())


def _entry(model: Model, file: File) -> dict[str, object]:
    sizes = _sizes(model, file)
    return {"type": "file", "path": file.name, "oid": sizes.pop("blobId"), **sizes}


def _with_commit(entries: Iterable[dict[str, object]], commit: str) -> list[dict[str, object]]:
    """Add to each entry of a listing the commit of its last change, for clients that keep files by it."""
    last = {"id": commit, "title": "", "date": _NEVER}
    return [{**entry, "lastCommit": last} for entry in entries]


def _is_set(value: object) -> bool:
    """Return whether a value of a query, a form or JSON means true."""
    return str(value[0] if isinstance(value, list) and value else value).lower() in ("true", "1")


def _sizes(model: Model, file: File) -> dict[str, object]:
    etag = hfcache.etag(model, file)
    sizes: dict[str, object] = {"size": file.size, "blobId": hfcache.blob_id(etag, file.size)}
    if len(etag) == 64:
        sizes["lfs"] = {"sha256": etag, "oid": etag, "size": file.size, "pointerSize": 134}
    return sizes


def _form(request: Request) -> dict[str, Any]:
    """Return the fields of a request's body, which is JSON or a form; no fields for anything else."""
    body = b"".join(request.body).decode("utf-8", "replace")
    try:
        fields = json.loads(body) if body.startswith("{") else parse_qs(body)
    except (ValueError, RecursionError):
        return {}
    paths = fields.get("paths")
    return {**fields, "paths": paths if isinstance(paths, list) else [paths]}


def _file(request: Request, model: Model, commit: str, name: str, ask: Ask) -> Answer:
    file = next((file for file in model.files if file.name == name), None)
    # looked at again, because a link may have taken the file's place since the scan
    size = ask(model.root, partial(_size, model.path, name)) if file is not None else None
    if file is None or size is None:
        return error(404, "EntryNotFound", f"{model.path} has no {name}", {"X-Repo-Commit": commit})
    etag = f'"{hfcache.etag(model, file)}"'
    first, end = _range(request, size, etag)
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "X-Repo-Commit": commit,
        "X-Linked-Size": str(size),
        "X-Linked-ETag": etag,
    }
    if first >= end and size > 0:
        headers |= {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
        return Answer(416, list(headers.items()))
    is_part = end - first < size
    if is_part:
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
    headers |= {"Content-Length": str(end - first), "Content-Type": "application/octet-stream"}

    def body() -> Iterator[bytes]:
        for offset in range(first, end, _PIECE_BYTES):
            length = min(_PIECE_BYTES, end - offset)
            yield ask(model.root, partial(_piece, f"{model.path}/{name}", offset, length))

    return Answer(206 if is_part else 200, list(headers.items()), body())


def _range(request: Request, size: int, etag: str) -> tuple[int, int]:
    """Return the first byte that a request asks for, and the one after the last; all unless it names one range."""
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.header("range") or "")
    if asked is None or asked[0] == "bytes=-" or (request.header("if-range") or etag) != etag:
        return 0, size
    if not asked[1]:
        return max(0, size - int(asked[2])), size
    return int(asked[1]), min(int(asked[2]) + 1, size) if asked[2] else size


def _size(folder: str, name: str) -> int | None:
    """Return the size of a model's file in bytes; None where it is no file, or leads out of the model's folder."""
    path = f"{folder}/{name}"
    if not os.path.isfile(path) or links.leads_away(folder, name, links.home_of(folder)):
        return None
    return os.path.getsize(path)


def _piece(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        piece = os.pread(file.fileno(), length, offset)
    if len(piece) < length:
        raise OSError(errno.EIO, "has become shorter", path)
    return piece
