"""Online, models of the user's folders are answered from there, byte for byte (P2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.e2e.online.people import FILES, MINE, MINE_SAYS, NEW, NEW_SAYS, RELEASES, ask, folder_of
from tests.support.folders import lay_model
from tests.support.models import split, vocabulary
from tests.support.online import Client, Person, cached, contents
from tests.support.permissions import as_a_user
from tests.support.processes import PYTHON, succeed


@pytest.fixture
def reader(speaking: Person, session: Client) -> Iterator[Client]:
    """That client, which makes the Hub hear nothing of MINE."""
    speaking.hub.reset_counts()
    yield session
    assert speaking.asked_about(MINE) == [], "P2: a request about the user's own model left the machine"
    assert speaking.hub.bytes_served(MINE, files_only=False) == 0


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


@pytest.mark.mlx_lm
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
    """P2 and P3, with every huggingface_hub that is in use, and no rights but a user's."""
    mine = folder_of(person)
    with person.client(release=release, before=as_a_user()) as client:
        for revision in ("HEAD", "main"):  # they write down what each stands for
            assert Path(client.get("hf_hub_download", MINE, "only-mine.txt", revision=revision)).read_bytes() == b"mine"
            missing = client.failure("hf_hub_download", MINE, "only-theirs.txt", revision=revision)
            assert missing.error.endswith("EntryNotFoundError")
            forced = client.get("hf_hub_download", MINE, "only-mine.txt", revision=revision, force_download=True)
            assert Path(forced).read_bytes() == b"mine"
        assert contents(client.get("snapshot_download", MINE)) == mine
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
