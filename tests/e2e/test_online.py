"""Unmodified programs with the network up, through `hf-overlay run`: the user's folder answers for its models, the Hub
for all others, and what is downloaded is in the real cache."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.support import hubs
from tests.support.folders import lay_model
from tests.support.hfcache import listing, repo_folder
from tests.support.loopback_hub import TOKEN, LoopbackHub, virtual_bytes
from tests.support.models import make_model, split, vocabulary
from tests.support.online import Client, Failure, Person, at_a_shell, cached, contents, incomplete
from tests.support.processes import PYTHON, SECONDS, eventually, finish, succeed

MINE = "acme/mine"
"""In the user's folder; the Hub has another commit of it, with a file more."""
NEW = "org/new"
"""On the Hub only."""
NOWHERE = "org/nowhere"
MINE_SAYS = "the folder speaks."
HUB_SAYS = "the Hub must not speak of this."
NEW_SAYS = "the Hub alone has this."
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 500,
    "sub/note é.txt": b"a note",
}
RELEASES = ("0.36.2", "1.31.0", "1.33.0", hubs.INSTALLED)


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    """With MINE in the folder, and another MINE, and NEW, on the Hub."""
    with at_a_shell(tmp_path) as person:
        furnish(person)
        yield person


def furnish(person: Person) -> None:
    lay_model(person.models / MINE, {"only-mine.txt": b"mine"}, settled=True)
    person.hub.add_repo(MINE, {**FILES, "only-theirs.txt": b"theirs"})
    person.hub.add_repo(NEW, FILES)
    person.hub.add_repo("org/data", FILES, repo_type="dataset")


# The folder answers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """The same with models that load; whatever the tests do, the folder stays as it is, and MINE out of the cache."""
    top = tmp_path_factory.mktemp("speaking")
    with at_a_shell(top) as person:
        make_model(person.models / MINE, MINE_SAYS, shards=2)
        person.hub.add_repo(MINE, make_model(top / "hidden", HUB_SAYS))
        person.hub.add_repo(NEW, make_model(top / "new", NEW_SAYS, shards=2))
        before = listing(person.models)
        yield person
        assert listing(person.models) == before, "P1: the user's folder was changed"
        assert not (person.cache / repo_folder(MINE)).exists(), "a model of the user's is in the real cache"


@pytest.fixture(scope="module")
def session(speaking: Person) -> Iterator[Client]:
    """One client in one session, for all that only reads."""
    with speaking.client() as client:
        yield client


@pytest.fixture
def reader(speaking: Person, session: Client) -> Iterator[Client]:
    """That client, which makes the Hub hear nothing of MINE."""
    speaking.hub.reset_counts()
    yield session
    assert speaking.asked_about(MINE) == [], "P2: a request about the user's own model left the machine"
    assert speaking.hub.bytes_served(MINE, files_only=False) == 0


def folder_of(person: Person) -> dict[str, bytes]:
    return contents(person.models / MINE)


def test_snapshot_download_gives_the_folders_files(speaking: Person, reader: Client) -> None:
    assert contents(reader.get("snapshot_download", MINE)) == folder_of(speaking)


def test_snapshot_download_to_a_local_dir_gives_the_folders_files(
    speaking: Person, reader: Client, tmp_path: Path
) -> None:
    assert contents(reader.get("snapshot_download", MINE, local_dir=str(tmp_path / "here"))) == folder_of(speaking)


@pytest.mark.parametrize("how", [{}, {"revision": "main"}, {"force_download": True}])
def test_hf_hub_download_gives_the_folders_files(speaking: Person, reader: Client, how: dict[str, Any]) -> None:
    for name, content in folder_of(speaking).items():
        assert Path(reader.get("hf_hub_download", MINE, name, **how)).read_bytes() == content


def test_a_forced_snapshot_download_gives_the_folders_files(speaking: Person, reader: Client) -> None:
    assert contents(reader.get("snapshot_download", MINE, force_download=True)) == folder_of(speaking)


def test_the_commit_pins_the_folders_revision(speaking: Person, reader: Client) -> None:
    """A program that resolves main once and asks by commit from then on."""
    commit = reader.get("model_info", MINE)["sha"]
    assert Path(reader.get("snapshot_download", MINE)).name == commit
    assert contents(reader.get("snapshot_download", MINE, revision=commit)) == folder_of(speaking)
    config = reader.get("hf_hub_download", MINE, "config.json", revision=commit)
    assert Path(config).read_bytes() == folder_of(speaking)["config.json"]


