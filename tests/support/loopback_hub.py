"""A Hugging Face Hub on this machine that unmodified clients download from, and that counts every byte it serves.

    with LoopbackHub() as hub:
        commit = hub.add_repo("org/name", {"config.json": b"{}", "model.safetensors": weights})
        succeed(["hf", "download", "org/name"], hub.environment(home))
        assert hub.bytes_served("org/name") == 2 + len(weights)

It answers as the Hub does, in what clients look at: files kept in git by a relative redirect to a cached copy, files
kept in LFS by an absolute one to a signed address on another host, errors by status and X-Error-Code.

That other host ("the CDN") is a second port under another name of this machine: clients follow a redirect to a host
they take for the Hub's own, some releases comparing ports and some not, and then would not find what is in the first
answer. Nothing here asks a name server or connects to anything.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import re
import secrets
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.support.hfcache import git_blob_id
from tests.support.processes import SECONDS
from tests.support.processes import environment as program_environment

RepoType = Literal["model", "dataset", "space"]
Query = dict[str, list[str]]
_Host = Literal["hub", "cdn"]
_Kind = Literal["hang", "fail", "slow", "cut"]

TOKEN = "hf_of_the_tester"
"""The token of the one user a hub starts with, who may read everything."""

_TYPES: dict[str, RepoType] = {"models": "model", "datasets": "dataset", "spaces": "space"}
# What follows a repo's id in /api/models/…; an id is one part or two.
_VERB = "auth-check|commit|commits|discussions|paths-info|preupload|refs|revision|tree|xet-read-token|xet-write-token"
_API = re.compile(rf"/api/(models|datasets|spaces)/([^/]+(?:/(?!(?:{_VERB})(?:/|$))[^/]+)?)(?:/({_VERB})(?:/(.+))?)?")
_COPY = re.compile(r"/api/resolve-cache/(models|datasets|spaces)/([^/]+(?:/[^/]+)?)/([0-9a-f]{40})/(.+)")
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOCK = 1 << 20
_BODY_KEPT = 64 << 20


# Repos ---------------------------------------------------------------------------------------------------------


def in_lfs(name: str, size: int) -> bool:
    """What is kept in LFS unless `add_repo` is told otherwise."""
    return name.endswith(".safetensors") or size > 10 << 20


def virtual_bytes(start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a virtual file. Each MiB of it starts with its number, so none can stand in another's place."""
    for number in range(start // _BLOCK, -(-stop // _BLOCK)):
        first = number * _BLOCK
        block = memoryview(number.to_bytes(8, "big") + _noise())
        yield block[max(0, start - first) : stop - first]


@cache
def _noise() -> bytes:
    return Random(0).randbytes(_BLOCK - 8)


class _File(NamedTuple):
    name: str
    size: int
    content: bytes | None
    """None: virtual."""
    oid: str
    """Of the git blob, which for a file in LFS is the pointer to it."""
    sha256: str | None
    """For a file in LFS. Made up where the file is virtual."""
    pointer_size: int

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def read(self, start: int, stop: int) -> Iterator[memoryview]:
        if self.content is None:
            yield from virtual_bytes(start, stop)
        else:
            yield memoryview(self.content)[start:stop]


def _file(name: str, content: bytes, *, lfs: bool) -> _File:
    if not lfs:
        return _File(name, len(content), content, git_blob_id(content), None, 0)
    return _lfs_file(name, len(content), content, hashlib.sha256(content).hexdigest())


def _lfs_file(name: str, size: int, content: bytes | None, sha256: str) -> _File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return _File(name, size, content, git_blob_id(pointer), sha256, len(pointer))


class _Commit(NamedTuple):
    sha: str
    files: Mapping[str, _File]
    parent: _Commit | None
    date: str

    def history(self) -> Iterator[_Commit]:
        commit: _Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


@dataclass
class _Repo:
    id: str
    type: RepoType
    private: bool = False
    gated: bool = False
    xet: bool = False
    lfs: Callable[[str, int], bool] = in_lfs
    commits: dict[str, _Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"/api/{self.type}s/{self.id}"

    @property
    def page(self) -> str:
        return f"/{self.id}" if self.type == "model" else f"/{self.type}s/{self.id}"

    def commit(self, revision: str) -> _Commit:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def move(self, branch: str, files: Mapping[str, _File], sha: str | None = None) -> str:
        """Put a commit of these files on a branch."""
        if sha is None:
            listed = "\n".join(f"{name} {files[name].etag}" for name in sorted(files))
            sha = hashlib.sha1(f"{self.type}\n{self.id}\n{listed}".encode()).hexdigest()
        if not _COMMIT.fullmatch(sha):
            raise ValueError(f"not a commit: {sha!r}")
        if sha not in self.commits:
            parent = self.commits.get(self.branches.get(branch, ""))
            date = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.commits))
            self.commits[sha] = _Commit(sha, files, parent, date.strftime("%Y-%m-%dT%H:%M:%S.000Z"))
        elif self.commits[sha].files != files:
            raise ValueError(f"{self.id} has a commit {sha} of other files")
        self.branches[branch] = sha
        return sha


