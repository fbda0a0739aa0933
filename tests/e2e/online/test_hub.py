"""Online, all other repos and revisions are the Hub's, with the user's own login (P9)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.online.people import FILES, MINE, NEW, folder_of
from tests.support.hfcache import listing
from tests.support.loopback_hub import TOKEN, virtual_bytes
from tests.support.online import Client, Person, at_a_shell, cached, contents, incomplete
from tests.support.processes import finish

# The Hub answers for all else -----------------------------------------------------------------------------------


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


# Other revisions of the user's models ---------------------------------------------------------------------------


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


# Private repos --------------------------------------------------------------------------------------------------


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