def test_the_hubs_api_tells_of_the_folder(speaking: Person, reader: Client) -> None:
    """What programs ask before they load: info, lists of files, sizes, refs, whether something is there."""
    files = folder_of(speaking)
    sizes = {name: len(content) for name, content in files.items()}
    info = reader.get("model_info", MINE, files_metadata=True)
    assert info["id"] == MINE
    assert {each["rfilename"]: each["size"] for each in info["siblings"]} == sizes
    assert sorted(reader.get("list_repo_files", MINE)) == sorted(files)
    for recursive in (True, False):
        listed = reader.get("list_repo_tree", MINE, recursive=recursive)
        assert {entry["path"]: entry["size"] for entry in listed} == sizes
    (config,) = reader.get("get_paths_info", MINE, ["config.json", "no-such-file"])
    assert (config["path"], config["size"]) == ("config.json", sizes["config.json"])
    assert reader.get("file_exists", MINE, "config.json") is True
    assert reader.get("file_exists", MINE, "no-such-file") is False
    assert reader.get("repo_exists", MINE) is True
    assert reader.get("revision_exists", MINE, "main") is True
    assert reader.get("revision_exists", MINE, "v2") is False
    (branch,) = reader.get("list_repo_refs", MINE)["branches"]
    assert (branch["name"], branch["target_commit"]) == ("main", info["sha"])


@pytest.mark.parametrize("model_id", ["flat", "acme/Name.v1_2-3", "acme/tree", "acme/é and more"])
def test_any_id_is_the_folders(person: Person, model_id: str) -> None:
    """Where the URL alone does not tell a repo from a part of it, or is quoted."""
    lay_model(person.models / model_id, {"sub/own.txt": b"own"}, settled=True)
    person.hub.add_repo(model_id, FILES)
    mine = contents(person.models / model_id)
    with person.client() as client:
        if model_id.isascii():
            assert contents(client.get("snapshot_download", model_id)) == mine
            assert Path(client.get("hf_hub_download", model_id, "sub/own.txt")).read_bytes() == b"own"
            assert sorted(client.get("list_repo_files", model_id)) == sorted(mine)
            (entry,) = client.get("list_repo_tree", model_id, "sub")
            assert entry["path"] == "sub/own.txt"
            assert client.get("model_info", model_id)["id"] == model_id
        else:  # no client asks for it, and its answer must not be the Hub's
            quoted = quote(model_id)
            assert ask(client.environ["HF_ENDPOINT"], f"/{quoted}/resolve/main/sub/own.txt").body == b"own"
    assert person.hub.requests == []


def test_a_file_that_the_folder_lacks_is_not_found(reader: Client) -> None:
    """As on a Hub that lacks it: what asks for an optional file goes on without."""
    failure = reader.failure("hf_hub_download", MINE, "no-such-file.json")
    assert failure.error == "RemoteEntryNotFoundError"


def test_hf_download_gives_the_folders_files(speaking: Person, reader: Client, tmp_path: Path) -> None:
    """`hf download`, into the cache and into a folder; `reader` sees that the Hub hears nothing."""
    speaking.succeed("hf", "download", MINE)
    speaking.succeed("hf", "download", MINE, "--local-dir", str(tmp_path / "here"))
    assert contents(tmp_path / "here") == folder_of(speaking)
    speaking.succeed("hf", "download", MINE, "config.json", "--local-dir", str(tmp_path / "one"))
    assert contents(tmp_path / "one") == {"config.json": folder_of(speaking)["config.json"]}


SPEAKS = """
import json, sys
from mlx_lm import generate, load
from transformers import AutoConfig, AutoTokenizer

def says(name):
    return generate(*load(name), prompt="hi", max_tokens=50)

print(json.dumps({
    name: [says(name), AutoConfig.from_pretrained(name).vocab_size, len(AutoTokenizer.from_pretrained(name))]
    for name in sys.argv[1:]
}))
"""


def test_mlx_lm_and_transformers_load_the_folders_model_and_the_hubs_others(speaking: Person, reader: Client) -> None:
    """P2 and P3: what was on the Hub alone is downloaded once, and loads afterwards without overlay and network."""
    expected = {
        name: [says, len(vocabulary(split(says))), len(vocabulary(split(says)))]
        for name, says in {MINE: MINE_SAYS, NEW: NEW_SAYS}.items()
    }
    said = speaking.succeed(PYTHON, "-c", SPEAKS, *expected, options=["--quiet"])
    assert json.loads(said.out) == expected
    downloads = speaking.downloads(NEW)
    assert downloads["model-00001-of-00002.safetensors"] == 1
    assert set(downloads.values()) == {1}, f"a file was downloaded twice: {downloads}"
    alone = succeed([PYTHON, "-c", SPEAKS, NEW], {**speaking.environ, "HF_HUB_OFFLINE": "1"})
    assert json.loads(alone.out) == {NEW: expected[NEW]}


