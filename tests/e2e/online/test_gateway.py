"""The gateway passes on what is not its own, and nobody else may use it."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.online.people import FILES, MINE, NEW, NOWHERE, RELEASES, Reply, ask, folder_of
from tests.support.hfcache import listing
from tests.support.loopback_hub import TOKEN
from tests.support.online import Client, Person, cached, contents
from tests.support.processes import PYTHON, SECONDS, finish

# The gateway itself ---------------------------------------------------------------------------------------------


def test_without_the_secret_nothing_is_reachable(speaking: Person, session: Client) -> None:
    """Other users of the machine get neither the user's models nor a proxy."""
    endpoint = session.environ["HF_ENDPOINT"]
    secret = urlsplit(endpoint).path.removeprefix("/")
    assert re.fullmatch(r"[\w-]{20,}", secret)
    bare = endpoint.removesuffix(f"/{secret}")
    assert ask(f"{bare}/{secret}", f"/api/models/{MINE}").status == 200
    speaking.hub.reset_counts()
    others = ["", "/", f"/{secret[:-1]}", f"/{secret[:-1]}~", f"/{secret.swapcase()}", f"//{secret}", f"/x/../{secret}"]
    for prefix in others:
        for path in (f"/api/models/{MINE}", f"/{MINE}/resolve/main/config.json", f"/api/models/{NEW}", ""):
            reply = ask(bare + prefix, path) if prefix + path else ask(bare, "/")
            assert reply.status == 404, f"{prefix + path} is answered"
            assert not any(name in reply.body.decode() for name in (secret, MINE, NEW, str(speaking.models)))
    assert speaking.hub.requests == []


def test_a_program_of_an_overlay_that_has_ended_learns_so_where_the_port_is_used_again(session: Client) -> None:
    """P12: not "no such model", for which it would be sought elsewhere."""
    endpoint = session.environ["HF_ENDPOINT"]
    earlier = f"{endpoint.rpartition('/')[0]}/{hashlib.sha1(b'earlier').hexdigest()}"
    program = "import huggingface_hub as h, sys; h.hf_hub_download(sys.argv[1], 'config.json')"
    environ = {**session.environ, "HF_ENDPOINT": earlier, "HF_HUB_CACHE": session.environ["HOME"] + "/gone"}
    done = finish([PYTHON, "-c", program, MINE], environ)
    assert done.status != 0
    assert "the overlay that this program was started in has ended" in done.err


def test_it_listens_on_loopback_alone(session: Client) -> None:
    url = urlsplit(session.environ["HF_ENDPOINT"])
    assert url.hostname == "127.0.0.1"
    assert url.port is not None
    for address in ("127.0.0.2", "::1"):
        with pytest.raises(OSError, match=r"\S"), socket.create_connection((address, url.port), SECONDS):
            pytest.fail(f"{address} is answered")


def test_it_is_gone_with_the_session(person: Person) -> None:
    with person.client() as client:
        endpoint = client.environ["HF_ENDPOINT"]
    with pytest.raises(ConnectionRefusedError):
        ask(endpoint, f"/api/models/{MINE}")


