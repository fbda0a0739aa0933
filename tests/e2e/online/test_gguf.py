"""GGUF folders, as LM Studio keeps them, are found by what loads GGUF files, without a byte from the Hub (P1, P2)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import hubs, llama_cpp
from tests.support.folders import gguf, lay_files
from tests.support.hfcache import listing
from tests.support.online import Person, at_a_shell, cached, contents
from tests.support.permissions import as_a_user
from tests.support.processes import OVERLAY, PYTHON, succeed

MINE = "publisher/model-GGUF"
SPLIT = "publisher/large-GGUF"
NEW = "publisher/new-GGUF"
FILES = {
    "model-Q4_K_M.gguf": gguf(b"four bits"),
    "model-Q8_0.gguf": gguf(b"eight bits"),
    "mmproj-model-f16.gguf": gguf(b"sees"),
}
SHARDS = {f"Q8_0/large-Q8_0-0000{number}-of-00002.gguf": gguf(b"shard %d" % number) for number in (1, 2)}
HUBS = {"model-Q4_K_M.gguf": gguf(b"the Hub's"), "model-Q5_K_M.gguf": gguf(b"the Hub's alone"), "README.md": b"new"}
ANY = ("--kind", "any")
RELEASES = ("0.36.2", "1.33.0", hubs.INSTALLED)

# Llama.from_pretrained of llama-cpp-python 0.3.36 up to where the file is opened.
FROM_PRETRAINED = """
import fnmatch, sys
from pathlib import Path
from huggingface_hub import HfFileSystem, hf_hub_download