@pytest.mark.parametrize("release", RELEASES)
def test_the_folder_wins_and_downloads_come_home_in_each_release(person: Person, release: str) -> None:
    """P2 and P3, with every huggingface_hub that is in use."""
    mine = folder_of(person)
    with person.client(release=release) as client:
        assert contents(client.get("snapshot_download", MINE)) == mine
        assert Path(client.get("hf_hub_download", MINE, "only-mine.txt")).read_bytes() == b"mine"
        assert client.failure("hf_hub_download", MINE, "only-theirs.txt").error.endswith("EntryNotFoundError")
        assert client.get("model_info", MINE)["sha"] == Path(client.get("snapshot_download", MINE)).name
        assert contents(client.get("snapshot_download", NEW)) == FILES
        assert contents(client.get("snapshot_download", NEW)) == FILES
        client.end()
    assert person.asked_about(MINE) == []
    assert set(person.downloads(NEW).values()) == {1}
    assert cached(person.cache, NEW) == FILES
    with person.offline_client(release=release) as alone:
        assert contents(alone.get("snapshot_download", NEW)) == FILES
        assert alone.failure("snapshot_download", MINE).error.endswith("EntryNotFoundError")


# The Hub answers for all else ----------------------------------------------------------------------------------


def test_every_kind_of_repo_is_downloaded_once_into_the_real_cache(person: Person) -> None:
    """P3: models, datasets and spaces, with an organisation and without."""
    repos = {("model", NEW), ("model", "flat"), ("dataset", "org/data"), ("dataset", "flat-data"), ("space", "org/app")}
    for repo_type, repo_id in repos:
        person.hub.add_repo(repo_id, FILES, repo_type=repo_type)  # type: ignore[arg-type]
    with person.client() as client:
        for repo_type, repo_id in repos:
            assert contents(client.get("snapshot_download", repo_id, repo_type=repo_type)) == FILES
            assert not incomplete(person.cache)
            assert cached(person.cache, repo_id, repo_type) == FILES, "it is there while the session lasts"
        for repo_type, repo_id in repos:
            config = client.get("hf_hub_download", repo_id, "config.json", repo_type=repo_type)
            assert Path(config).read_bytes() == FILES["config.json"]
        scanned = client.get("scan_cache_dir")
        assert scanned["warnings"] == []
    for repo_type, repo_id in repos:
        assert cached(person.cache, repo_id, repo_type) == FILES
        assert person.downloads(repo_id) == dict.fromkeys(FILES, 1)
    with person.offline_client() as alone:
        for repo_type, repo_id in repos:
            assert contents(alone.get("snapshot_download", repo_id, repo_type=repo_type)) == FILES


def test_a_dataset_of_the_same_id_is_the_hubs(person: Person) -> None:
    """The user's folders hold models; their ids say nothing of datasets and spaces."""
    person.hub.add_repo(MINE, FILES, repo_type="dataset")
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE, repo_type="dataset")) == FILES
    assert cached(person.cache, MINE, "dataset") == FILES


def test_a_download_that_was_cut_is_resumed_by_a_program_without_overlay(person: Person) -> None:
    """Parts of files lie in the real cache, too, where others find them."""
    release = "0.36.2"  # the last one that resumes what another process began; it writes 10 MiB at a time
    person.hub.add_virtual("org/large", "model.safetensors", 24 << 20)
    person.hub.cut_after(15 << 20)
    with person.client(release=release) as client:
        client.failure("hf_hub_download", "org/large", "model.safetensors")
        assert [os.path.getsize(part) for part in incomplete(person.cache)] == [10 << 20]
    with person.plain_client(release=release) as plain:
        found = Path(plain.get("hf_hub_download", "org/large", "model.safetensors")).read_bytes()
    assert found == b"".join(virtual_bytes(0, 24 << 20))
    ranges = [request.headers.get("range") for request in person.hub.requests if request.name and request.sent]
    assert ranges[1:] == [f"bytes={10 << 20}-"]


