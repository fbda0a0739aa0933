"""The Hub, as a program in an overlay sees it: the user's own models answered here, everything else passed on.

`mlx_lm.load("org/m")` asks the Hub for the newest commit before it looks at any cache. Only an answer to that question
keeps the user's folder in front with the network up. So programs get `HF_ENDPOINT=http://127.0.0.1:PORT/SECRET`:

- a model the user's folder provides *is* on this Hub, with the one commit the tree holds; no request about it leaves
  the machine;
- one whose drive is away is not downloaded again: the answer names the drive, or sends the client to its cache;
- all else goes to the real Hub and back unchanged, in a stream. Before a client is told that a repo exists, the real
  cache's folder for it is made and linked into the tree, so that the download lands there.

The routes and headers are those that huggingface_hub 0.36 to 2.4 uses (hf_api.py, file_download.py, utils/_http.py).
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hf_overlay import hfcache
from hf_overlay.gateway.hub import Hub, Unavailable
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.models import File, Model

if TYPE_CHECKING:
    import httpx2
    from starlette.requests import Request
    from starlette.responses import Response

DEFAULT_UPSTREAM = "https://huggingface.co"
CONNECT_SECONDS = 3.0
"""An upstream that does not take a connection in this time is unreachable; the client falls back to what it has."""
ANSWER_SECONDS = 60.0
"""Longest pause within an answer; clients give up earlier by themselves."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class Gateway:
    """A loopback Hub, alive between `start` and `stop`."""

    def __init__(self, hub: Hub, upstream: str) -> None:
        self._hub = hub
        self._upstream = upstream.rstrip("/")
        self._prefix = f"/{os.urandom(20).hex()}"
        # Named, or asyncio leaves Nagle's algorithm on: 40 ms for each answer with a body.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._client: httpx2.AsyncClient | None = None
        self._stop = threading.Event()
        self._server: Any = None
        self._thread = threading.Thread(target=self._serve, name="hub-gateway", daemon=True)

    @property
    def endpoint(self) -> str:
        """What programs take for HF_ENDPOINT. The path in it is a secret that keeps other users of the machine out."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}{self._prefix}"

    def start(self) -> None:
        """Listen. Connections wait in the backlog while the server is still being imported. Raises OSError."""
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(256)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; requests in progress are cut."""
        self._stop.set()
        if self._server is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            self._thread.join(timeout=5)
        self._socket.close()

    def _serve(self) -> None:
        # A fifth of a second, in which the program that will ask is starting as well.
        import asyncio

        import uvicorn

        config = uvicorn.Config(
            self._app,
            interface="asgi3",
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,  # paths hold the secret
            log_config=None,
            log_level="critical",
            timeout_keep_alive=75,
        )
        self._server = uvicorn.Server(config)
        if not self._stop.is_set():
            asyncio.run(self._live())

    async def _live(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            if self._client is not None:
                await self._client.aclose()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = await self._respond(request)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        path: str = request.scope["raw_path"].decode("ascii").partition("?")[0]
        prefix, path = path[: len(self._prefix)], path[len(self._prefix) :]
        if not hmac.compare_digest(prefix, self._prefix) or not path.startswith("/"):
            return _error(404, "EntryNotFound", "no such page")
        asked = parse(path, self._hub.refresh_and_find)
        if asked is None:
            return await self._pass_on(request, path, None)
        found = self._hub.refresh_and_find(asked.repo_id) if asked.kind == "models" else None
        if isinstance(found, LinkedRepo):
            return await _answer(request, asked, found)
        if isinstance(found, Unavailable):
            # 504 sends clients to their cache; without a copy there, what they raise must carry the message.
            return _error(504 if found.has_copy else 404, "" if found.has_copy else "RepoNotFound", found.message)
        return await self._pass_on(request, path, asked)

    async def _pass_on(self, request: Request, path: str, asked: Asked | None) -> Response:
        import httpx2

        if self._client is None:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
            timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
            self._client = httpx2.AsyncClient(limits=limits, timeout=timeout, follow_redirects=False)
        query = request.scope["query_string"].decode("ascii")
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name.decode("latin-1") not in _HOP_BY_HOP and name != b"host"
        ]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        # Not `client.build_request`, which would add headers that the program did not send.
        passed = httpx2.Request(
            request.method,
            f"{self._upstream}{path}{'?' + query if query else ''}",
            headers=headers,
            content=request.stream() if has_body else None,
        )
        try:
            answer = await self._client.send(passed, stream=True)
        except httpx2.TransportError as error:
            return _error(504, "", f"{self._upstream} cannot be reached ({type(error).__name__})")
        # A client also notes which files a repo lacks.
        is_there = answer.status_code < 400 or "x-repo-commit" in answer.headers
        if asked is not None and asked.announces_download(request.method) and is_there:
            self._hub.expect_download(asked.folder)
        return self._relay(answer)

    def _relay(self, answer: httpx2.Response) -> Response:
        from starlette.background import BackgroundTask
        from starlette.responses import StreamingResponse

        async def body() -> AsyncIterator[bytes]:
            async for chunk in answer.aiter_raw():
                yield chunk

        response = StreamingResponse(body(), status_code=answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = [
            (name.lower(), self._here(value) if name.lower() == b"location" else value)
            for name, value in answer.headers.raw
            if name.lower().decode("latin-1") not in _HOP_BY_HOP
        ]
        return response

    def _here(self, location: bytes) -> bytes:
        """A redirect to the same Hub, led through the gateway again; one to elsewhere (a CDN) as it is."""
        target = location.decode("latin-1")
        base = urlsplit(self._upstream)
        if target.startswith(f"{self._upstream}/"):
            target = self.endpoint + target[len(self._upstream) :]
        elif target.startswith("/") and not target.startswith("//") and target.startswith(f"{base.path}/"):
            target = self._prefix + target[len(base.path) :]
        return target.encode("latin-1")


class Asked(NamedTuple):
    """What a request path is about."""

    kind: str
    """`models`, `datasets`, …"""
    repo_id: str
    what: str
    """`info`, `resolve`, `tree`, `paths-info`, …: the first part after the id."""
    revision: str | None
    path: str
    """What follows the revision, unquoted."""

    @property
    def folder(self) -> str:
        """The repo's folder in a cache."""
        return hfcache.repo_folder(self.repo_id, self.kind)

    def announces_download(self, method: str) -> bool:
        """Whether a client that gets this answer may go on to write into its cache."""
        if self.what == "resolve":
            return method in ("HEAD", "GET")
        is_pinned = self.what == "tree" and _COMMIT.fullmatch(self.revision or "") is not None
        return method == "GET" and (self.what == "revision" or is_pinned)


_COMMIT = re.compile(r"[0-9a-f]{40}")
_API = re.compile(r"/api/(models|datasets|spaces|kernels)/(.+)")
_RESOLVE = re.compile(r"/(?:(datasets|spaces|kernels)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")


def parse(path: str, known: Callable[[str], object]) -> Asked | None:
    """The repo a raw (still quoted) request path is about; None when it is about none.

    `/api/models/a/b` may be repo `a/b`, or part `b` of repo `a`; `known` tells whether the user has a model `a`.
    """
    if match := _RESOLVE.fullmatch(path):
        kind, repo_id, revision, rest = match.groups()
        return Asked(kind or "models", unquote(repo_id), "resolve", unquote(revision), unquote(rest))
    match = _API.fullmatch(path)
    if match is None:
        return None
    kind, rest = match.groups()
    parts = [unquote(part) for part in rest.rstrip("/").split("/")]
    is_flat = len(parts) == 1 or (parts[1] in _API_PARTS and known("/".join(parts[:2])) is None)
    size = 1 if is_flat else 2
    what, *tail = parts[size:] or ["info"]
    return Asked(kind, "/".join(parts[:size]), what, tail[0] if tail else None, "/".join(tail[1:]))


_API_PARTS = frozenset(
    {"revision", "tree", "paths-info", "refs", "commits", "commit", "preupload", "treesize", "xet-read-token",
     "xet-write-token", "resolve", "branch", "tag", "settings", "compare", "discussions", "super-squash"}
)  # fmt: skip


# The user's models -----------------------------------------------------------------------------------------------


async def _answer(request: Request, asked: Asked, found: LinkedRepo) -> Response:
    """Be the Hub for one model."""
    from starlette.responses import JSONResponse

    model, commit = found.model, found.commit
    if request.method not in ("GET", "HEAD") and asked.what != "paths-info":
        message = (
            f"{model.id} is served from {model.path}, which is only read; to reach the Hub's: --exclude {model.id}"
        )
        return _error(403, "", message)
    if asked.revision not in (None, "main", "HEAD", commit):
        message = (
            f"{model.id} is served from {model.path}, which holds one revision (main, {commit}), and not "
            f"{asked.revision}; to load another one from the Hub, run with --exclude {model.id}"
        )
        return _error(404, "RevisionNotFound", message)
    if asked.what in ("info", "revision"):
        return JSONResponse(_info(found))
    if asked.what == "tree":
        if _verifies(request) and any(file.etag is None for file in model.files):
            message = (
                f"{model.path} was not made by hf download, so there are no checksums of the Hub's to compare with"
            )
            return _error(501, "", message)
        listed = list(_tree(model, asked.path, is_recursive="recursive" in request.query_params))
        return JSONResponse(listed) if listed else _error(404, "EntryNotFound", f"{model.path} has no {asked.path}")
    if asked.what == "paths-info":
        wanted = await _wanted_paths(request)
        return JSONResponse([_entry(model, file) for file in model.files if file.name in wanted])
    if asked.what == "refs":
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
        return JSONResponse({"branches": [branch], "tags": [], "converts": [], "pullRequests": []})
    if asked.what == "resolve":
        return _file(found, asked.path)
    message = f"{model.id} is served from {model.path}, which does not tell this; to ask the Hub: --exclude {model.id}"
    return _error(404, "EntryNotFound", message)


def _info(found: LinkedRepo) -> dict[str, object]:
    model, commit = found.model, found.commit
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


def _verifies(request: Request) -> bool:
    """Whether the listing is for `hf cache verify`, which would take our made-up ids for checksums of the files.

    Clients that can tell (huggingface_hub >= 1.32) flag what they ask for a download.
    """
    version = re.search(r"hf_hub/(\d+)\.(\d+)", request.headers.get("user-agent", ""))
    can_tell = version is not None and (int(version[1]), int(version[2])) >= (1, 32)
    is_pinned = _COMMIT.search(request.url.path.rpartition("/tree/")[2]) is not None
    return can_tell and is_pinned and "x-hf-download-counter" not in request.headers


def _tree(model: Model, below: str, *, is_recursive: bool) -> list[dict[str, object]]:
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
    body = (await request.body()).decode("utf-8", "replace")
    try:
        paths = json.loads(body).get("paths", []) if body.startswith("{") else parse_qs(body).get("paths", [])
    except ValueError:
        return set()
    return {paths} if isinstance(paths, str) else {str(path) for path in paths}


def _file(found: LinkedRepo, name: str) -> Response:
    from starlette.responses import FileResponse

    model, commit = found.model, found.commit
    file = next((file for file in model.files if file.name == name), None)
    path = f"{model.path}/{name}"
    if file is None or not os.path.isfile(path):
        return _error(404, "EntryNotFound", f"{model.path} has no {name}", {"X-Repo-Commit": commit})
    headers = {
        "ETag": f'"{hfcache.etag(model, file)}"',
        "X-Repo-Commit": commit,
        "X-Linked-Size": str(os.path.getsize(path)),
        "X-Linked-ETag": f'"{hfcache.etag(model, file)}"',
    }
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the Hub's shape; clients print the X-Error-Message."""
    from starlette.responses import JSONResponse

    shape = {"X-Error-Message": quote(message, safe=" !#$%&'()*+,-./:;<=>?@[]^_`{|}~")}
    if code:
        shape["X-Error-Code"] = code
    return JSONResponse({"error": message}, status, {**shape, **(headers or {})})