class _User(NamedTuple):
    name: str
    reads: Collection[str] | None
    """Ids of the private and gated repos open to this user; None: all."""

    def may_read(self, repo: _Repo) -> bool:
        return self.reads is None or repo.id in self.reads


# Requests and answers --------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request as it arrived, and what it was answered with so far."""

    method: str
    host: Literal["hub", "cdn", "outside"]
    """Outside: not under the hub's prefix."""
    path: str
    """Without that prefix, quoted as it came."""
    query: Query
    target: str
    """Path and query as one text, not quoted."""
    headers: dict[str, str]
    """Names in lower case."""
    at: float
    """time.monotonic() when its headers had been read."""
    body: bytes = b""
    """Empty where it was larger than 64 MiB."""
    body_size: int = 0
    body_sha256: str = ""
    repo_id: str | None = None
    """The repo it is about, whether there is such a repo or not."""
    name: str | None = None
    """The file of which the answer's body is a part, or for HEAD would be."""
    status: int = 0
    """0 until it is answered."""
    sent: int = 0
    """Bytes of the answer's body that went out, framing and compression included."""
    finished: bool = False
    """Whether the last byte of the file went out: to the kernel, not necessarily into the client's hands."""
    over: bool = False
    """Whether nothing more will be sent, as all was or the client left. Shortly after the client may know it."""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    file: _File | None = None
    start: int = 0
    stop: int = 0
    compressible: bool = False

    @property
    def length(self) -> int:
        return len(self.body) if self.file is None else self.stop - self.start

    def chunks(self) -> Iterable[memoryview]:
        return [memoryview(self.body)] if self.file is None else self.file.read(self.start, self.stop)


class _Refusal(Exception):
    """An answer that says no."""

    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers or {})

    def answer(self, *, as_text: bool) -> _Answer:
        if as_text:
            return _text(self.status, self.message, self.headers)
        return _json({"error": self.message}, self.headers, self.status)


def _no_page() -> _Refusal:
    return _Refusal(404, None, "Sorry, we can't find the page you are looking for.")


class _Moved(Exception):
    """The path at which to ask instead."""


def _json(content: object, headers: Mapping[str, str] | None = None, status: int = 200) -> _Answer:
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return _Answer(status, kind | dict(headers or {}), json.dumps(content).encode(), compressible=True)


def _text(status: int, content: str, headers: Mapping[str, str] | None = None) -> _Answer:
    return _Answer(status, {"Content-Type": "text/plain; charset=utf-8"} | dict(headers or {}), content.encode())


def _redirect(status: Literal[302, 307], location: str, headers: Mapping[str, str] | None = None) -> _Answer:
    said = f"{HTTPStatus(status).phrase}. Redirecting to {location}"
    return _text(status, said, {"Location": location} | dict(headers or {}))