def test_what_is_only_looked_at_leaves_nothing_behind(person: Person) -> None:
    """Folders made for downloads that never came are gone in the end."""
    with person.client() as client:
        look_at_what_is_the_hubs(client)
    left = [str(path) for path in person.cache.rglob("*")]
    assert left == []


def test_what_is_only_looked_at_warns_nobody(person: Person) -> None:
    """P8: neither in the session nor in the real cache does a scan stumble over what was made for downloads."""
    with person.client() as client, person.offline_client() as alone:
        look_at_what_is_the_hubs(client)
        assert client.get("scan_cache_dir")["warnings"] == []
        if person.cache.exists():
            assert alone.get("scan_cache_dir", str(person.cache))["warnings"] == []


def look_at_what_is_the_hubs(client: Client) -> None:
    assert client.get("model_info", NEW)["id"] == NEW
    assert sorted(client.get("list_repo_files", NEW)) == sorted(FILES)
    assert client.get("file_exists", NEW, "config.json") is True
    assert client.get("dataset_info", "org/data", revision="main")["id"] == "org/data"


def test_the_hubs_newer_commit_of_a_cached_model_is_downloaded(person: Person) -> None:
    """The overlay does not freeze what is the Hub's."""
    with person.client() as client:
        client.get("snapshot_download", NEW)
        person.hub.add_repo(NEW, {**FILES, "config.json": b"{}"})
        assert contents(client.get("snapshot_download", NEW)) == {**FILES, "config.json": b"{}"}
    assert cached(person.cache, NEW) == {**FILES, "config.json": b"{}"}
    assert person.downloads(NEW)["model.safetensors"] == 1


def test_a_renamed_repo_is_followed(person: Person) -> None:
    """Redirects that stay on the Hub lead through the gateway again."""
    person.hub.rename("org/old", NEW)
    with person.client() as client:
        assert contents(client.get("snapshot_download", "org/old")) == FILES
    assert cached(person.cache, "org/old") == FILES


def test_a_branch_and_a_commit_of_the_hubs_model_are_downloaded(person: Person) -> None:
    person.hub.add_repo(NEW, {"config.json": b"old"}, branch="v1")
    commit = person.hub.add_repo(NEW, {"config.json": b"pinned"}, branch="pinned")
    with person.client() as client:
        assert contents(client.get("snapshot_download", NEW, revision="v1")) == {"config.json": b"old"}
        assert contents(client.get("snapshot_download", NEW, revision=commit)) == {"config.json": b"pinned"}
    with person.offline_client() as alone:
        assert contents(alone.get("snapshot_download", NEW, revision="v1")) == {"config.json": b"old"}
        assert contents(alone.get("snapshot_download", NEW, revision=commit)) == {"config.json": b"pinned"}


# Other revisions of the user's models --------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["v1", "a" * 40, "refs/pr/1"])
def test_another_revision_of_the_users_model_is_refused_with_the_way_out(person: Person, revision: str) -> None:
    """P12: it names the folder and --exclude; a branch that the Hub does have is no different."""
    person.hub.add_repo(MINE, FILES, branch="v1")
    with person.client() as client:
        for call in (("snapshot_download", MINE), ("hf_hub_download", MINE, "config.json"), ("model_info", MINE)):
            failure = client.failure(*call, revision=revision)
            assert failure.error == "RevisionNotFoundError", call
            assert f"--exclude {MINE}" in failure.message
            assert str(person.models / MINE) in failure.message
    assert person.asked_about(MINE) == []


def test_excluded_the_hubs_model_is_downloaded(person: Person) -> None:
    """`--exclude` gets what the message promises: any revision, in the real cache."""
    person.hub.add_repo(MINE, {"config.json": b"old"}, branch="v1")
    with person.client(options=["--exclude", MINE]) as client:
        assert contents(client.get("snapshot_download", MINE, revision="v1")) == {"config.json": b"old"}
        assert contents(client.get("snapshot_download", MINE)) == {**FILES, "only-theirs.txt": b"theirs"}
    assert cached(person.cache, MINE) == {**FILES, "only-theirs.txt": b"theirs"}
    assert contents(person.models / MINE)["only-mine.txt"] == b"mine"