repo_id, pattern = sys.argv[1:]
files = [each["name"] if isinstance(each, dict) else each for each in HfFileSystem().ls(repo_id, recursive=True)]
names = [str(Path(each).relative_to(repo_id)) for each in files]
[found] = [each for each in names if fnmatch.fnmatch(each, pattern)]
subfolder, filename = str(Path(found).parent), Path(found).name
hf_hub_download(repo_id=repo_id, filename=filename, subfolder=subfolder, local_dir=None, cache_dir=None)
path = hf_hub_download(repo_id=repo_id, filename=filename, subfolder=subfolder, cache_dir=None, local_files_only=True)
print(Path(path).read_bytes().hex())
"""


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    """Their GGUF folders stay as they are, and the Hub, which has other files of that name, hears nothing of them."""
    with at_a_shell(tmp_path) as person:
        lay_files(person.models / MINE, FILES)
        lay_files(person.models / SPLIT, SHARDS)
        person.hub.add_repo(MINE, HUBS)
        person.hub.add_repo(SPLIT, HUBS)
        person.hub.add_repo(NEW, HUBS)
        before = listing(person.models)
        yield person
        assert listing(person.models) == before, "P1: the user's folder was changed"
        assert person.asked_about(MINE) + person.asked_about(SPLIT) == [], "P2: the Hub was asked"


def loaded(person: Person, *arguments: str, before: Sequence[str] = (), **environ: str) -> dict[str, bytes]:
    """The files that llama.cpp loads: name -> content. `before` is a command that its own is handed to."""
    command = (*before, PYTHON, llama_cpp.__file__, *arguments)
    done = person.succeed(*command, options=(*ANY, "--quiet"), **environ)
    assert done.err == "", "it could not write something"
    found: dict[str, str] = json.loads(done.out)
    return {Path(path).name: bytes.fromhex(content) for path, content in found.items()}


MEANT = {
    (MINE, ""): {name: FILES[name] for name in ("model-Q4_K_M.gguf", "mmproj-model-f16.gguf")},
    (MINE, ":q8_0"): {name: FILES[name] for name in ("model-Q8_0.gguf", "mmproj-model-f16.gguf")},
    (SPLIT, ":Q8_0"): {Path(name).name: content for name, content in SHARDS.items()},
}


@pytest.mark.parametrize(
    ("repo_id", "tag", "how"),
    [*((*each, "online") for each in MEANT), (MINE, ":q8_0", "as a user"), (MINE, "", "offline")],
)
def test_llama_cpp_loads_the_file_that_a_tag_names_from_the_folder(
    person: Person, repo_id: str, tag: str, how: str
) -> None:
    """It writes the ref that it has learned, also as a user, whom modes stop."""
    options = ["--offline"] if how == "offline" else []
    before = as_a_user() if how == "as a user" else ()
    assert loaded(person, "cached", f"{repo_id}{tag}", *options, before=before) == MEANT[repo_id, tag]
    assert not person.cache.exists(), "something of the user's model is in the real cache"


def test_a_file_that_only_the_hub_has_is_not_loaded_instead(person: Person) -> None:
    done = person.finish(PYTHON, llama_cpp.__file__, "cached", f"{MINE}:Q5_K_M", options=ANY)
    assert done.status != 0
    assert "no GGUF files found for Q5_K_M" in done.err


@pytest.mark.parametrize("tag", ["", ":q8_0"])
def test_llama_cpp_of_2025_copies_the_file_that_a_tag_names_from_the_folder(person: Person, tag: str) -> None:
    found = loaded(person, "copied", f"{MINE}{tag}")
    assert {name.removeprefix(MINE.replace("/", "_") + "_"): content for name, content in found.items()} == MEANT[
        MINE, tag
    ]


def test_llama_cpp_looks_into_the_overlay_whatever_its_own_variable_says(person: Person, tmp_path: Path) -> None:
    """LLAMA_CACHE would come before HF_HUB_CACHE, and be what it downloads to."""
    own = tmp_path / "llama"
    assert loaded(person, "cached", MINE, LLAMA_CACHE=str(own)) == MEANT[MINE, ""]
    assert loaded(person, "cached", NEW, LLAMA_CACHE=str(own)) == {"model-Q4_K_M.gguf": HUBS["model-Q4_K_M.gguf"]}
    assert not own.exists()


def test_what_llama_cpp_downloads_comes_home(person: Person) -> None:
    """P3, and P4: into the real cache, as it lays files there itself."""
    assert loaded(person, "cached", f"{NEW}:Q5_K_M") == {"model-Q5_K_M.gguf": HUBS["model-Q5_K_M.gguf"]}
    assert cached(person.cache, NEW) == {"model-Q5_K_M.gguf": HUBS["model-Q5_K_M.gguf"]}
    assert loaded(person, "cached", NEW, "--offline") == cached(person.cache, NEW)


@pytest.mark.parametrize("release", RELEASES)
def test_from_pretrained_of_llama_cpp_python_finds_the_file(person: Person, release: str) -> None:
    environ = [f"{name}={value}" for name, value in hubs.environment(release).items()]
    for repo_id, pattern, expected in (
        (MINE, "*Q8_0.gguf", FILES["model-Q8_0.gguf"]),
        (SPLIT, "*00001-of-*", SHARDS["Q8_0/large-Q8_0-00001-of-00002.gguf"]),
    ):
        done = person.succeed(
            "env", *environ, PYTHON, "-c", FROM_PRETRAINED, repo_id, pattern, options=(*ANY, "--quiet")
        )
        assert bytes.fromhex(done.lines()[-1]) == expected


@pytest.mark.parametrize("release", RELEASES)
def test_hf_download_include_gives_the_folders_files(person: Person, release: str) -> None:
    with person.client(release=release, options=ANY) as client:
        found = client.get("snapshot_download", MINE, allow_patterns=["*Q4_K_M*", "mmproj*"])
        assert {name: content for name, content in contents(found).items() if "Q8" not in name} == MEANT[MINE, ""]


def test_the_hf_command_includes_by_pattern(person: Person, tmp_path: Path) -> None:
    here = tmp_path / "here"
    person.succeed("hf", "download", MINE, "--include", "*Q4_K_M*", "--local-dir", str(here), options=ANY)
    assert contents(here) == {"model-Q4_K_M.gguf": FILES["model-Q4_K_M.gguf"]}


def test_they_are_listed_with_their_kind(person: Person) -> None:
    environ = {**person.environ, "HF_HUB_OFFLINE": "1"}
    done = succeed([OVERLAY, "ls", "--json", "--model-path", str(person.models), *ANY], environ)
    assert {each["id"]: each["kind"] for each in json.loads(done.out)} == {MINE: "gguf", SPLIT: "gguf"}
