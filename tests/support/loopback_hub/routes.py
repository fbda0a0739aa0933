"""Which answer a request gets: the Hub's routes over the repos and users that it has."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from collections.abc import Mapping
from urllib.parse import parse_qs, quote, unquote, urlencode

from tests.support.loopback_hub.answers import (
    Answer,
    Moved,
    Query,
    Refusal,
    Request,
    file_answer,
    json_answer,
    no_page,
    redirect,
)
from tests.support.loopback_hub.files import File, make_file
from tests.support.loopback_hub.repos import Commit, Repo, RepoType, User

TOKEN = "hf_of_the_tester"
"""The token of the one user a hub starts with, who may read everything."""

_TYPES: dict[str, RepoType] = {"models": "model", "datasets": "dataset", "spaces": "space"}
# What follows a repo's id in /api/models/…; an id is one part or two.
_VERB = "auth-check|commit|commits|discussions|paths-info|preupload|refs|revision|tree|xet-read-token|xet-write-token"
_API = re.compile(rf"/api/(models|datasets|spaces)/([^/]+(?:/(?!(?:{_VERB})(?:/|$))[^/]+)?)(?:/({_VERB})(?:/(.+))?)?")
_COPY = re.compile(r"/api/resolve-cache/(models|datasets|spaces)/([^/]+(?:/[^/]+)?)/([0-9a-f]{40})/(.+)")
_RESOLVE = re.compile(r"/(?:(datasets|spaces)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="Authentication required", charset="UTF-8"'}


class Site:
    """Repos and users, and what a request about them is answered with. `lock` guards the first."""

    endpoint = ""
    cdn = ""

    def __init__(self, prefix: str, page_size: int, resolve_cache: bool) -> None:
        self.prefix = prefix
        self.page_size = page_size
        self.resolve_cache = resolve_cache
        self.lock = threading.Lock()
        self.repos: dict[tuple[RepoType, str], Repo] = {}
        self.renamed: dict[tuple[RepoType, str], str] = {}
        self.users = {TOKEN: User("tester", None)}
        self._secret = secrets.token_bytes()

    def repo(self, repo_type: RepoType, repo_id: str) -> Repo:
        """A repo, made if need be."""
        return self.repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type))

    def answer(self, request: Request) -> Answer:
        try:
            with self.lock:
                if request.host == "outside":
                    raise no_page()
                return self._cdn_answer(request) if request.host == "cdn" else self._hub_answer(request)
        except Refusal as refusal:
            return refusal.answer(as_text="/resolve" in request.path)
        except Moved as moved:
            query = f"?{urlencode(request.query, doseq=True)}" if request.query else ""
            return redirect(307, f"{self.prefix}{moved}{query}")

    def _hub_answer(self, request: Request) -> Answer:
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
            return json_answer({"errors": [], "warnings": []})
        raise no_page()

    def _user(self, request: Request) -> User | None:
        if request.authorization is None:
            return None
        user = self.users.get(request.authorization.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return user

    def _repo(self, request: Request, repo_type: RepoType, id_: str, user: User | None) -> Repo:
        """A repo of which the user may know."""
        request.repo_id = id_ = unquote(id_)
        new = self.renamed.get((repo_type, id_))
        if new is not None:
            raise Moved(request.path.replace(f"/{id_}", f"/{new}", 1))
        repo = self.repos.get((repo_type, id_))
        if repo is not None and not (repo.private and (user is None or not user.may_read(repo))):
            return repo
        if user is None:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.", _CHALLENGE)
        raise Refusal(404, "RepoNotFound", "Repository not found")

    def _open_repo(self, request: Request, repo_type: RepoType, id_: str, user: User | None) -> Repo:
        """A repo whose files the user may have; what lists them is in front of the gate."""
        repo = self._repo(request, repo_type, id_, user)
        if not repo.gated or (user is not None and user.may_read(repo)):
            return repo
        access = f"Access to {repo.type} {repo.id} is restricted"
        if user is None:
            said = f"{access}. You must have access to it and be authenticated to access it. Please log in."
            raise Refusal(401, "GatedRepo", said, _CHALLENGE)
        ask = f"Visit {self.endpoint}{repo.page} to ask for access."
        raise Refusal(403, "GatedRepo", f"{access} and you are not in the authorized list. {ask}")

    def _api(self, request: Request, repo: Repo, user: User | None, verb: str, rest: list[str]) -> Answer:
        match "GET" if request.method == "HEAD" else request.method, verb, rest:
            case "GET", "", []:
                return json_answer(self._info(repo, repo.commit("main"), request.query))
            case "GET", "revision", [revision]:
                return json_answer(self._info(repo, repo.commit(revision), request.query))
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
                return json_answer({})
            case "GET", "discussions", []:
                return json_answer({"discussions": [], "count": 0, "start": 0, "numClosedDiscussions": 0})
            case "POST", "preupload", [_]:
                self._signed_in(user)
                return self._preupload(request)
            case "POST", "commit", [revision]:
                self._signed_in(user)
                return self._commit(request, repo, revision)
        raise no_page()

    def _refs(self, request: Request, repo: Repo) -> Answer:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
        ]
        asked: dict[str, list[object]] = {"pullRequests": []} if "include_prs" in request.query else {}
        return json_answer({"branches": branches, "converts": [], "tags": [], **asked})

    def _info(self, repo: Repo, commit: Commit, query: Query) -> dict[str, object]:
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

    def _tree(self, request: Request, repo: Repo, commit: Commit, folder: str) -> Answer:
        found = _entries(repo, commit, expand=_is_true(request.query, "expand"))
        if folder:
            if found.get(folder, {}).get("type") != "directory":
                raise Refusal(404, "EntryNotFound", f'{folder} does not exist on "{commit.sha}"')
            found = {path: entry for path, entry in found.items() if path.startswith(f"{folder}/")}
        if not _is_true(request.query, "recursive"):
            depth = folder.count("/") + 1 if folder else 0
            found = {path: entry for path, entry in found.items() if path.count("/") == depth}
        return self._page(request, list(found.values()))

    def _paths_info(self, request: Request, repo: Repo, commit: Commit) -> Answer:
        if "json" in request.headers.get("content-type", ""):
            asked = json.loads(request.body)
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), _is_true(form, "expand")
        found = _entries(repo, commit, expand=expand)
        return json_answer([found[path] for path in paths if path in found])

    def _page(self, request: Request, entries: list[dict[str, object]]) -> Answer:
        """One page of a listing, with a link to the next: an absolute one, to this hub's own address."""
        start = int(request.query.get("cursor", ["0"])[0])
        size = min(self.page_size, int(request.query.get("limit", [str(self.page_size)])[0]))
        if start + size >= len(entries):
            return json_answer(entries[start:])
        query = urlencode({**request.query, "limit": size, "cursor": start + size}, doseq=True)
        link = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return json_answer(entries[start : start + size], {"Link": link})

    def _entry(self, request: Request, repo: Repo, revision: str, name: str) -> tuple[Commit, File]:
        if request.method not in ("GET", "HEAD"):
            raise no_page()
        commit = repo.commit(revision)
        if name not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
        return commit, commit.files[name]

    def _resolve(self, request: Request, repo: Repo, commit: Commit, file: File) -> Answer:
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
        if file.sha256 is not None:
            headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
            if repo.xet:
                auth = f"{self.endpoint}{repo.api}/xet-read-token/{commit.sha}"
                headers |= {"X-Xet-Hash": _xet_hash(file), "Link": f'<{auth}>; rel="xet-auth"'}
            return redirect(302, self._signed_url(repo, commit, file), headers)
        if not self.resolve_cache:
            return self._copy(request, commit, file)
        query = f"{quote(request.path, safe='')}=&etag={quote(headers['ETag'])}"
        copy = f"/api/resolve-cache/{repo.type}s/{repo.id}/{commit.sha}/{quote(file.name)}"
        return redirect(307, f"{self.prefix}{copy}?{query}", headers)

    def _copy(self, request: Request, commit: Commit, file: File) -> Answer:
        request.name = file.name
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        return file_answer(file, request.headers.get("range"), headers)

    def _whoami(self, user: User | None) -> Answer:
        user = self._signed_in(user)
        token = {"displayName": f"token of {user.name}", "role": "write", "createdAt": "2024-01-01T00:00:00.000Z"}
        about = {"type": "user", "id": hashlib.sha1(user.name.encode()).hexdigest()[:24], "name": user.name}
        account = {"fullname": user.name, "isPro": False, "canPay": False, "orgs": []}
        return json_answer(about | account | {"auth": {"type": "access_token", "accessToken": token}})

    def _signed_in(self, user: User | None) -> User:
        if user is None:
            raise Refusal(401, None, "Invalid username or password.", _CHALLENGE)
        return user

    def _create(self, request: Request, user: User | None) -> Answer:
        user = self._signed_in(user)
        asked = json.loads(request.body)
        repo_type: RepoType = _TYPES[f"{asked.get('type') or 'model'}s"]
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = Repo(f"{asked.get('organization') or user.name}/{asked['name']}", repo_type, private=private)
        request.repo_id = repo.id
        if (repo_type, repo.id) in self.repos:
            message = f"You already created this {repo_type} repo: {repo.id}"
            return json_answer(
                {"error": message, "url": f"{self.endpoint}{repo.page}"}, {"X-Error-Message": message}, 409
            )
        repo.move("main", {".gitattributes": make_file(".gitattributes", b"*.safetensors filter=lfs\n", lfs=False)})
        self.repos[repo_type, repo.id] = repo
        return json_answer({"url": f"{self.endpoint}{repo.page}", "name": repo.id, "id": repo.id})

    def _preupload(self, request: Request) -> Answer:
        asked = json.loads(request.body)["files"]
        return json_answer(
            {"files": [{"path": it["path"], "uploadMode": "regular", "shouldIgnore": False} for it in asked]}
        )

    def _commit(self, request: Request, repo: Repo, branch: str) -> Answer:
        files = dict(repo.commit(branch).files)
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    pass
                case "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = make_file(value["path"], content, lfs=repo.lfs(value["path"], len(content)))
                case "deletedFile":
                    files.pop(value["path"], None)
                case "deletedFolder":
                    inside = f"{value['path'].rstrip('/')}/"
                    files = {name: file for name, file in files.items() if not name.startswith(inside)}
                case key:
                    raise Refusal(400, None, f"cannot do {key}")
        sha = repo.move(branch, files)
        url = f"{self.endpoint}{repo.page}/commit/{sha}"
        return json_answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _xet_token(self) -> Answer:
        # In 2100: equal requests get equal answers, whichever second they come in.
        info = {"casUrl": f"{self.cdn}/xet", "accessToken": "xet_of_the_tester", "exp": 4_102_444_800}
        headers = {
            "X-Xet-Cas-Url": str(info["casUrl"]),
            "X-Xet-Access-Token": str(info["accessToken"]),
            "X-Xet-Token-Expiration": str(info["exp"]),
        }
        return json_answer(info, headers)

    # The CDN

    def _signed_url(self, repo: Repo, commit: Commit, file: File) -> str:
        query = {"type": f"{repo.type}s", "repo": repo.id, "commit": commit.sha, "name": file.name}
        return f"{self.cdn}/cdn/{file.sha256}?{urlencode(query)}&Signature={self._signature(query)}"

    def _signature(self, query: Mapping[str, str]) -> str:
        return hmac.digest(self._secret, json.dumps(query).encode(), "sha256").hex()

    def _cdn_answer(self, request: Request) -> Answer:
        query = {key: values[0] for key, values in request.query.items()}
        signature = query.pop("Signature", "")
        request.repo_id = query.get("repo")
        # The tokens of users are none of its business, and it says so as S3 does.
        if request.authorization is not None:
            raise Refusal(400, None, "Only one auth mechanism allowed")
        if request.method not in ("GET", "HEAD") or not hmac.compare_digest(signature, self._signature(query)):
            raise Refusal(403, None, "Access Denied")
        file = self.repos[_TYPES[query["type"]], query["repo"]].commits[query["commit"]].files[query["name"]]
        request.name = file.name
        # An ETag of its own, which is not the file's in the repo.
        return file_answer(file, request.headers.get("range"), {"ETag": f'"{file.etag[:32]}-1"'})


def _is_true(query: Query, name: str) -> bool:
    return query.get(name, [""])[0].lower() in ("true", "1")


def _sorted(commit: Commit) -> list[File]:
    return [commit.files[name] for name in sorted(commit.files)]


def _sibling(file: File, *, blobs: bool) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": file.name}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.oid}
        if file.sha256 is not None:
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return sibling


def _entries(repo: Repo, commit: Commit, *, expand: bool) -> dict[str, dict[str, object]]:
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


def _commit_json(commit: Commit) -> dict[str, object]:
    authors = [{"user": "tester", "avatar": ""}]
    return {"id": commit.sha, "title": "A commit", "message": "", "authors": authors, "date": commit.date}


def _xet_hash(file: File) -> str:
    return hashlib.sha256(f"xet {file.sha256}".encode()).hexdigest()