def _file_answer(file: _File, wanted: str | None, headers: Mapping[str, str]) -> _Answer:
    """A file, or the part of it that a Range header wants."""
    headers = {
        "Content-Type": "application/octet-stream" if file.sha256 else "text/plain; charset=utf-8",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(file.name)}; filename=\"{Path(file.name).name}\";",
        "Accept-Ranges": "bytes",
    } | dict(headers)
    part = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", wanted or "", re.IGNORECASE)
    if part is None or part.groups() == ("", ""):
        return _Answer(200, headers, b"", file, 0, file.size, compressible=file.sha256 is None)
    first, last = part.groups()
    start = int(first) if first else max(0, file.size - int(last))
    stop = min(file.size, int(last) + 1) if first and last else file.size
    if start >= stop:
        raise _Refusal(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{file.size}"})
    return _Answer(206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{file.size}"}, b"", file, start, stop)


# Routes --------------------------------------------------------------------------------------------------------


_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="Authentication required", charset="UTF-8"'}


class _Site:
    """Repos and users, and what a request about them is answered with. `lock` guards the first."""

    endpoint = ""
    cdn = ""

    def __init__(self, prefix: str, page_size: int, resolve_cache: bool) -> None:
        self.prefix = prefix
        self.page_size = page_size
        self.resolve_cache = resolve_cache
        self.lock = threading.Lock()
        self.repos: dict[tuple[RepoType, str], _Repo] = {}
        self.renamed: dict[tuple[RepoType, str], str] = {}
        self.users = {TOKEN: _User("tester", None)}
        self._secret = secrets.token_bytes()

    def repo(self, repo_type: RepoType, repo_id: str) -> _Repo:
        """A repo, made if need be."""
        return self.repos.setdefault((repo_type, repo_id), _Repo(repo_id, repo_type))

    def answer(self, request: Request) -> _Answer:
        try:
            with self.lock:
                if request.host == "outside":
                    raise _no_page()
                return self._cdn_answer(request) if request.host == "cdn" else self._hub_answer(request)
        except _Refusal as refusal:
            return refusal.answer(as_text="/resolve" in request.path)
        except _Moved as moved:
            query = f"?{urlencode(request.query, doseq=True)}" if request.query else ""
            return _redirect(307, f"{self.prefix}{moved}{query}")

    def _hub_answer(self, request: Request) -> _Answer:
        user = self._user(request)
        if found := _API.fullmatch(request.path):
            types, id_, verb, rest = found.groups("")
            repo = self._repo(request, _TYPES[types], id_, user)
            return self._api(request, repo, user, verb, [unquote(part) for part in rest.split("/") if rest])
        if found := _COPY.fullmatch(request.path):
            types, id_, revision, name = found.groups()
            repo = self._open_repo(request, _TYPES[types], id_, user)
            return self._copy(request, *self._entry(request, repo, revision, unquote(name)))
        if found := _RESOLVE.fullmatch(request.path):
            types, id_, revision, name = found.groups("models")
            repo = self._open_repo(request, _TYPES[types], id_, user)
            return self._resolve(request, repo, *self._entry(request, repo, unquote(revision), unquote(name)))
        if request.path == "/api/whoami-v2":
            return self._whoami(user)
        if request.path == "/api/repos/create" and request.method == "POST":
            return self._create(request, user)
        if request.path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        raise _no_page()

    def _user(self, request: Request) -> _User | None:
        if request.authorization is None:
            return None
        user = self.users.get(request.authorization.removeprefix("Bearer "))
        if user is None:
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def _repo(self, request: Request, repo_type: RepoType, id_: str, user: _User | None) -> _Repo:
        """A repo of which the user may know."""
        request.repo_id = id_ = unquote(id_)
        new = self.renamed.get((repo_type, id_))
        if new is not None:
            raise _Moved(request.path.replace(f"/{id_}", f"/{new}", 1))
        repo = self.repos.get((repo_type, id_))
        if repo is not None and not (repo.private and (user is None or not user.may_read(repo))):
            return repo
        if user is None:
            raise _Refusal(401, "RepoNotFound", "Invalid username or password.", _CHALLENGE)
        raise _Refusal(404, "RepoNotFound", "Repository not found")

    def _open_repo(self, request: Request, repo_type: RepoType, id_: str, user: _User | None) -> _Repo:
        """A repo whose files the user may have; what lists them is in front of the gate."""
        repo = self._repo(request, repo_type, id_, user)
        if not repo.gated or (user is not None and user.may_read(repo)):
            return repo
        access = f"Access to {repo.type} {repo.id} is restricted"
        if user is None:
            said = f"{access}. You must have access to it and be authenticated to access it. Please log in."
            raise _Refusal(401, "GatedRepo", said, _CHALLENGE)
        ask = f"Visit {self.endpoint}{repo.page} to ask for access."
        raise _Refusal(403, "GatedRepo", f"{access} and you are not in the authorized list. {ask}")

    def _api(self, request: Request, repo: _Repo, user: _User | None, verb: str, rest: list[str]) -> _Answer:
        match "GET" if request.method == "HEAD" else request.method, verb, rest:
            case "GET", "", []:
                return _json(self._info(repo, repo.commit("main"), request.query))
            case "GET", "revision", [revision]:
                return _json(self._info(repo, repo.commit(revision), request.query))
            case "GET", "tree", [revision, *folder]:
                return self._tree(request, repo, repo.commit(revision), "/".join(folder))
            case "POST", "paths-info", [revision]:
                return self._paths_info(request, repo, repo.commit(revision))
            case "GET", "refs", []:
                return self._refs(request, repo)
            case "GET", "commits", [revision]:
                return self._page(request, [_commit_json(commit) for commit in repo.commit(revision).history()])
            case "GET", "xet-read-token", [_]:
                self._open_repo(request, repo.type, repo.id, user)
                return self._xet_token()
            case "GET", "xet-write-token", [_]:
                self._signed_in(user)
                return self._xet_token()
            case "GET", "auth-check", _:
                self._open_repo(request, repo.type, repo.id, user)
                return _json({})
            case "GET", "discussions", []:
                return _json({"discussions": [], "count": 0, "start": 0, "numClosedDiscussions": 0})
            case "POST", "preupload", [_]:
                self._signed_in(user)
                return self._preupload(request)
            case "POST", "commit", [revision]:
                self._signed_in(user)
                return self._commit(request, repo, revision)
        raise _no_page()

    def _refs(self, request: Request, repo: _Repo) -> _Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
        ]
        asked: dict[str, list[object]] = {"pullRequests": []} if "include_prs" in request.query else {}
        return _json({"branches": branches, "converts": [], "tags": [], **asked})

    def _info(self, repo: _Repo, commit: _Commit, query: Query) -> dict[str, object]:
        blobs = "blobs" in query
        oldest = next(iter(repo.commits.values()))
        info: dict[str, object] = {
            "_id": hashlib.sha1(f"{repo.type} {repo.id}".encode()).hexdigest()[:24],
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": oldest.date,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [_sibling(file, blobs=blobs) for file in _sorted(commit)],
            "usedStorage": sum(file.size for file in commit.files.values()),
        }
        if repo.type == "model":
            info |= {"modelId": repo.id, "config": {}, "spaces": []}
        expand = query.get("expand", []) + query.get("expand[]", [])
        return {key: info[key] for key in info if key in ("_id", "id", *expand)} if expand else info

    def _tree(self, request: Request, repo: _Repo, commit: _Commit, folder: str) -> _Answer:
        found = _entries(repo, commit, expand=_is_true(request.query, "expand"))
        if folder:
            if found.get(folder, {}).get("type") != "directory":
                raise _Refusal(404, "EntryNotFound", f'{folder} does not exist on "{commit.sha}"')
            found = {path: entry for path, entry in found.items() if path.startswith(f"{folder}/")}
        if not _is_true(request.query, "recursive"):
            depth = folder.count("/") + 1 if folder else 0
            found = {path: entry for path, entry in found.items() if path.count("/") == depth}
        return self._page(request, list(found.values()))

    def _paths_info(self, request: Request, repo: _Repo, commit: _Commit) -> _Answer:
        if "json" in request.headers.get("content-type", ""):
            asked = json.loads(request.body)
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), _is_true(form, "expand")
        found = _entries(repo, commit, expand=expand)
        return _json([found[path] for path in paths if path in found])

    def _page(self, request: Request, entries: list[dict[str, object]]) -> _Answer:
        """One page of a listing, with a link to the next: an absolute one, to this hub's own address."""
        start = int(request.query.get("cursor", ["0"])[0])
        size = min(self.page_size, int(request.query.get("limit", [str(self.page_size)])[0]))
        if start + size >= len(entries):
            return _json(entries[start:])
        query = urlencode({**request.query, "limit": size, "cursor": start + size}, doseq=True)
        link = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return _json(entries[start : start + size], {"Link": link})

    def _entry(self, request: Request, repo: _Repo, revision: str, name: str) -> tuple[_Commit, _File]:
        if request.method not in ("GET", "HEAD"):
            raise _no_page()
        commit = repo.commit(revision)
        if name not in commit.files:
            raise _Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
        return commit, commit.files[name]

    def _resolve(self, request: Request, repo: _Repo, commit: _Commit, file: _File) -> _Answer:
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
        if file.sha256 is not None:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
            if repo.xet:
                auth = f"{self.endpoint}{repo.api}/xet-read-token/{commit.sha}"
                headers |= {"X-Xet-Hash": _xet_hash(file), "Link": f'<{auth}>; rel="xet-auth"'}
            return _redirect(302, self._signed_url(repo, commit, file), headers)
        if not self.resolve_cache:
            return self._copy(request, commit, file)
        query = f"{quote(request.path, safe='')}=&etag={quote(headers['ETag'])}"
        copy = f"/api/resolve-cache/{repo.type}s/{repo.id}/{commit.sha}/{quote(file.name)}"
        return _redirect(307, f"{self.prefix}{copy}?{query}", headers)

    def _copy(self, request: Request, commit: _Commit, file: _File) -> _Answer:
        request.name = file.name
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        return _file_answer(file, request.headers.get("range"), headers)

    def _whoami(self, user: _User | None) -> _Answer:
        user = self._signed_in(user)
        token = {"displayName": f"token of {user.name}", "role": "write", "createdAt": "2024-01-01T00:00:00.000Z"}
        about = {"type": "user", "id": hashlib.sha1(user.name.encode()).hexdigest()[:24], "name": user.name}
        account = {"fullname": user.name, "isPro": False, "canPay": False, "orgs": []}
        return _json(about | account | {"auth": {"type": "access_token", "accessToken": token}})

    def _signed_in(self, user: _User | None) -> _User:
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.", _CHALLENGE)
        return user

    def _create(self, request: Request, user: _User | None) -> _Answer:
        user = self._signed_in(user)
        asked = json.loads(request.body)
        repo_type: RepoType = _TYPES[f"{asked.get('type') or 'model'}s"]
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = _Repo(f"{asked.get('organization') or user.name}/{asked['name']}", repo_type, private=private)
        request.repo_id = repo.id
        if (repo_type, repo.id) in self.repos:
            message = f"You already created this {repo_type} repo: {repo.id}"
            return _json({"error": message, "url": f"{self.endpoint}{repo.page}"}, {"X-Error-Message": message}, 409)
        repo.move("main", {".gitattributes": _file(".gitattributes", b"*.safetensors filter=lfs\n", lfs=False)})
        self.repos[repo_type, repo.id] = repo
        return _json({"url": f"{self.endpoint}{repo.page}", "name": repo.id, "id": repo.id})

    def _preupload(self, request: Request) -> _Answer:
        asked = json.loads(request.body)["files"]
        return _json({"files": [{"path": it["path"], "uploadMode": "regular", "shouldIgnore": False} for it in asked]})

    def _commit(self, request: Request, repo: _Repo, branch: str) -> _Answer:
        files = dict(repo.commit(branch).files)
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    pass
                case "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = _file(value["path"], content, lfs=repo.lfs(value["path"], len(content)))
                case "deletedFile":
                    files.pop(value["path"], None)
                case "deletedFolder":
                    inside = f"{value['path'].rstrip('/')}/"
                    files = {name: file for name, file in files.items() if not name.startswith(inside)}
                case key:
                    raise _Refusal(400, None, f"cannot do {key}")
        sha = repo.move(branch, files)
        url = f"{self.endpoint}{repo.page}/commit/{sha}"
        return _json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _xet_token(self) -> _Answer:
        # In 2100: equal requests get equal answers, whichever second they come in.
        info = {"casUrl": f"{self.cdn}/xet", "accessToken": "xet_of_the_tester", "exp": 4_102_444_800}
        headers = {
            "X-Xet-Cas-Url": str(info["casUrl"]),
            "X-Xet-Access-Token": str(info["accessToken"]),
            "X-Xet-Token-Expiration": str(info["exp"]),
        }
        return _json(info, headers)

    # The CDN

    def _signed_url(self, repo: _Repo, commit: _Commit, file: _File) -> str:
        query = {"type": f"{repo.type}s", "repo": repo.id, "commit": commit.sha, "name": file.name}
        return f"{self.cdn}/cdn/{file.sha256}?{urlencode(query)}&Signature={self._signature(query)}"

    def _signature(self, query: Mapping[str, str]) -> str:
        return hmac.digest(self._secret, json.dumps(query).encode(), "sha256").hex()

    def _cdn_answer(self, request: Request) -> _Answer:
        query = {key: values[0] for key, values in request.query.items()}
        signature = query.pop("Signature", "")
        request.repo_id = query.get("repo")
        # The tokens of users are none of its business, and it says so as S3 does.
        if request.authorization is not None:
            raise _Refusal(400, None, "Only one auth mechanism allowed")
        if request.method not in ("GET", "HEAD") or not hmac.compare_digest(signature, self._signature(query)):
            raise _Refusal(403, None, "Access Denied")
        file = self.repos[_TYPES[query["type"]], query["repo"]].commits[query["commit"]].files[query["name"]]
        request.name = file.name
        # An ETag of its own, which is not the file's in the repo.
        return _file_answer(file, request.headers.get("range"), {"ETag": f'"{file.etag[:32]}-1"'})


