"""Files that several repos have are kept once where the user's cache has the store of huggingface_hub 2 (P3, P4)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.folders import weights
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.online import Person, at_a_shell, contents

ONE, TWO, ALONE = "org/one", "org/two", "org/alone"
WEIGHTS = weights(b"the same in both")
ETAG = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS}
OLDER = {"config.json": b"{}", "model.safetensors": weights(b"an earlier revision, in the tier")}
# The Hub of these tests names Xet hashes, and sends files otherwise.
XET = {"HF_HUB_DISABLE_XET": ""}
BY_HTTP = ("env", "HF_HUB_DISABLE_XET=1")


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    with at_a_shell(tmp_path) as person:
        for repo_id in (ONE, TWO):
            person.hub.add_repo(repo_id, FILES, xet=True)
        person.hub.add_repo(ALONE, {**FILES, "config.json": b"alone"})
        yield person


def have_a_store(cache: Path) -> None:
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs/.huggingface-shared-blobs").write_text("1\n")


def blob(person: Person, repo_id: str) -> Path:
    return person.cache / repo_folder(repo_id) / "blobs" / ETAG


@pytest.mark.parametrize("has_tier", [False, True], ids=["without a tier", "with a tier"])
def test_two_repos_with_the_same_file_have_one_blob_when_they_are_home(person: Person, has_tier: bool) -> None:
    """One was fetched as a snapshot, of which the client listed the files, and one file by file."""
    have_a_store(person.cache)
    options: tuple[str, ...] = ()
    if has_tier:
        tier = person.home.parent / "tier"
        for repo_id in (ONE, TWO):
            add_repo(tier, repo_id, OLDER)
        before = listing(tier)
        options = ("--below", str(tier))
    with person.client(options=options, before=BY_HTTP, **XET) as client:
        assert contents(client.get("snapshot_download", ONE)) == FILES
    shared = blob(person, ONE).resolve()
    assert shared.parents[1] == person.cache / "blobs"
    with person.client(options=options, before=BY_HTTP, **XET) as client:
        for name, content in FILES.items():
            assert Path(client.get("hf_hub_download", TWO, name)).read_bytes() == content
        client.get("snapshot_download", ALONE)
    assert blob(person, TWO).resolve() == shared
    assert os.readlink(blob(person, TWO)) == os.path.relpath(shared, blob(person, TWO).parent)
    assert shared.stat().st_nlink == 1
    assert not blob(person, ALONE).is_symlink(), "of which the Hub named no Xet hash"
    names = [f"{repo_folder(repo_id)}/blobs/{ETAG}" for repo_id in (ONE, TWO)]
    assert Path(f"{shared}.refs").read_text().splitlines() == names
    with person.offline_client() as alone:  # huggingface_hub takes it for its own
        for repo_id in (ONE, TWO):
            assert contents(alone.get("snapshot_download", repo_id)) == FILES
            where = "huggingface_hub.utils._shared_blobs.shared_blob_target"
            assert alone.get(where, str(blob(person, repo_id)), str(person.cache)) == str(shared)
        assert alone.get("scan_cache_dir")["warnings"] == []
    assert not has_tier or listing(tier) == before