def test_the_hubs_copy_in_the_cache_does_not_stand_in_front_of_the_folder(person: Person) -> None:
    """P2, where the user has both."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", MINE)
    before = listing(person.cache)
    person.hub.reset_counts()
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
    assert person.asked_about(MINE) == []
    assert listing(person.cache) == before


# Errors are those of a plain client ----------------------------------------------------------------------------


CALLS = (
    ("snapshot_download",),
    ("hf_hub_download", "config.json"),
    ("model_info",),
    ("list_repo_files",),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Person, Client, Client]]:
    """Somebody with a client in a session and one without."""
    with at_a_shell(tmp_path_factory.mktemp("pair")) as person:
        furnish(person)
        person.hub.add_repo("org/secret", FILES, private=True)
        person.hub.add_repo("org/gated", FILES, gated=True)
        with person.client() as overlaid, person.plain_client() as plain:
            yield person, overlaid, plain


@pytest.fixture
def failures(pair: tuple[Person, Client, Client]) -> Iterator[tuple[LoopbackHub, Callable[..., Failure]]]:
    """The Hub, and what a call raises through the overlay, which must be what it raises without."""
    person, overlaid, plain = pair

    def failure(*call: str, **arguments: Any) -> Failure:
        alone = as_said_to(plain.failure(*call, **arguments), plain)
        assert as_said_to(overlaid.failure(*call, **arguments), overlaid) == alone
        return alone

    yield person.hub, failure
    person.hub.heal()
    person.hub.recover()


def as_said_to(failure: Failure, client: Client) -> Failure:
    """Without what differs from one request, and one cache, to the next."""
    message = failure.message.replace(client.environ["HF_ENDPOINT"], "HUB")
    return Failure(failure.error, re.sub(r"Root=[-\w.]+(;[-\w.]+)?", "ID", message))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("repo_id", [NOWHERE, "nowhere", "org/secret"])
def test_what_the_hub_refuses_is_refused_in_its_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]], repo_id: str, call: tuple[str, ...]
) -> None:
    """P12: type and message, but for the URL."""
    _, failure = failures
    name, *rest = call
    assert failure(name, repo_id, *rest).error == "RepositoryNotFoundError"


def test_a_gated_repo_is_refused_in_the_hubs_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]],
) -> None:
    """P12: with where to ask for access."""
    _, failure = failures
    assert failure("hf_hub_download", "org/gated", "config.json").error == "GatedRepoError"
    assert failure("snapshot_download", "org/gated", max_workers=1).error == "GatedRepoError"


def test_a_revision_and_a_file_that_the_hub_lacks_are_refused_in_its_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]],
) -> None:
    _, failure = failures
    assert failure("snapshot_download", NEW, revision="v9").error == "RevisionNotFoundError"
    assert failure("hf_hub_download", NEW, "config.json", revision="v9").error == "RevisionNotFoundError"
    assert failure("hf_hub_download", NEW, "no-such-file").error == "RemoteEntryNotFoundError"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [400, 403])
def test_other_refusals_are_told_in_the_hubs_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]], status: int, call: tuple[str, ...]
) -> None:
    hub, failure = failures
    hub.fail(status)
    name, *rest = call
    failure(name, NEW, *rest)


@pytest.mark.parametrize("call", ["snapshot_download", "model_info"])  # others try again for half a minute
@pytest.mark.parametrize("status", [429, 500, 503])
def test_the_hubs_own_trouble_is_told_in_its_words(
    failures: tuple[LoopbackHub, Callable[..., Failure]], status: int, call: str
) -> None:
    hub, failure = failures
    hub.fail(status)
    failure(call, NEW)


def test_without_a_hub_a_download_fails_as_without_a_network(pair: tuple[Person, Client, Client]) -> None:
    """The same error; its text also tells which Hub the gateway could not reach."""
    person, overlaid, plain = pair
    person.hub.outage()
    try:
        alone = plain.failure("snapshot_download", NEW)
        failure = overlaid.failure("snapshot_download", NEW)
    finally:
        person.hub.recover()
    assert failure.error == alone.error == "LocalEntryNotFoundError"
    assert failure.message.splitlines()[-1] == alone.message.splitlines()[-1]
    assert f"{person.hub.endpoint} cannot be reached" in failure.message


# Private repos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["org/secret", "org/gated"])
def test_the_users_token_opens_what_it_opens_and_is_never_told(person: Person, repo_id: str) -> None:
    """P9: it arrives at the Hub, at no other host, and in none of our lines or files."""
    person.hub.add_repo(repo_id, FILES, private=repo_id == "org/secret", gated=repo_id == "org/gated")
    with person.client(options=["--verbose"], HF_TOKEN=TOKEN) as client:
        assert contents(client.get("snapshot_download", repo_id)) == FILES
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        told = [path for path in person.sessions.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    about = [request for request in person.hub.requests if repo_id in request.target or request.repo_id == repo_id]
    assert {request.authorization for request in about if request.host == "hub"} == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in about if request.host == "cdn"} == {None}
    assert TOKEN not in client.said()
    assert told == []
    assert cached(person.cache, repo_id) == FILES


def test_the_token_that_is_not_sent_stays_unsent(person: Person) -> None:
    """`token=False`: the gateway adds no authorization of its own, nor one from a .netrc."""
    (person.home / ".netrc").write_text("machine 127.0.0.1 login somebody password of-theirs\n")
    with person.client(HF_TOKEN=TOKEN) as client:
        client.get("snapshot_download", NEW, token=False)
    assert {request.authorization for request in person.hub.requests} == {None}


def test_a_login_inside_a_session_is_the_real_one(person: Person, tmp_path: Path) -> None:
    """P9: `hf auth login` and `logout` change the real token, as without overlay, and nothing else."""
    (tmp_path / "alone").mkdir()
    with at_a_shell(tmp_path / "alone") as other:
        assert finish(["hf", "auth", "login", "--token", TOKEN], other.environ).status == 0
        person.succeed("hf", "auth", "login", "--token", TOKEN)
        assert login_files(person) == login_files(other) != {}
        with person.client() as client:
            assert client.get("whoami")["name"] == "tester"
        assert finish(["hf", "auth", "logout"], other.environ).status == 0
        person.succeed("hf", "auth", "logout")
        assert login_files(person) == login_files(other)
    assert folder_of(person)["only-mine.txt"] == b"mine"


def login_files(person: Person) -> dict[str, bytes]:
    """What is in HF_HOME, but for what the cache holds."""
    hf_home = person.home / ".cache" / "huggingface"
    assert not any(path.is_symlink() for path in hf_home.rglob("*"))
    return {name: content for name, content in contents(hf_home).items() if not name.startswith("hub/")}


# A Hub in trouble ----------------------------------------------------------------------------------------------


TROUBLES: dict[str, Callable[[LoopbackHub], None]] = {
    "refuses connections": lambda hub: hub.outage(),
    "answers 500": lambda hub: hub.fail(500),
    "answers 503": lambda hub: hub.fail(503),
    "hangs": lambda hub: hub.hang(600),
}


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_cached_copies_load_while_the_hub_is_in_trouble(person: Person, trouble: str, release: str) -> None:
    """And the user's own models do so all the more."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", NEW)
    with person.client(release=release) as client:
        TROUBLES[trouble](person.hub)
        if trouble != "hangs":  # there, a plain snapshot_download waits for ever
            assert contents(client.get("snapshot_download", NEW)) == FILES
        config = client.get("hf_hub_download", NEW, "config.json", etag_timeout=1)
        assert Path(config).read_bytes() == FILES["config.json"]
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        person.hub.heal()
        person.hub.recover()
        assert client.get("model_info", NEW)["id"] == NEW, "the gateway did not come back with the Hub"