def _is_true(query: Query, name: str) -> bool:
    return query.get(name, [""])[0].lower() in ("true", "1")


def _sorted(commit: _Commit) -> list[_File]:
    return [commit.files[name] for name in sorted(commit.files)]


def _sibling(file: _File, *, blobs: bool) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": file.name}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.sha256 is not None:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return sibling


def _entries(repo: _Repo, commit: _Commit, *, expand: bool) -> dict[str, dict[str, object]]:
    """Path -> entry of all files and folders, as the tree listing has them."""
    entries: dict[str, dict[str, object]] = {}
    for file in _sorted(commit):
        parts = file.name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.sha} {folder}".encode()).hexdigest()
            entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        entry: dict[str, object] = {"type": "file", "oid": file.oid, "size": file.size, "path": file.name}
        if file.sha256 is not None:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            if repo.xet:
                entry["xetHash"] = _xet_hash(file)
        entries[file.name] = entry
    if expand:
        last = {"id": commit.sha, "title": "A commit", "date": commit.date}
        for entry in entries.values():
            entry["lastCommit"] = last
            if entry["type"] == "file":
                entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return entries


def _commit_json(commit: _Commit) -> dict[str, object]:
    authors = [{"user": "tester", "avatar": ""}]
    return {"id": commit.sha, "title": "A commit", "message": "", "authors": authors, "date": commit.date}


