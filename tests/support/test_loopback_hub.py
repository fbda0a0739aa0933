"""The loopback Hub against unmodified clients of every release, and against what a client may rely on in HTTP."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from subprocess import Popen
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support import hubs
from tests.support.hfcache import add_repo, git_blob_id, listing
from tests.support.loopback_hub import TOKEN, LoopbackHub, virtual_bytes
from tests.support.processes import PYTHON, eventually, read_line, start, succeed

MODEL = "org/name"
FILES = {
    "config.json": b'{"a": 1}\n' * 100,
    "empty.txt": b"",
    "model.safetensors": bytes(range(256)) * 1000,
    "sub/deep/note é.txt": b"note",
}
OLD_FILES = FILES | {"config.json": b"{}"}
SIZE = sum(map(len, FILES.values()))
DATA = {"a.csv": b"1,2\n"}
NOBODY = "hf_of_nobody"
STRANGER = "hf_of_a_stranger"
READER = "hf_of_a_reader"
LARGE, LARGE_SIZE = "org/large", 24 * 2**20
GATED, SECRET = "acme/gated", "acme/secret"
SINCE_1 = tuple(release for release in hubs.ALL if not release.startswith("0."))
"""They keep a listing of each commit in the cache, and look into the cache at once when the Hub gives no answer."""

# Calls functions of huggingface_hub, or methods of HfApi, as told on stdin; it prints what they give, on a pipe of its
# own, as clients print too.
_CLIENT = """
import json, os, sys

replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
import huggingface_hub


def plain(value):
    return vars(value) if hasattr(value, "__dict__") else list(value) if hasattr(value, "__iter__") else str(value)


for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        call = getattr(huggingface_hub, name, None) or getattr(huggingface_hub.HfApi(), name)
        reply = {"value": call(**arguments)}
        if hasattr(reply["value"], "__next__"):
            reply["value"] = list(reply["value"])
        text = json.dumps(reply, default=plain)
    except Exception as error:
        text = json.dumps({"error": type(error).__name__, "message": str(error)})
    replies.write(text + "\\n")
    replies.flush()
"""


class Client:
    """An unmodified huggingface_hub in a process of its own, whose Hub is a loopback one."""

    def __init__(self, process: Popen[bytes], release: str) -> None:
        self._process = process
        self.release = release

    def get(self, call: str, **arguments: Any) -> Any:
        """What a function of huggingface_hub, or else a method of HfApi, returns."""
        reply = self._ask(call, arguments)
        assert "error" not in reply, f"{call} of huggingface_hub {self.release} failed: {reply}"
        return reply["value"]

    def error(self, call: str, **arguments: Any) -> tuple[str, str]:
        """The name and text of the exception it raises."""
        reply = self._ask(call, arguments)
        assert "error" in reply, f"{call} of huggingface_hub {self.release} did not fail"
        return reply["error"], reply["message"]

    def _ask(self, call: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([call, arguments]).encode() + b"\n")
        line = read_line(self._process.stdout)
        assert line, f"huggingface_hub {self.release} ended in {call}"
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def client_of(hub: LoopbackHub, release: str, home: Path) -> Iterator[Client]:
    environ = hub.environment(home, **hubs.environment(release))
    with (home / "stderr").open("wb") as errors, start([PYTHON, "-c", _CLIENT], environ, stderr=errors) as process:
        yield Client(process, release)


Stage = tuple[LoopbackHub, Callable[[str], Client]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One hub for all tests here, and a client of each release that is asked for."""
    clients: dict[str, Client] = {}
    with ExitStack() as stack:
        hub = stack.enter_context(LoopbackHub(page_size=2))
        hub.add_repo(MODEL, OLD_FILES)
        hub.add_repo(MODEL, FILES)
        hub.add_repo("org/data", DATA, repo_type="dataset")
        hub.add_repo("org/app", {"app.py": b"pass\n"}, repo_type="space")
        hub.add_repo(SECRET, FILES, private=True)
        hub.add_repo(GATED, FILES, gated=True)
        hub.add_user(READER, "reader", reads=(SECRET, GATED))
        hub.add_virtual(LARGE, "model.safetensors", LARGE_SIZE)
        hub.add_user(STRANGER, "stranger")

        def client(release: str) -> Client:
            if release not in clients:
                home = tmp_path_factory.mktemp("home")
                clients[release] = stack.enter_context(client_of(hub, release, home))
            return clients[release]

        yield hub, client