# A way to the Hub that is not straight -------------------------------------------------------------------------


def test_the_users_own_endpoint_is_the_upstream_with_the_path_in_it(tmp_path: Path) -> None:
    """A mirror behind a path, whose redirects are relative and whose listings have many pages."""
    with at_a_shell(tmp_path, prefix="/mirror/hf", page_size=1, compress=True) as person:
        furnish(person)
        person.hub.rename("org/old", NEW)
        with person.client(HF_ENDPOINT=f"{person.hub.endpoint}/") as client:
            assert contents(client.get("snapshot_download", NEW)) == FILES
            assert contents(client.get("snapshot_download", "org/old")) == FILES
            assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        assert {request.host for request in person.hub.requests} == {"hub", "cdn"}
        assert person.asked_about(MINE) == []
        assert cached(person.cache, NEW) == FILES


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_the_users_proxy_leads_to_the_hub_and_not_to_the_gateway(person: Person, variable: str) -> None:
    """The loopback Hub is also such a proxy: an address where nobody listens can only be reached through it."""
    proxy = "http://{}:{}".format(*urlsplit(person.hub.endpoint).netloc.split(":"))
    environ = {variable: proxy, "HF_ENDPOINT": "http://127.0.0.3", "NO_PROXY": "localhost"}
    with person.client(**environ) as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        assert contents(client.get("snapshot_download", NEW)) == FILES
    assert {request.headers["host"] for request in person.hub.requests if request.host == "hub"} == {"127.0.0.3"}
    assert person.asked_about(MINE) == []