def _xet_hash(file: _File) -> str:
    return hashlib.sha256(f"xet {file.sha256}".encode()).hexdigest()


# Going wrong -----------------------------------------------------------------------------------------------------


class _Fault(NamedTuple):
    """What is to go wrong with requests that have `on` in their target."""

    amount: float
    on: str


class _Faults:
    """What is set to go wrong; the handlers ask at each step."""

    def __init__(self) -> None:
        self._set: dict[_Kind, _Fault] = {}
        self._changed = threading.Condition()
        self._ending = False

    def set(self, kind: _Kind, amount: float, on: str) -> None:
        with self._changed:
            self._set[kind] = _Fault(amount, on)

    def clear(self) -> None:
        with self._changed:
            self._set.clear()
            self._changed.notify_all()

    def end_pauses(self, ending: bool) -> None:
        with self._changed:
            self._ending = ending
            self._changed.notify_all()

    def amount(self, kind: _Kind, request: Request) -> float | None:
        with self._changed:
            fault = self._set.get(kind)
            return fault.amount if fault is not None and fault.on in request.target else None

    def take_cut(self, request: Request, length: int) -> int | None:
        """After how many bytes this body is to be cut, which then no other is."""
        with self._changed:
            amount = self.amount("cut", request)
            if amount is None or amount >= length:
                return None
            del self._set["cut"]
            return int(amount)

    def pause(self, kind: _Kind, seconds: float) -> None:
        """Wait, unless the listening ends or the reason to wait does."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending or kind not in self._set, seconds)


# The hub -------------------------------------------------------------------------------------------------------


class LoopbackHub:
    """The hub, reachable while its context is entered. Its methods may be called from any thread, before and within.

    The context's end raises AssertionError when the hub itself failed to answer a request.
    """

    def __init__(
        self, *, prefix: str = "", page_size: int = 1000, resolve_cache: bool = True, compress: bool = False
    ) -> None:
        """`prefix` is a path that the endpoint has, as behind a mirror: "/a/b".

        `page_size`: how many entries of a listing one answer holds at most. `resolve_cache`: GET and HEAD of a file
        kept in git are redirected (307, relative) as by the Hub of today, else answered at once, as by that of old.
        `compress`: text and JSON go out gzipped and chunked to clients that accept it.
        """
        self.compress = compress
        self.prefix = f"/{prefix.strip('/')}" if prefix else ""
        self._site = _Site(self.prefix, page_size, resolve_cache)
        self.faults = _Faults()
        self._lock = threading.Lock()
        self._requests: list[tuple[Request, threading.Lock]] = []
        self._errors: list[BaseException] = []
        self._ports: dict[_Host, int] = {}
        self._held: dict[_Host, socket.socket] = {}
        self._listeners: list[_Listener] = []

    def __enter__(self) -> Self:
        self._held = {"hub": _bound(0), "cdn": _bound(0)}
        self._ports = {host: held.getsockname()[1] for host, held in self._held.items()}
        self._site.endpoint = f"http://127.0.0.1:{self._ports['hub']}{self.prefix}"
        self._site.cdn = f"http://localhost:{self._ports['cdn']}"
        self.recover()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        for held in self._held.values():
            held.close()
        if kind is None and self._errors:
            raise AssertionError(f"the hub failed to answer {len(self._errors)} requests") from self._errors[0]

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return self._site.endpoint

    @property
    def cdn(self) -> str:
        """Where files kept in LFS are served from."""
        return self._site.cdn

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What a shell whose Hub is this one hands to a program.

        Without Xet, of which the hub knows the routes and not the storage.
        """
        environ = program_environment(home)
        del environ["HF_HUB_OFFLINE"]
        local = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        return environ | local | more

    # What it holds

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        repo_type: RepoType = "model",
        branch: str = "main",
        commit: str | None = None,
        private: bool | None = None,
        gated: bool | None = None,
        xet: bool | None = None,
        lfs: Callable[[str, int], bool] = in_lfs,
    ) -> str:
        """Put a commit of exactly these files on a branch of a repo, which is made if need be; return the commit.

        `files` is also a folder to copy. Commits that the branch had before stay, by their hash. `commit` follows
        from the repo and the files when None. `lfs` says by name and size what is kept in LFS. `xet` offers those
        by Xet too, which only clients without Xet can live with. `private`, `gated` and `xet` stay as they were
        when None, which at first is False.
        """
        contents = _read_folder(files) if isinstance(files, Path) else files
        held = {name: _file(name, content, lfs=lfs(name, len(content))) for name, content in contents.items()}
        with self._site.lock:
            repo = self._site.repo(repo_type, repo_id)
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else gated
            repo.xet = repo.xet if xet is None else xet
            repo.lfs = lfs
            return repo.move(branch, held, commit)

    def add_virtual(self, repo_id: str, name: str, size: int, *, repo_type: RepoType = "model") -> str:
        """Add to main a file in LFS whose bytes are made as they are sent: `virtual_bytes`; return the commit.

        Its sha256 is made up, as computing it would take longer than serving the file.
        """
        file = _lfs_file(name, size, None, hashlib.sha256(f"{repo_id}/{name} {size}".encode()).hexdigest())
        with self._site.lock:
            repo = self._site.repo(repo_type, repo_id)
            before = repo.commit("main").files if "main" in repo.branches else {}
            return repo.move("main", {**before, name: file})

    def rename(self, old: str, new: str, *, repo_type: RepoType = "model") -> None:
        """Answer for `old` with redirects (307, relative) to `new`."""
        with self._site.lock:
            self._site.renamed[repo_type, old] = new

    def add_user(self, token: str, name: str, *, reads: Collection[str] = ()) -> None:
        """A user to whom these of the private and gated repos are open."""
        with self._site.lock:
            self._site.users[token] = _User(name, reads)

    # What it served

    @property
    def requests(self) -> list[Request]:
        """All requests in the order of their arrival, as they are now."""
        with self._lock:
            known = list(self._requests)
        return [_copy(*entry) for entry in known]

    def bytes_served(self, repo_id: str | None = None, *, files_only: bool = True) -> int:
        """Bytes of bodies that went out: all, or those about one repo; those of files, or also what tells of them."""
        return sum(
            request.sent
            for request in self.requests
            if repo_id in (None, request.repo_id) and (request.name is not None or not files_only)
        )

    def finished_files(self) -> list[tuple[str, str]]:
        """(repo_id, name) for each time that the last byte of a file went out, alone or at the end of more.

        Never an empty file: clients take its size for an answer. A client that is killed may not have read that byte.
        """
        return [
            (request.repo_id, request.name)
            for request in self.requests
            if request.finished and request.repo_id is not None and request.name is not None
        ]

    def reset_counts(self) -> None:
        """Forget all requests so far."""
        with self._lock:
            self._requests.clear()

    # What goes wrong: from when it is set until `heal`, with requests that have `on` in their path or query

    def outage(self) -> None:
        """Refuse connections, and drop those there are. The ports stay taken, by sockets that do not listen."""
        self._stop()
        if not self._held:
            self._held = {host: _bound(port) for host, port in self._ports.items()}

    def recover(self) -> None:
        """End an outage: listen again, at the same ports."""
        self.faults.end_pauses(False)
        while self._held:
            self._listeners.append(_Listener(self, *self._held.popitem()))

    def hang(self, seconds: float, *, on: str = "") -> None:
        """Accept requests, and answer that much later, or at once when healed."""
        self.faults.set("hang", seconds, on)

    def fail(self, status: int = 500, *, on: str = "") -> None:
        """Answer with an error."""
        self.faults.set("fail", status, on)

    def slow(self, bytes_per_second: float, *, on: str = "") -> None:
        """Send no body of a file faster than that, each by itself."""
        self.faults.set("slow", bytes_per_second, on)

    def cut_after(self, size: int, *, on: str = "") -> None:
        """Drop the connection after so many bytes of the next body of a file that is longer, and of no other."""
        self.faults.set("cut", size, on)

    def heal(self) -> None:
        """Let nothing go wrong any more but an outage, which `recover` ends."""
        self.faults.clear()

    # For the handlers

    def record(self, request: Request) -> threading.Lock:
        """Count a request from now on; return the lock under which it is changed."""
        lock = threading.Lock()
        with self._lock:
            self._requests.append((request, lock))
        return lock

    def answer(self, request: Request) -> _Answer:
        failure = self.faults.amount("fail", request)
        if failure is not None:
            said = "Internal Error - We're working hard to fix this as soon as possible!"
            return _Refusal(int(failure), None, said).answer(as_text=False)
        return self._site.answer(request)

    def broke(self, error: BaseException) -> None:
        """Tell of an error of the hub's own."""
        with self._lock:
            self._errors.append(error)

    def _stop(self) -> None:
        self.faults.end_pauses(True)
        while self._listeners:
            self._listeners.pop().stop()


