"""The cache's layout: names, and a user's folder as a repo."""

from __future__ import annotations

import json

import pytest
from hf_overlay import hfcache
from hf_overlay.models import File, Model
from huggingface_hub.utils import HFValidationError, validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hfcache import git_blob_id

PARTS = st.text(st.sampled_from("abZ09-_.é "), min_size=1, max_size=6) | st.sampled_from(
    ["a--b", "a..b", "x.git", "n" * 97]
)


@given(st.lists(PARTS, min_size=1, max_size=3).map("/".join))
def test_an_id_is_called_good_exactly_when_huggingface_hub_takes_it(model_id: str) -> None:
    try:
        validate_repo_id(model_id)
        is_valid = True
    except HFValidationError:
        is_valid = False
    assert (hfcache.why_not_hub_id(model_id) is None) == is_valid


@given(st.lists(st.text(st.sampled_from("abZ09-_."), min_size=1, max_size=6), min_size=1, max_size=3).map("/".join))
def test_an_id_that_can_be_linked_reads_back_as_itself(model_id: str) -> None:
    if hfcache.why_not_linkable(model_id) is None:
        assert hfcache.model_id(hfcache.repo_folder(model_id)) == model_id


@pytest.mark.parametrize("name", ["datasets--x--y", "spaces--x--y", "models", "models--", ".locks", "version.txt"])
def test_what_is_no_model_repo_has_no_model_id(name: str) -> None:
    assert hfcache.model_id(name) is None


def user_model(**changes: object) -> Model:
    files = (File("config.json", 2, 10), File("sub/deep/model.safetensors", 3, 11))
    model = Model("org/name", "custom", "/drive/org/name", "llama", 5, files, "/drive")
    return model._replace(**changes)  # type: ignore[arg-type]


def test_each_file_of_a_linked_repo_is_two_links_from_the_users_and_there_is_one_revision() -> None:
    model = user_model(commit="c" * 40)
    repo = hfcache.linked_repo(model)
    links = dict(repo.parts.links)
    assert links[f"snapshots/{'c' * 40}"] == f"../views/{'c' * 40}", "a deletion that follows links stops at this one"
    for file in model.files:
        hop = links[f"views/{'c' * 40}/{file.name}"]
        blob = hop.lstrip("./")
        assert blob.startswith("blobs/")
        assert hop.count("../") == 2 + file.name.count("/")
        assert links[blob] == f"{model.path}/{file.name}"
    made = [*links, *repo.parts.folders]
    assert {name.split("/")[1] for name in made if name.startswith(("snapshots/", "views/"))} == {"c" * 40}
    assert all(folder.rpartition("/")[0] in ("", *repo.parts.folders) for folder in repo.parts.folders)
    contents = dict(repo.parts.files)
    assert contents["refs/main"] == b"c" * 40
    assert json.loads(contents[f"trees/{'c' * 40}.json"])["files"].keys() == {file.name for file in model.files}


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "org/other"},
        {"path": "/other/org/name"},
        {"files": (File("config.json", 2, 10),)},
        {"files": (File("config.json", 3, 10), File("sub/deep/model.safetensors", 3, 11))},
        {"files": (File("config.json", 2, 99), File("sub/deep/model.safetensors", 3, 11))},
    ],
)
def test_the_fingerprint_follows_names_sizes_times_and_place(changed: dict[str, object]) -> None:
    assert hfcache.fingerprint(user_model()) == hfcache.fingerprint(user_model())
    assert hfcache.fingerprint(user_model(**changed)) != hfcache.fingerprint(user_model())


def test_files_with_one_true_etag_share_a_blob() -> None:
    files = (File("a.json", 2, 10, "e" * 40), File("b.json", 2, 10, "e" * 40), File("m.safetensors", 9, 10, "f" * 64))
    repo = hfcache.linked_repo(user_model(files=files, commit="c" * 40))
    assert [where for where, _ in repo.parts.links if where.startswith("blobs/")] == [
        f"blobs/{'e' * 40}",
        f"blobs/{'f' * 64}",
    ]
    tree = json.loads(dict(repo.parts.files)[f"trees/{'c' * 40}.json"])
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'f' * 64}\nsize 9\n".encode()
    blob_id = git_blob_id(pointer)
    assert tree["files"]["m.safetensors"] == {"size": 9, "blob_id": blob_id, "lfs_sha256": "f" * 64, "lfs_size": 9}


def test_an_id_may_be_as_long_as_the_name_of_its_linked_repo_fits_into_a_folder() -> None:
    """255 bytes, of which the tree takes 17 for a dot and a part of the fingerprint."""
    longest = "é" * 114 + "a"
    name = hfcache.repo_folder(f"o/{longest[2:]}")
    spare = 255 - 17 - len(name.encode())
    fits = f"o/{longest[2:]}{'b' * spare}"
    assert hfcache.why_not_linkable(fits) is None
    assert hfcache.why_not_linkable(f"{fits}b") == "is too long for a folder name in a cache"
    assert "`--`" in str(hfcache.why_not_linkable("a--b"))


@pytest.mark.parametrize(
    ("folder", "full"),
    [
        ("models--org--name", "org/name"),
        ("models--name", "name"),
        ("datasets--org--name", "datasets/org/name"),
        ("spaces--name", "spaces/name"),
    ],
)
def test_the_id_of_a_repo_has_its_kind_in_front_unless_that_is_a_model(folder: str, full: str) -> None:
    assert hfcache.full_id(folder) == full


@pytest.mark.parametrize("ending", ["", ".incomplete", ".0123abcd.incomplete"])
def test_a_blob_and_its_partial_file_of_any_release_have_one_lock(ending: str) -> None:
    assert hfcache.lock_name(f"{'e' * 64}{ending}") == f"{'e' * 64}.lock"


def test_a_file_outside_lfs_keeps_its_etag_in_the_tree_whose_format_is_the_first() -> None:
    model = user_model(files=(File("a.json", 2, 10, "e" * 40),), commit="c" * 40)
    tree = json.loads(dict(hfcache.linked_repo(model).parts.files)[f"trees/{'c' * 40}.json"])
    assert tree == {"format_version": 1, "files": {"a.json": {"size": 2, "blob_id": "e" * 40}}}