# The gateway itself --------------------------------------------------------------------------------------------


class Reply(Mapping[str, str]):
    """An answer: a status, headers by lower-case name, a body."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.body = response.read()
        self._headers = {name.lower(): value for name, value in response.getheaders()}

    def __getitem__(self, name: str) -> str:
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def ask(endpoint: str, path: str, method: str = "GET", body: Any = None, **headers: str) -> Reply:
    url = urlsplit(endpoint)
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=SECONDS)
    try:
        connection.request(method, url.path + path, body, headers, encode_chunked=not isinstance(body, bytes | None))
        return Reply(connection.getresponse())
    finally:
        connection.close()


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


# Drives come and go --------------------------------------------------------------------------------------------


def test_an_unplugged_model_is_not_downloaded_instead(person: Person) -> None:
    """P2 and P12: the answer names the drive; back again, the model loads as before."""
    mine, away = folder_of(person), person.models.with_name("away")
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == mine
        person.models.rename(away)
        for call in (("snapshot_download", MINE), ("hf_hub_download", MINE, "config.json"), ("model_info", MINE)):
            assert str(person.models) in client.failure(*call).message, call
        assert contents(client.get("snapshot_download", NEW)) == FILES, "other models are not hidden"
        away.rename(person.models)
        eventually(lambda: loads(client, mine), "the model loads again")
    assert person.asked_about(MINE) == []
    assert not cached(person.cache, MINE)


def loads(client: Client, files: Mapping[str, bytes]) -> bool:
    """Whether MINE is these files; what has changed on disk may be refused for a few seconds, and no more."""
    reply = client.ask("snapshot_download", MINE)
    if "error" in reply:
        return False
    assert contents(reply["value"]) == files
    return True


def test_the_caches_copy_of_an_unplugged_model_loads(person: Person) -> None:
    """And not a byte is fetched for it, though the Hub has a newer commit by now."""
    theirs = {**FILES, "only-theirs.txt": b"theirs"}
    with person.plain_client() as plain:
        plain.get("snapshot_download", MINE)
    person.hub.add_repo(MINE, {"config.json": b"newer"})
    person.hub.reset_counts()
    mine, away = folder_of(person), person.models.with_name("away")
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == mine
        person.models.rename(away)
        eventually(lambda: loads(client, theirs), "the copy loads")
        assert Path(client.get("hf_hub_download", MINE, "config.json")).read_bytes() == FILES["config.json"]
        away.rename(person.models)
        eventually(lambda: is_folder_again(client, mine, theirs), "the folder's model loads again")
    assert person.asked_about(MINE) == []
    assert cached(person.cache, MINE) == theirs


def is_folder_again(client: Client, mine: Mapping[str, bytes], theirs: Mapping[str, bytes]) -> bool:
    found = contents(client.get("snapshot_download", MINE))
    assert found in (mine, theirs), "neither the folder's model nor the copy, but something between"
    return found == mine


def test_a_model_that_is_copied_into_the_folder_meanwhile_is_seen(person: Person) -> None:
    """Without a restart, and also where the Hub has one of that id."""
    person.hub.add_repo("acme/late", FILES)
    with person.client() as client:
        assert client.failure("snapshot_download", "acme/late-too").error == "RepositoryNotFoundError"
        for name in ("acme/late", "acme/late-too"):
            shutil.copytree(person.models / MINE, person.models / name)
            assert contents(client.get("snapshot_download", name)) == folder_of(person)
            assert Path(client.get("hf_hub_download", name, "only-mine.txt")).read_bytes() == b"mine"
    assert person.asked_about("acme/late") == ["GET /api/models/acme/late-too/revision/main?"]


def test_a_model_that_is_deleted_from_the_folder_is_the_hubs(person: Person) -> None:
    """Nothing is unplugged: the user has taken it away, and the id is the Hub's again at once."""
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        shutil.rmtree(person.models / MINE)
        assert contents(client.get("snapshot_download", MINE)) == {**FILES, "only-theirs.txt": b"theirs"}
    assert cached(person.cache, MINE) == {**FILES, "only-theirs.txt": b"theirs"}


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
def test_a_file_that_was_edited_meanwhile_is_served_as_it_is(person: Person, release: str) -> None:
    """Its size, too: clients compare what they are told with what they get, and blame the network."""
    edited = b'{"model_type": "llama", "edited": true}'
    with person.client(release=release) as client:
        client.get("snapshot_download", MINE)
        (person.models / MINE / "config.json").write_bytes(edited)
        for how in ({}, {"force_download": True}, {"local_dir": str(person.home / "here")}):
            assert Path(client.get("hf_hub_download", MINE, "config.json", **how)).read_bytes() == edited, how
    assert person.asked_about(MINE) == []


