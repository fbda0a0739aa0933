"""The Hub's routes: which repo a request path names, and the Hub's answers about a model in a user's folder.

The routes, fields and headers are those that huggingface_hub 0.36 to 2.4 uses (hf_api.py, file_download.py,
utils/_http.py). Nothing here knows of a network: a request comes in, a response goes out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, quote, unquote

from hf_overlay import hfcache
from hf_overlay.catalog import links
from hf_overlay.models import File, Model

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

# Request paths ---------------------------------------------------------------------------------------------------

_COMMIT = re.compile(r"[0-9a-f]{40}")
_API = re.compile(r"/api/(models|datasets|spaces|kernels)/(.+)")
_RESOLVE = re.compile(r"/(?:(datasets|spaces|kernels)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
_API_PARTS = frozenset(
    {"revision", "tree", "paths-info", "refs", "commits", "commit", "preupload", "treesize", "xet-read-token",
     "xet-write-token", "resolve", "branch", "tag", "settings", "compare", "discussions", "super-squash"}
)  # fmt: skip


class Target(NamedTuple):
    """The repo that a request path names, and the part of it."""

    kind: str
    """`models`, `datasets`, …"""
    repo_id: str
    part: str
    """`info`, `resolve`, `tree`, `paths-info`, …: the first part of the path after the id; `info` without one."""
    revision: str | None
    path: str
    """The rest of the path after the revision, unquoted: a file or folder in the repo."""

    @property
    def folder(self) -> str:
        """The name of the repo's folder in a Hugging Face cache."""
        return hfcache.repo_folder(self.repo_id, self.kind)

    def precedes_download(self, method: str) -> bool:
        """Whether a client that gets a good answer may write to its cache next."""
        if self.part == "resolve":
            return method in ("HEAD", "GET")
        is_pinned = self.part == "tree" and _COMMIT.fullmatch(self.revision or "") is not None
        return method == "GET" and (self.part == "revision" or is_pinned)


def parse(path: str, is_model: Callable[[str], bool]) -> Target | None:
    """The target of a raw (still quoted) request path; None when it names no repo.

    `/api/models/a/b` may be repo `a/b`, or part `b` of repo `a`: it is the former where the user has a model `a/b`,
    which `is_model` tells.
    """
    if match := _RESOLVE.fullmatch(path):
        kind, repo_id, revision, rest = match.groups()
        return Target(kind or "models", unquote(repo_id), "resolve", unquote(revision), unquote(rest))
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


async def answer(request: Request, target: Target, model: Model, commit: str) -> Response:
    """The Hub's answer about a user's model, of which `commit` is the one revision."""
    from starlette.responses import JSONResponse

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
        return JSONResponse(_info(model, commit))
    if target.part == "tree":
        return _tree_answer(request, target, model)
    if target.part == "paths-info":
        wanted = await _wanted_paths(request)
        return JSONResponse([_entry(model, file) for file in model.files if file.name in wanted])
    if target.part == "refs":
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
        return JSONResponse({"branches": [branch], "tags": [], "converts": [], "pullRequests": []})
    if target.part == "resolve":
        return _file(model, commit, target.path)
    message = (
        f"{model.id} is served from {model.path}, which has no {target.part}; to ask the Hub: --exclude {model.id}"
    )
    return error(404, "EntryNotFound", message)


def error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the Hub's shape; `code` becomes X-Error-Code. Clients print the X-Error-Message."""
    from starlette.responses import JSONResponse

    shape = {"X-Error-Message": quote(message, safe=" !#$%&'()*+,-./:;<=>?@[]^_`{|}~")}
    if code:
        shape["X-Error-Code"] = code
    return JSONResponse({"error": message}, status, {**shape, **(headers or {})})


def not_now(target: Target, message: str, *, has_copy: bool) -> Response:
    """The answer about a repo that may not be downloaded now: at once, and so that the client shows `message`.

    403 sends clients to their cache, and unlike 504, which old releases repeat for 20 seconds, at once. Without a copy
    there (`has_copy`), what they raise must carry the message: of errors about a file, they pass on only "no such
    repo"; of those about a repo, the command `hf` hides that one.
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
        "lastModified": "1970-01-01T00:00:00.000Z",
        "createdAt": "1970-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": file.name, **_sizes(model, file)} for file in model.files],
    }


def _tree_answer(request: Request, target: Target, model: Model) -> Response:
    from starlette.responses import JSONResponse

    if _verifies(request) and any(file.etag is None for file in model.files):
        message = f"{model.path} was not made by hf download, so there are no checksums to verify its files with"
        return error(400, "", message)  # of all kinds, the one of which `hf` shows the message alone
    entries = _tree(model, target.path, is_recursive="recursive" in request.query_params)
    return JSONResponse(entries) if entries else error(404, "EntryNotFound", f"{model.path} has no {target.path}")


def _verifies(request: Request) -> bool:
    """Whether the listing is for `hf cache verify`, which would take our made-up ids for checksums of the files.

    huggingface_hub >= 1.32 marks the requests that belong to a download, so the others are told apart by that.
    """
    version = re.search(r"hf_hub/(\d+)\.(\d+)", request.headers.get("user-agent", ""))
    marks_downloads = version is not None and (int(version[1]), int(version[2])) >= (1, 32)
    is_pinned = _COMMIT.search(request.url.path.rpartition("/tree/")[2]) is not None
    return marks_downloads and is_pinned and "x-hf-download-counter" not in request.headers


def _tree(model: Model, below: str, *, is_recursive: bool) -> list[dict[str, object]]:
    """The files and folders under the folder `below` of a model (empty: all of it), as the Hub lists them."""
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


def _sizes(model: Model, file: File) -> dict[str, object]:
    etag = hfcache.etag(model, file)
    sizes: dict[str, object] = {"size": file.size, "blobId": hfcache.blob_id(etag, file.size)}
    if len(etag) == 64:
        sizes["lfs"] = {"sha256": etag, "oid": etag, "size": file.size, "pointerSize": 134}
    return sizes


async def _wanted_paths(request: Request) -> set[str]:
    """The paths that a paths-info request names in its body, which is JSON or a form; empty for anything else."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        paths = json.loads(body).get("paths", []) if body.startswith("{") else parse_qs(body).get("paths", [])
    except ValueError:
        return set()
    return {paths} if isinstance(paths, str) else {str(path) for path in paths}


def _file(model: Model, commit: str, name: str) -> Response:
    from starlette.responses import FileResponse

    file = next((file for file in model.files if file.name == name), None)
    path = f"{model.path}/{name}"
    # Looked at again: since the scan, a link may have taken the file's place.
    if file is None or not os.path.isfile(path) or links.leads_away(model.path, name, links.home_of(model.path)):
        return error(404, "EntryNotFound", f"{model.path} has no {name}", {"X-Repo-Commit": commit})
    headers = {
        "ETag": f'"{hfcache.etag(model, file)}"',
        "X-Repo-Commit": commit,
        "X-Linked-Size": str(os.path.getsize(path)),
        "X-Linked-ETag": f'"{hfcache.etag(model, file)}"',
    }
    return FileResponse(path, headers=headers, media_type="application/octet-stream")