def _copy(request: Request, lock: threading.Lock) -> Request:
    with lock:
        return replace(request)


def _read_folder(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise NotADirectoryError(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# HTTP ----------------------------------------------------------------------------------------------------------


def _bound(port: int) -> socket.socket:
    """A socket that has a port of 127.0.0.1, and refuses connections until it listens."""
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound


class _Listener(ThreadingHTTPServer):
    """Serves one port until it is stopped."""

    request_queue_size = 1024

    def __init__(self, hub: LoopbackHub, host: _Host, bound: socket.socket) -> None:
        # Not HTTPServer's own binding, which asks a name server for the name of the address.
        socketserver.BaseServer.__init__(self, bound.getsockname(), _Handler)
        self.socket = bound
        self.hub = hub
        self.host = host
        self._lock = threading.Lock()
        self._serving: dict[threading.Thread, socket.socket] = {}
        self.server_activate()
        self._accepting = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._accepting.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
        with self._lock:
            self._serving[thread] = request
        thread.start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._serving[threading.current_thread()]

    def stop(self) -> None:
        """Listen no more, and drop all connections."""
        self.shutdown()
        self.server_close()
        self._accepting.join(SECONDS)
        with self._lock:
            serving = list(self._serving.items())
        for thread, connection in serving:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its client was faster
            thread.join(SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # Clients that leave in the middle are what some tests are about.
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.broke(error)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, sends answers, counts what goes out."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        hub = self.server.hub
        request = self._request()
        self._counting = hub.record(request)
        try:
            self._read_body(request)
            seconds = hub.faults.amount("hang", request)
            if seconds is not None:
                hub.faults.pause("hang", seconds)
            with self._counting:
                answer = hub.answer(request)
                request.status = answer.status
            self._send(request, answer)
        finally:
            with self._counting:
                request.over = True

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _request(self) -> Request:
        url = urlsplit(self.path)
        host: Literal["hub", "cdn", "outside"] = self.server.host
        path = url.path
        if host == "hub":
            prefix = self.server.hub.prefix
            host, path = ("hub", path.removeprefix(prefix)) if path.startswith(f"{prefix}/") else ("outside", path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(url.query, keep_blank_values=True)
        return Request(self.command, host, path, query, unquote(f"{path}?{url.query}"), headers, time.monotonic())

    def _read_body(self, request: Request) -> None:
        digest = hashlib.sha256()
        kept: list[bytes] = []
        size = 0
        for chunk in self._body_chunks():
            digest.update(chunk)
            size += len(chunk)
            if size <= _BODY_KEPT:
                kept.append(chunk)
        with self._counting:
            request.body_size, request.body_sha256 = size, digest.hexdigest()
            request.body = b"".join(kept) if size <= _BODY_KEPT else b""

    def _body_chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self._read(length)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            chunk = self._read(min(left, _BLOCK))
            left -= len(chunk)
            yield chunk

    def _read(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client left in the middle of its request")
        return data

    def _send(self, request: Request, answer: _Answer) -> None:
        hub = self.server.hub
        headers = {"Date": self.date_time_string(), "X-Request-Id": f"Root={request.at}", **answer.headers}
        length, chunks = answer.length, answer.chunks()
        if hub.compress and self._may_compress(answer):
            chunks = _chunked(gzip.compress(b"".join(chunks)))
            length = sum(map(len, chunks))
            headers |= {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked", "Vary": "Accept-Encoding"}
        else:
            headers["Content-Length"] = str(length)
        head = _head(answer.status, headers)
        if request.method == "HEAD":
            self._transmit(request, head, memoryview(b""))
        else:
            self._send_body(request, answer, head, chunks, length)

    def _send_body(
        self, request: Request, answer: _Answer, head: bytes, chunks: Iterable[memoryview], length: int
    ) -> None:
        file = answer.file
        cut = None if file is None else self.server.hub.faults.take_cut(request, length)
        finishes = file is not None and answer.stop == file.size and cut is None
        left = length if cut is None else cut
        for piece in chunks if file is None else self._pieces(request, chunks):
            sent = piece[:left]
            left -= len(sent)
            self._transmit(request, head, sent, finishing=finishes and not left)
            head = b""
            if not left:
                break
        if head:
            self._transmit(request, head, memoryview(b""), finishing=finishes)
        self.close_connection |= cut is not None

    def _may_compress(self, answer: _Answer) -> bool:
        accepted = "gzip" in self.headers.get("Accept-Encoding", "")
        return accepted and answer.compressible and answer.status == 200 and self.command == "GET"

    def _pieces(self, request: Request, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        """The chunks, in pieces small enough to go out at the speed that is set while they do."""
        faults = self.server.hub.faults
        for chunk in chunks:
            while chunk:
                rate = faults.amount("slow", request)
                size = _BLOCK if rate is None else max(1, int(rate / 20))
                yield chunk[:size]
                if rate is not None:
                    faults.pause("slow", size / rate)
                chunk = chunk[size:]

    def _transmit(self, request: Request, head: bytes, body: memoryview, *, finishing: bool = False) -> None:
        """Send, and count what of the body went out.

        Counted under the request's lock and without waiting there: whoever asks after a client has got the last byte
        is told of it.
        """
        data = memoryview(head + body.tobytes()) if head else body
        uncounted = len(head)
        while True:
            with self._counting:
                try:
                    sent = self.connection.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                data = data[sent:]
                request.sent += max(0, sent - uncounted)
                uncounted = max(0, uncounted - sent)
                request.finished |= finishing and not data
            if not data:
                return
            writable = select.poll()
            writable.register(self.connection, select.POLLOUT)
            if not writable.poll(SECONDS * 1000):
                raise ConnectionError("the client does not read")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _chunked(data: bytes) -> list[memoryview]:
    half = len(data) // 2 or len(data)
    parts = [part for part in (data[:half], data[half:]) if part]
    return [memoryview(b"%x\r\n%b\r\n" % (len(part), part)) for part in parts] + [memoryview(b"0\r\n\r\n")]


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
    lines = [f"HTTP/1.1 {status} {phrase}"]
    # Names of files and revisions get into some: what a header cannot hold is replaced.
    lines += [f"{name}: {' '.join(value.splitlines())}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


# A process of its own --------------------------------------------------------------------------------------------


def described(spec: Mapping[str, Any]) -> LoopbackHub:
    """A hub from plain data: {"hub": {…}, "repos": [{"repo_id", "files" | "folder", "virtual": {name: size}, …}]}.

    `hub` and what else a repo has are what LoopbackHub and `add_repo` take; `files` are texts here.
    """
    hub = LoopbackHub(**spec.get("hub", {}))
    for repo in map(dict, spec["repos"]):
        virtual = repo.pop("virtual", {})
        texts = repo.pop("files", {})
        folder = repo.pop("folder", None)
        hub.add_repo(files=Path(folder) if folder else {name: text.encode() for name, text in texts.items()}, **repo)
        for name, size in virtual.items():
            hub.add_virtual(repo["repo_id"], name, size, repo_type=repo.get("repo_type", "model"))
    return hub


def main() -> None:
    """`python -m tests.support.loopback_hub SPEC.json`: says its endpoint in a line of JSON, and then serves.

    Each line of stdin is a method and its arguments, {"slow": {"bytes_per_second": 1000}}; it is answered with a line
    of JSON, what the method returned. The end of stdin is the hub's.
    """
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with described(spec) as hub:
        print(json.dumps(hub.endpoint), flush=True)
        for line in sys.stdin:
            ((method, arguments),) = json.loads(line).items()
            print(json.dumps(getattr(hub, method)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