# Without a network ---------------------------------------------------------------------------------------------


def test_offline_there_is_neither_a_gateway_nor_a_request(person: Person) -> None:
    """`--offline`: the folder and the cache, and nothing else."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", NEW)
    person.hub.reset_counts()
    with person.client(options=["--offline"]) as client:
        assert client.environ["HF_HUB_OFFLINE"] == "1"
        assert client.environ["HF_ENDPOINT"] == person.hub.endpoint
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
        assert contents(client.get("snapshot_download", NEW)) == FILES
        assert client.failure("snapshot_download", NOWHERE).error == "LocalEntryNotFoundError"
    assert person.hub.requests == []


# Commands on the cache -----------------------------------------------------------------------------------------


def test_hf_cache_ls_lists_the_folder_and_what_was_downloaded(person: Person) -> None:
    person.succeed("hf", "download", NEW)
    rows = json.loads(person.succeed("hf", "cache", "ls", "--format", "json").out)
    assert sorted(row["repo_id"] for row in rows) == [MINE, NEW]


@pytest.mark.parametrize("command", [("rm", f"model/{MINE}", "--yes"), ("prune", "--yes")])
def test_hf_cache_rm_and_prune_leave_the_folder_and_the_cache_as_they_are(
    person: Person, command: tuple[str, ...]
) -> None:
    """P1; the model is there again in the next session, and nothing is asked of the Hub."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", NEW)
    before = listing(person.models), listing(person.cache)
    person.succeed("hf", "cache", *command)
    assert (listing(person.models), listing(person.cache)) == before
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
    assert person.asked_about(MINE) == []


def test_hf_cache_verify_checks_what_is_the_hubs(person: Person) -> None:
    """Inside a session as without one: all is well, then a file is damaged."""
    person.succeed("hf", "download", NEW)
    person.succeed("hf", "cache", "verify", NEW)
    blob = (person.cache / repo_folder(NEW) / "refs/main").read_text()
    damaged = person.cache / repo_folder(NEW) / "snapshots" / blob / "config.json"
    damaged.write_bytes(b"damaged")
    assert person.finish("hf", "cache", "verify", NEW).status != 0


def test_hf_cache_verify_raises_no_false_alarm_about_the_users_model(person: Person) -> None:
    """P12: the folder's files are what they are."""
    done = person.finish("hf", "cache", "verify", MINE)
    assert "verification failed" not in (done.out + done.err).lower()
    assert person.asked_about(MINE) == []


# Together with others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
def test_two_sessions_and_a_plain_program_download_one_repo_at_once(person: Person, release: str) -> None:
    """P10: one copy in the real cache, and nobody fails."""
    files = {f"model-{number:05d}-of-00006.safetensors": os.urandom(300_000) for number in range(1, 7)}
    person.hub.add_repo("org/large", {"config.json": b"{}", **files})
    with ExitStack() as stack:
        sessions = [stack.enter_context(person.client(release=release)) for _ in range(2)]
        clients = [*sessions, stack.enter_context(person.plain_client(release=release))]
        person.hub.slow(1_000_000)
        with ThreadPoolExecutor(len(clients)) as threads:
            for found in threads.map(lambda client: client.get("snapshot_download", "org/large"), clients):
                assert contents(found) == {"config.json": b"{}", **files}
    assert cached(person.cache, "org/large") == {"config.json": b"{}", **files}
    assert incomplete(person.cache) == []
    blobs = list((person.cache / repo_folder("org/large") / "blobs").iterdir())
    assert len(blobs) == 1 + len(files)
    assert person.downloads("org/large") == dict.fromkeys(["config.json", *files], 1)


def test_many_requests_at_once_are_answered(speaking: Person, session: Client) -> None:
    """More than a client's pool holds, to the folder and to the Hub in turns."""
    endpoint = session.environ["HF_ENDPOINT"]
    paths = [f"/api/models/{repo_id}/revision/main" for repo_id in (MINE, NEW)] * 100
    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(lambda path: ask(endpoint, path), paths))
    assert {reply.status for reply in replies} == {200}
    assert [json.loads(reply.body)["id"] for reply in replies] == [MINE, NEW] * 100


# Not seen by the gateway ---------------------------------------------------------------------------------------


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