@pytest.fixture
def hub(stage: Stage) -> Iterator[LoopbackHub]:
    """The hub, with nothing wrong and nothing counted yet."""
    hub, _ = stage
    hub.reset_counts()
    yield hub
    hub.heal()
    hub.recover()


@pytest.fixture(params=hubs.ALL)
def client(stage: Stage, hub: LoopbackHub, request: pytest.FixtureRequest) -> Client:
    _, client = stage
    return client(request.param)


# Downloading -----------------------------------------------------------------------------------------------------


def test_a_download_leaves_the_cache_that_the_real_hub_leaves(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """Names, kinds, modes and bytes are as the layout has them; and the library's own scan has nothing to say."""
    there, expected = tmp_path / "there", tmp_path / "expected"
    commit = client.get("model_info", repo_id=MODEL)["sha"]
    snapshot = client.get("snapshot_download", repo_id=MODEL, cache_dir=str(there))
    client.error("hf_hub_download", repo_id=MODEL, filename="absent.json", cache_dir=str(there))
    client.get("hf_hub_download", repo_id="org/data", filename="a.csv", repo_type="dataset", cache_dir=str(there))
    tree = client.release in SINCE_1
    made = add_repo(expected, MODEL, FILES, commit=commit, no_exist=("absent.json",), tree=tree)
    assert snapshot == str(there / made.relative_to(expected))
    assert comparable(there / "models--org--name") == comparable(expected / "models--org--name")
    scan = client.get("scan_cache_dir", cache_dir=str(there))
    assert scan["warnings"] == []
    assert sorted(repo["repo_id"] for repo in scan["repos"]) == ["org/data", MODEL]


def comparable(root: Path) -> dict[str, tuple[str, int, str]]:
    return {name: (kind, mode, detail) for name, (kind, mode, _, _, detail) in listing(root).items()}


def test_every_byte_that_is_served_is_counted_once(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    client.get("snapshot_download", repo_id=MODEL, cache_dir=str(tmp_path), token=TOKEN)
    assert hub.bytes_served() == hub.bytes_served(MODEL) == SIZE
    assert hub.bytes_served("org/data") == 0
    assert hub.bytes_served(MODEL, files_only=False) > SIZE
    fetched = [(MODEL, name) for name in FILES if FILES[name]]  # clients do not ask for the bytes of empty files
    assert sorted(hub.finished_files()) == sorted(fetched)
    client.get("snapshot_download", repo_id=MODEL, cache_dir=str(tmp_path))
    assert hub.bytes_served() == SIZE, "what is in the cache was served again"
    hub.reset_counts()
    assert (hub.requests, hub.bytes_served(files_only=False), hub.finished_files()) == ([], 0, [])


def test_tokens_stay_on_the_hub(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """A file in LFS is fetched from another host, without the token that the hub was asked with."""
    client.get("hf_hub_download", repo_id=SECRET, filename="model.safetensors", cache_dir=str(tmp_path), token=READER)
    asked = [(request.method, request.host, request.authorization) for request in hub.requests]
    assert asked == [("HEAD", "hub", f"Bearer {READER}"), ("GET", "cdn", None)]


def test_a_branch_that_moved_is_fetched_anew_and_its_old_commit_stays(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    repo = f"org/moves-{client.release}"
    old = hub.add_repo(repo, OLD_FILES)
    first = client.get("snapshot_download", repo_id=repo, cache_dir=str(tmp_path))
    new = hub.add_repo(repo, FILES)
    hub.reset_counts()
    second = client.get("snapshot_download", repo_id=repo, cache_dir=str(tmp_path))
    assert (Path(first).name, Path(second).name) == (old, new)
    assert hub.finished_files() == [(repo, "config.json")], "only what differs is fetched"
    again = client.get("hf_hub_download", repo_id=repo, filename="config.json", revision=old, force_download=True)
    assert Path(again).read_bytes() == OLD_FILES["config.json"]


def test_a_renamed_repo_is_found_by_its_old_name(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.rename("name", MODEL)
    client.get("snapshot_download", repo_id="name", cache_dir=str(tmp_path))
    client.get("hf_hub_download", repo_id="name", filename="model.safetensors", cache_dir=str(tmp_path / "one"))
    assert hub.bytes_served(MODEL) == SIZE + len(FILES["model.safetensors"])
    moved = [request for request in hub.requests if request.repo_id == "name"]
    assert {request.status for request in moved} == {307}


def test_a_download_that_is_cut_resumes_where_it_was(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    """0.36 gives up, and resumes when asked again; later releases resume by themselves."""
    download = {"repo_id": LARGE, "filename": "model.safetensors", "cache_dir": str(tmp_path)}
    cut = 11 * 2**20
    written = 10 * 2**20  # clients write what they read in parts of that size
    hub.cut_after(cut)
    if client.release == "0.36.2":
        client.error("hf_hub_download", **download)
        assert [path.stat().st_size for path in tmp_path.rglob("*.incomplete")] == [written]
    path = client.get("hf_hub_download", **download)
    assert Path(path).read_bytes() == b"".join(virtual_bytes(0, LARGE_SIZE))
    bodies = [request for request in hub.requests if request.sent and request.name]
    assert [(request.status, request.sent, request.finished) for request in bodies] == [
        (200, cut, False),
        (206, LARGE_SIZE - written, True),
    ]
    assert bodies[1].headers["range"] == f"bytes={written}-"
    assert hub.finished_files() == [(LARGE, "model.safetensors")]


# Describing ------------------------------------------------------------------------------------------------------


def test_clients_are_told_what_a_repo_holds(hub: LoopbackHub, client: Client) -> None:
    """Over more than one page: this hub's hold two entries."""
    names = sorted(FILES)
    weights = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    info = client.get("model_info", repo_id=MODEL, files_metadata=True)
    siblings = {sibling["rfilename"]: sibling for sibling in info["siblings"]}
    assert {name: siblings[name]["size"] for name in siblings} == {name: len(FILES[name]) for name in FILES}
    assert siblings["model.safetensors"]["lfs"]["sha256"] == weights
    assert siblings["config.json"]["blob_id"] == git_blob_id(FILES["config.json"])
    assert client.get("list_repo_files", repo_id=MODEL) == names
    tree = client.get("list_repo_tree", repo_id=MODEL, recursive=True, expand=True)
    assert sorted(entry["path"] for entry in tree) == sorted([*names, "sub", "sub/deep"])
    assert all(entry["last_commit"]["oid"] == info["sha"] for entry in tree)
    top = client.get("list_repo_tree", repo_id=MODEL)
    assert [entry["path"] for entry in top] == ["config.json", "empty.txt", "model.safetensors", "sub"]
    inner = client.get("list_repo_tree", repo_id=MODEL, path_in_repo="sub/deep")
    assert [entry["path"] for entry in inner] == ["sub/deep/note é.txt"]
    asked = ["model.safetensors", "absent", "sub"]
    found = client.get("get_paths_info", repo_id=MODEL, paths=asked)
    assert [entry["path"] for entry in found] == ["model.safetensors", "sub"]
    refs = client.get("list_repo_refs", repo_id=MODEL)
    assert [(ref["name"], ref["target_commit"]) for ref in refs["branches"]] == [("main", info["sha"])]
    commits = client.get("list_repo_commits", repo_id=MODEL)
    newest, oldest = (commit["commit_id"] for commit in commits)
    assert newest == info["sha"]
    assert client.get("model_info", repo_id=MODEL, revision=oldest)["sha"] == oldest != newest
    assert client.get("model_info", repo_id=MODEL, expand=["gated"])["siblings"] is None


def test_datasets_spaces_and_users_are_known(hub: LoopbackHub, client: Client) -> None:
    assert client.get("list_repo_files", repo_id="org/data", repo_type="dataset") == ["a.csv"]
    assert client.get("dataset_info", repo_id="org/data")["author"] == "org"
    assert client.get("space_info", repo_id="org/app")["siblings"][0]["rfilename"] == "app.py"
    assert client.get("repo_exists", repo_id="org/data") is False, "a dataset is no model"
    assert client.get("file_exists", repo_id=MODEL, filename="config.json") is True
    assert client.get("file_exists", repo_id=MODEL, filename="absent") is False
    assert client.get("whoami", token=READER)["name"] == "reader"
    assert client.error("whoami", token=NOBODY)[0] in ("HTTPError", "HfHubHTTPError")


# Saying no -------------------------------------------------------------------------------------------------------


def test_clients_raise_what_they_raise_for_the_real_hub(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    def error(repo_id: str, name: str = "config.json", **more: object) -> str:
        return client.error("hf_hub_download", repo_id=repo_id, filename=name, cache_dir=str(tmp_path), **more)[0]

    absent = "EntryNotFoundError" if client.release == "0.36.2" else "RemoteEntryNotFoundError"
    assert error(MODEL, "absent") == absent
    assert error(MODEL, revision="absent") == "RevisionNotFoundError"
    assert error("org/absent") == "RepositoryNotFoundError"
    assert error("org/absent", token=TOKEN) == "RepositoryNotFoundError"
    assert error("org/absent", repo_type="dataset") == "RepositoryNotFoundError"
    assert error(SECRET) == "RepositoryNotFoundError"
    assert error(SECRET, token=STRANGER) == "RepositoryNotFoundError"
    assert error(GATED) == "GatedRepoError"
    assert error(GATED, token=STRANGER) == "GatedRepoError"
    answers = [(request.status, request.repo_id) for request in hub.requests]
    assert {(401, SECRET), (404, SECRET), (401, GATED), (403, GATED), (401, "org/absent")} <= set(answers)
    assert hub.bytes_served() == 0
    for repo in (SECRET, GATED):
        snapshot = client.get("snapshot_download", repo_id=repo, cache_dir=str(tmp_path), token=READER)
        assert (Path(snapshot) / "config.json").read_bytes() == FILES["config.json"]


def test_snapshots_of_what_is_not_there_fail_as_from_the_real_hub(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    def error(repo_id: str, **more: object) -> str:
        return client.error("snapshot_download", repo_id=repo_id, cache_dir=str(tmp_path), **more)[0]

    assert error("org/absent") == "RepositoryNotFoundError"
    assert error(SECRET) == "RepositoryNotFoundError"
    assert error(SECRET, token=NOBODY) in ("HfHubHTTPError", "LocalEntryNotFoundError")
    assert error(MODEL, revision="absent") == "RevisionNotFoundError"
    assert error(GATED) == "GatedRepoError"


# Uploading -------------------------------------------------------------------------------------------------------


def test_what_is_uploaded_arrives_unchanged_and_is_served(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    repo = f"tester/made-{client.release}"
    file = tmp_path / "weights"
    file.write_bytes(FILES["model.safetensors"])
    error, _ = client.error("create_repo", repo_id=repo)
    assert error in ("HTTPError", "HfHubHTTPError", "LocalTokenNotFoundError"), "nobody may not make repos"
    assert client.get("create_repo", repo_id=repo, private=True, token=TOKEN) == f"{hub.endpoint}/{repo}"
    target = {"path_or_fileobj": str(file), "path_in_repo": "a/w.safetensors", "repo_id": repo, "token": TOKEN}
    client.get("upload_file", **target)
    (commit,) = (request for request in hub.requests if request.path == f"/api/models/{repo}/commit/main")
    header, operation = map(json.loads, commit.body.splitlines())
    assert (header["key"], operation["key"], operation["value"]["path"]) == ("header", "file", "a/w.safetensors")
    assert hashlib.sha256(commit.body).hexdigest() == commit.body_sha256
    found = client.get("hf_hub_download", repo_id=repo, filename="a/w.safetensors", token=TOKEN)
    assert Path(found).read_bytes() == FILES["model.safetensors"]


# Going wrong -----------------------------------------------------------------------------------------------------


def test_clients_use_snapshots_they_have_while_the_hub_is_out_or_fails(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    cached = {"repo_id": MODEL, "cache_dir": str(tmp_path)}
    snapshot = client.get("snapshot_download", **cached)
    hub.reset_counts()
    hub.outage()
    assert client.get("snapshot_download", **cached) == snapshot
    assert hub.requests == [], "a hub that is out was reached"
    hub.recover()
    hub.fail(503)
    assert client.get("snapshot_download", **cached) == snapshot
    assert [request.status for request in hub.requests] == [503]


@pytest.mark.parametrize("client", SINCE_1, indirect=True)
def test_clients_use_files_they_have_while_the_hub_is_out_hangs_or_fails(
    hub: LoopbackHub, client: Client, tmp_path: Path
) -> None:
    cached = {"repo_id": MODEL, "filename": "config.json", "cache_dir": str(tmp_path)}
    path = client.get("hf_hub_download", **cached)
    hub.outage()
    assert client.get("hf_hub_download", **cached) == path
    hub.recover()
    hub.fail(503)
    assert client.get("hf_hub_download", **cached) == path
    assert hub.requests[-1].status == 503
    hub.heal()
    hub.hang(3600)
    assert client.get("hf_hub_download", **cached, etag_timeout=0.1) == path
    assert hub.requests[-1].status == 0, "what hangs was answered"
    hub.heal()
    assert client.get("hf_hub_download", **cached) == path
    assert hub.requests[-1].status == 200


@pytest.mark.parametrize("release", ["0.36.2", hubs.INSTALLED])  # which ask by requests and by httpx
def test_hf_download_works_behind_a_mirrors_path_and_with_compression(release: str, tmp_path: Path) -> None:
    with LoopbackHub(prefix="/mirror/hub", compress=True) as hub:
        commit = hub.add_repo(MODEL, FILES)
        environ = hub.environment(tmp_path, **hubs.environment(release))
        program = [PYTHON, "-c", "from huggingface_hub.cli.hf import main; main()", "download"]
        succeed([*program, MODEL], environ)
        succeed([*program, "--local-dir", str(tmp_path / "copy"), MODEL], environ)
        assert {request.host for request in hub.requests} == {"hub", "cdn"}
        texts = [request.sent for request in hub.requests if request.sent and request.name == "config.json"]
        assert all(sent < len(FILES["config.json"]) for sent in texts), "text was not compressed"
        assert texts
    snapshot = tmp_path / ".cache/huggingface/hub/models--org--name/snapshots" / commit
    for folder in (snapshot, tmp_path / "copy"):
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES


# HTTP ------------------------------------------------------------------------------------------------------------


@contextmanager
def asked(url: str, method: str = "GET", **headers: str) -> Iterator[HTTPResponse]:
    parts = urlsplit(url)
    assert parts.hostname in ("127.0.0.1", "localhost")
    connection = HTTPConnection("127.0.0.1", parts.port, timeout=60)
    try:
        connection.request(method, f"{parts.path}?{parts.query}", headers={"Accept-Encoding": "identity"} | headers)
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def signed(hub: LoopbackHub, name: str, repo: str = MODEL) -> str:
    with asked(f"{hub.endpoint}/{repo}/resolve/main/{name}") as response:
        assert response.status == 302
        return response.headers["Location"]


def test_ranges_are_served_and_refused_as_http_has_it(hub: LoopbackHub) -> None:
    content = FILES["model.safetensors"]
    url = signed(hub, "model.safetensors")
    size = len(content)
    for wanted, start_, stop in (("0-0", 0, 1), ("7-", 7, size), ("-5", size - 5, size), ("9-99999999", 9, size)):
        with asked(url, Range=f"bytes={wanted}") as response:
            assert response.status == 206
            assert response.headers["Content-Range"] == f"bytes {start_}-{stop - 1}/{size}"
            assert response.read() == content[start_:stop]
    with asked(url, Range=f"bytes={size}-") as response:
        assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{size}")
    with asked(url, Range="bytes=oops") as response:
        assert (response.status, response.read()) == (200, content)


def test_a_signed_address_opens_one_file_and_takes_no_token(hub: LoopbackHub) -> None:
    url = signed(hub, "model.safetensors")
    with asked(url) as response:
        assert response.read() == FILES["model.safetensors"]
    with asked(url.replace("org%2Fname", "acme%2Fsecret")) as response:
        assert response.status == 403
    with asked(url, Authorization=f"Bearer {TOKEN}") as response:
        assert response.status == 400


def test_a_head_tells_of_a_file_without_its_bytes(hub: LoopbackHub) -> None:
    with asked(f"{hub.endpoint}/{MODEL}/resolve/main/model.safetensors", "HEAD") as response:
        assert (response.status, response.read()) == (302, b"")
        linked = response.headers["X-Linked-Size"], response.headers["X-Linked-ETag"]
        assert linked == (str(len(FILES["model.safetensors"])), f'"{hub_etag("model.safetensors")}"')
    with asked(f"{hub.endpoint}/{MODEL}/resolve/main/config.json", "HEAD") as response:
        assert response.status == 307
        location = response.headers["Location"]
        assert location.startswith(f"/api/resolve-cache/models/{MODEL}/")
    with asked(f"{hub.endpoint}{location}", "HEAD") as response:
        assert (response.status, response.headers["ETag"]) == (200, f'"{hub_etag("config.json")}"')
        assert response.headers["Content-Length"] == str(len(FILES["config.json"]))
    assert hub.bytes_served() == 0


def hub_etag(name: str) -> str:
    content = FILES[name]
    return hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else git_blob_id(content)


def test_the_hub_of_old_answers_without_a_redirect() -> None:
    with LoopbackHub(resolve_cache=False) as hub:
        commit = hub.add_repo(MODEL, FILES)
        with asked(f"{hub.endpoint}/{MODEL}/resolve/main/config.json") as response:
            assert (response.status, response.read()) == (200, FILES["config.json"])
            assert response.headers["X-Repo-Commit"] == commit


def test_nothing_is_served_outside_the_path_of_the_endpoint() -> None:
    with LoopbackHub(prefix="/mirror") as hub:
        hub.add_repo(MODEL, FILES)
        for url in (hub.endpoint.removesuffix("/mirror"), f"{hub.endpoint}s"):
            with asked(f"{url}/api/models/{MODEL}") as response:
                assert response.status == 404
        assert {request.host for request in hub.requests} == {"outside"}


def test_xet_is_offered_only_where_asked_for(hub: LoopbackHub) -> None:
    repo = "org/xet"
    hub.add_repo(repo, FILES, xet=True)
    with asked(f"{hub.endpoint}/{repo}/resolve/main/model.safetensors", "HEAD") as response:
        assert len(response.headers["X-Xet-Hash"]) == 64
        link = response.headers["Link"]
    with asked(link.split(">")[0].lstrip("<")) as response:
        info = json.loads(response.read())
        assert response.headers["X-Xet-Access-Token"] == info["accessToken"]
        assert response.headers["X-Xet-Cas-Url"].startswith(hub.cdn)
    with asked(f"{hub.endpoint}/{MODEL}/resolve/main/model.safetensors", "HEAD") as response:
        assert "X-Xet-Hash" not in response.headers


def test_a_request_is_recorded_as_it_came(hub: LoopbackHub) -> None:
    url = f"{hub.endpoint}/api/validate-yaml?a=1&a=%20"
    parts = urlsplit(url)
    connection = HTTPConnection("127.0.0.1", parts.port, timeout=60)
    for encode in (False, True):  # by length and in chunks, over one connection
        body = iter([b"one ", b"two"]) if encode else b"one two"
        connection.request("POST", f"{parts.path}?{parts.query}", body, {"X-A": "b"}, encode_chunked=encode)
        connection.getresponse().read()
    connection.close()
    for request in hub.requests:
        assert (request.method, request.path, request.query) == ("POST", "/api/validate-yaml", {"a": ["1", " "]})
        assert (request.headers["x-a"], request.authorization, request.status) == ("b", None, 200)
        assert (request.body, request.body_size) == (b"one two", 7)
    assert len(hub.requests) == 2


# Virtual files ---------------------------------------------------------------------------------------------------


def test_a_huge_file_is_served_from_no_memory(hub: LoopbackHub) -> None:
    size = 5 * 2**30 + 3
    hub.add_virtual("org/huge", "model.safetensors", size)
    url = signed(hub, "model.safetensors", "org/huge")
    middle = 3 * 2**30 - 1_000_000, 3 * 2**30 + 31 * 2**20
    tracemalloc.start()
    try:
        with asked(url, "HEAD") as response:
            assert response.headers["Content-Length"] == str(size)
        with asked(url, Range=f"bytes={middle[0]}-{middle[1] - 1}") as response:
            for block in virtual_bytes(*middle):
                assert response.read(len(block)) == block
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20
    assert hub.finished_files() == []
    with asked(url, Range="bytes=-5") as response:
        assert response.read() == b"".join(virtual_bytes(size - 5, size))
    assert hub.finished_files() == [("org/huge", "model.safetensors")]


def test_no_part_of_a_virtual_file_stands_for_another() -> None:
    blocks = [bytes(block) for block in virtual_bytes(0, 3 * 2**20 + 1)]
    assert len(set(blocks)) == len(blocks) == 4
    assert b"".join(virtual_bytes(5, 2**20 + 9)) == b"".join(blocks)[5 : 2**20 + 9]
    assert b"".join(virtual_bytes(7, 7)) == b""


# Faults ----------------------------------------------------------------------------------------------------------


def test_an_outage_refuses_and_drops_connections_and_ends_at_the_same_port(hub: LoopbackHub) -> None:
    endpoint = hub.endpoint
    address = ("127.0.0.1", urlsplit(endpoint).port)
    for _ in range(3):
        with socket.create_connection(address, timeout=60) as idle:
            hub.outage()
            hub.outage()  # which it has already
            assert is_dropped(idle), "a connection outlived the hub"
        for url in (endpoint, hub.cdn):
            with pytest.raises(ConnectionRefusedError), asked(url):
                pass
        hub.recover()
        hub.recover()
        with asked(f"{endpoint}/api/models/{MODEL}") as response:
            assert response.status == 200
    assert hub.endpoint == endpoint


def is_dropped(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_hub_that_is_out_ends_as_any_other() -> None:
    """Its ports are taken during the outage, and free after the end."""
    with LoopbackHub() as hub:
        ports = [urlsplit(url).port for url in (hub.endpoint, hub.cdn)]
        hub.outage()
        assert [is_free(port) for port in ports] == [False, False]
    assert [is_free(port) for port in ports] == [True, True]


def is_free(port: int | None) -> bool:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_a_cut_is_one_and_counts_what_went_out(hub: LoopbackHub) -> None:
    url = signed(hub, "model.safetensors")
    hub.cut_after(1000, on="no such file")
    with asked(url) as response:
        assert response.read() == FILES["model.safetensors"]
    hub.cut_after(1000)
    with asked(url) as response, pytest.raises(http.client.IncompleteRead) as cut:
        response.read()
    assert cut.value.partial == FILES["model.safetensors"][:1000]
    with asked(url) as response:
        assert response.read() == FILES["model.safetensors"]
    size = len(FILES["model.safetensors"])
    assert [(request.sent, request.finished) for request in hub.requests[1:]] == [
        (size, True),
        (1000, False),
        (size, True),
    ]


def test_a_slow_body_is_in_parts_until_healed(hub: LoopbackHub) -> None:
    content = FILES["model.safetensors"]
    url = signed(hub, "model.safetensors")
    hub.slow(len(content) / 60)
    with asked(url) as response:
        first = response.read(10)
        (request,) = (request for request in hub.requests if request.name)
        assert 10 <= request.sent < len(content), "a slow body came at once"
        assert not request.finished
        hub.heal()
        assert first + response.read() == content


def test_what_hangs_is_answered_when_healed(hub: LoopbackHub) -> None:
    statuses: list[int] = []

    def ask() -> None:
        with asked(f"{hub.endpoint}/api/models/{MODEL}") as response:
            statuses.append(response.status)

    hub.hang(3600)
    thread = threading.Thread(target=ask)
    thread.start()
    eventually(lambda: len(hub.requests) == 1, "the request arrived")
    assert hub.requests[0].status == 0
    hub.heal()
    thread.join(60)
    assert statuses == [200]


def test_faults_can_be_confined(hub: LoopbackHub) -> None:
    hub.fail(502, on="/resolve/")
    with asked(f"{hub.endpoint}/{MODEL}/resolve/main/config.json") as response:
        assert response.status == 502
    with asked(f"{hub.endpoint}/api/models/{MODEL}") as response:
        assert response.status == 200


def test_what_a_client_has_read_is_counted_when_it_has_read_it(hub: LoopbackHub) -> None:
    url = signed(hub, "model.safetensors")
    for round_ in range(1, 50):
        with asked(url) as response:
            response.read()
        assert hub.bytes_served() == round_ * len(FILES["model.safetensors"])
        assert len(hub.finished_files()) == round_


def test_a_client_that_leaves_is_no_error_and_has_not_got_the_file(hub: LoopbackHub) -> None:
    hub.add_virtual("org/larger", "model.safetensors", 2**30)
    with asked(signed(hub, "model.safetensors", "org/larger")) as response:
        response.read(10)
    eventually(lambda: all(request.over for request in hub.requests), "the hub noticed that its client left")
    assert hub.finished_files() == []
    assert hub.bytes_served() < 2**30


def test_many_clients_are_served_at_once(hub: LoopbackHub) -> None:
    url = f"{hub.endpoint}/api/models/{MODEL}"
    together = threading.Barrier(100, timeout=60)
    statuses: list[int] = []

    def ask() -> None:
        together.wait()
        with asked(url) as response:
            statuses.append(response.status)

    threads = [threading.Thread(target=ask) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 100
    assert len(hub.requests) == 100


def test_a_hub_that_fails_to_answer_says_so_at_its_end() -> None:
    hub = LoopbackHub()
    hub.add_repo(MODEL, FILES)
    with ExitStack() as stack:
        stack.enter_context(hub)
        with (
            pytest.raises(http.client.RemoteDisconnected),
            asked(f"{hub.endpoint}/api/models/{MODEL}/tree/main?cursor=oops"),
        ):
            pass
        with pytest.raises(AssertionError, match="failed to answer 1"):
            stack.close()


def test_a_commit_keeps_its_files(hub: LoopbackHub) -> None:
    commit = hub.add_repo("org/kept", FILES)
    assert hub.add_repo("org/kept", FILES) == commit
    assert hub.add_repo("org/kept", OLD_FILES, commit="ab" * 20) == "ab" * 20
    with pytest.raises(ValueError, match="other files"):
        hub.add_repo("org/kept", OLD_FILES, commit=commit)
    with pytest.raises(ValueError, match="not a commit"):
        hub.add_repo("org/kept", FILES, commit="main")


def test_a_folder_can_be_added(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.txt").write_bytes(b"a")
    assert hub.add_repo("org/folder", tmp_path) == hub.add_repo("org/folder", {"sub/a.txt": b"a"})
    with pytest.raises(NotADirectoryError):
        hub.add_repo("org/folder", tmp_path / "absent")


def test_it_can_be_a_process_of_its_own(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    spec = tmp_path / "spec.json"
    repo = {"repo_id": MODEL, "files": {"config.json": "{}"}, "virtual": {"model.safetensors": 10}}
    spec.write_text(json.dumps({"hub": {"prefix": "/hub"}, "repos": [repo]}))
    command = [PYTHON, "-m", "tests.support.loopback_hub", str(spec)]
    with start(command, clean_environment, cwd=Path(__file__).parents[2]) as process:
        endpoint = json.loads(read_line(process.stdout))
        with asked(f"{endpoint}/api/models/{MODEL}") as response:
            assert len(json.loads(response.read())["siblings"]) == 2
        with asked(f"{endpoint}/{MODEL}/resolve/main/model.safetensors") as response:
            location = response.headers["Location"]
        with asked(location) as response:
            assert response.read() == b"".join(virtual_bytes(0, 10))
        assert process.stdin is not None
        process.stdin.write(json.dumps({"bytes_served": {"repo_id": MODEL}}).encode() + b"\n")
        assert read_line(process.stdout) == "10"
        process.stdin.close()
        assert process.wait(60) == 0