def test_a_range_of_the_users_file_is_served(speaking: Person, session: Client) -> None:
    """Programs that look at headers of weights, and resumed downloads, ask for parts."""
    name, content = next((n, c) for n, c in folder_of(speaking).items() if n.endswith(".safetensors"))
    endpoint, path, size = session.environ["HF_ENDPOINT"], f"/{MINE}/resolve/main/{name}", len(content)
    parts = {"bytes=0-7": content[:8], f"bytes={size - 5}-": content[-5:], "bytes=-9": content[-9:]}
    for wanted, part in parts.items():
        reply = ask(endpoint, path, Range=wanted)
        start = size - len(part) if part == content[-len(part) :] else 0
        assert (reply.status, reply.body) == (206, part), wanted
        assert reply["content-range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
    reply = ask(endpoint, path, Range=f"bytes={size}-")
    assert (reply.status, reply["content-range"]) == (416, f"bytes */{size}"), "the client thinks it is not complete"
    whole = ask(endpoint, path)
    assert (whole.status, whole.body) == (200, content)
    head = ask(endpoint, path, "HEAD")
    assert (head.status, head.body, head["content-length"]) == (200, b"", str(size))
    assert head["etag"] == whole["etag"]


@pytest.mark.parametrize(
    "path", ["../other/config.json", "%2e%2e/other/config.json", "/etc/passwd", "sub/%00", "..", "config.json/", "%ff"]
)
def test_only_the_models_own_files_are_served(speaking: Person, session: Client, path: str) -> None:
    assert ask(session.environ["HF_ENDPOINT"], f"/{MINE}/resolve/main/{path}").status == 404


@pytest.mark.parametrize(
    "path",
    [
        f"/api/models/{NEW}",
        f"/api/models/{NEW}?blobs=true&expand=sha",
        f"/api/models/{NEW}/revision/main",
        f"/api/models/{NEW}/revision/refs%2Fpr%2F1",
        f"/api/models/{NEW}/tree/main?recursive=true&expand=false&limit=1",
        f"/api/models/{NEW}/refs",
        f"/api/models/{NEW}/commits/main?limit=1",
        f"/api/models/{NEW}/xet-read-token/main",
        f"/api/models/{NEW}/discussions",
        "/api/datasets/org/data/tree/main/sub?expand=true",
        f"/{NEW}/resolve/main/config.json",
        f"/{NEW}/resolve/main/sub/note%20%C3%A9.txt",
        f"/{NEW}/resolve/main/model.safetensors",
        f"/{NEW}/resolve/main/no-such-file",
        f"/{NOWHERE}/resolve/main/config.json",
        "/datasets/org/data/resolve/main/model.safetensors",
        "/api/whoami-v2",
        "/api/models?search=x&limit=2",
        "/api/no/such/page",
        "/docs?a=%2f&b=+&c",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_any_other_request_is_answered_as_by_the_hub(
    pair: tuple[Person, Client, Client], method: str, path: str
) -> None:
    """Status, headers and body; and what arrives there is what was sent."""
    person, overlaid, _ = pair
    person.hub.reset_counts()
    headers = {"User-Agent": "one", "Accept": "x/y", "Accept-Encoding": "gzip", "Cookie": "a=b", "Range": "bytes=1-3"}
    endpoint = overlaid.environ["HF_ENDPOINT"]
    through, direct = (ask(url, path, method, **headers) for url in (endpoint, person.hub.endpoint))
    assert (through.status, through.body) == (direct.status, direct.body)
    assert as_of_one_hub(through, urlsplit(endpoint).path) == as_of_one_hub(direct, "")
    sent, expected = ((each.method, each.path, each.query, each.headers) for each in person.hub.requests)
    assert sent == expected


def as_of_one_hub(reply: Reply, prefix: str) -> dict[str, str]:
    """Its headers, without what differs from one answer to the next, and with the redirect that it stands for."""
    headers = {name: value for name, value in reply.items() if name not in ("date", "x-request-id")}
    if headers.get("location", "").startswith("/"):
        assert headers["location"].startswith(f"{prefix}/"), "the redirect leads past the gateway"
        headers["location"] = headers["location"].removeprefix(prefix)
    return headers


BODY = bytes(range(256)) * 3000


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("chunked", [False, True])
def test_what_is_sent_to_other_repos_arrives_unchanged(
    speaking: Person, session: Client, method: str, chunked: bool
) -> None:
    """Uploads: method, query, headers and body, whether its length is told or not."""
    speaking.hub.reset_counts()
    path = f"/api/models/{NEW}/settings?a=1&b=%2F%20&a=2"
    headers = {
        "Content-Type": "application/x-ndjson",
        "X-Own": "it is",
        "User-Agent": "one",
        "Authorization": "Bearer x",
    }
    body = iter([BODY[:1000], BODY[1000:]]) if chunked else BODY
    through = ask(session.environ["HF_ENDPOINT"], path, method, body, **headers)
    direct = ask(speaking.hub.endpoint, path, method, BODY, **headers)
    assert (through.status, through.body) == (direct.status, direct.body)
    arrived, expected = speaking.hub.requests
    assert (arrived.method, arrived.target) == (method, expected.target)
    assert arrived.body_sha256 == hashlib.sha256(BODY).hexdigest()
    own = {
        name: value for name, value in arrived.headers.items() if name not in ("transfer-encoding", "content-length")
    }
    assert own == {name: value for name, value in expected.headers.items() if name != "content-length"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", f"/api/models/{MINE}/commit/main"),
        ("POST", f"/api/models/{MINE}/preupload/main"),
        ("PUT", f"/api/models/{MINE}/settings"),
        ("DELETE", f"/api/models/{MINE}/branch/v1"),
        ("POST", f"/api/models/{MINE}/discussions"),
        ("DELETE", f"/{MINE}/resolve/main/config.json"),
    ],
)
def test_writing_to_the_users_model_is_refused(speaking: Person, session: Client, method: str, path: str) -> None:
    """P1 and P12: neither the folder nor the Hub's repo of that name changes, and the answer names the way out."""
    speaking.hub.reset_counts()
    reply = ask(session.environ["HF_ENDPOINT"], path, method, b"{}")
    assert reply.status == 403
    assert f"--exclude {MINE}" in json.loads(reply.body)["error"]
    assert speaking.hub.requests == []


def test_an_upload_arrives(person: Person) -> None:
    """HfApi.upload_file to another repo works inside a session; to the user's own model it does not."""
    with person.client(HF_TOKEN=TOKEN) as client:
        upload = {"path_in_repo": "new.txt", "path_or_fileobj": str(person.models / MINE / "only-mine.txt")}
        client.get("upload_file", repo_id=NEW, **upload)
        failure = client.failure("upload_file", repo_id=MINE, **upload)
        assert f"--exclude {MINE}" in failure.message
        assert contents(client.get("snapshot_download", NEW)) == {**FILES, "new.txt": b"mine"}
    assert person.asked_about(MINE) == []


# Not seen by the gateway ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_a_download_past_the_gateway_comes_home_when_the_session_ends(person: Person, release: str) -> None:
    """P3 and P4: a script with an endpoint of its own; even the Hub's copy of a user's model, if it asks for that."""
    past = ("env", "-u", "HF_ENDPOINT")
    theirs = {**FILES, "only-theirs.txt": b"theirs"}
    before = listing(person.models)
    with person.client(release=release, before=past) as client:
        assert "HF_ENDPOINT" not in client.environ
        for repo_id, files in ((NEW, FILES), (MINE, theirs)):
            assert contents(client.get("snapshot_download", repo_id, endpoint=person.hub.endpoint)) == files
        config = client.get("hf_hub_download", "org/data", "config.json", repo_type="dataset", **at(person))
        assert Path(config).read_bytes() == FILES["config.json"]
    assert listing(person.models) == before, "P1: the user's folder was changed"
    assert cached(person.cache, NEW) == FILES
    assert cached(person.cache, "org/data", "dataset") == {"config.json": FILES["config.json"]}
    with person.offline_client(release=release) as alone:
        assert contents(alone.get("snapshot_download", NEW)) == FILES
        assert contents(alone.get("snapshot_download", MINE)) == theirs


def at(person: Person) -> dict[str, str]:
    return {"endpoint": person.hub.endpoint}
