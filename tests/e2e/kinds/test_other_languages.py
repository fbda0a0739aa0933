"""Clients of the Hub in other languages find a user's model, and a tier's repo, in the cache's layout (P1, P2)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import aside
from tests.support.folders import lay_model, weights
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.online import Person, at_a_shell
from tests.support.permissions import as_a_user
from tests.support.processes import PYTHON

MINE = "acme/mine"
HELD = "org/held"
VOCABULARY = {"</s>": 0, "a": 1, "b": 2, "ab": 3}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_ENDS = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", **_ENDS}],
        "pre_tokenizer": _BYTES,
        "decoder": _BYTES,
        "model": {"type": "BPE", "vocab": VOCABULARY, "merges": ["a b"]},
    }
).encode()
WORDS = {"tokenizer.json": TOKENIZER, "generation_config.json": b'{"eos_token_id": 0}'}
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights(b"tier"), **WORDS}


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """Neither the user's folder nor the tier is changed, and the Hub, which has other files, sends none."""
    top = tmp_path_factory.mktemp("languages")
    with at_a_shell(top) as person:
        lay_model(person.models / MINE, {**WORDS, "sub/more.txt": b"more"}, settled=True)
        person.hub.add_repo(MINE, {**FILES, "theirs.txt": b"theirs"})
        tier = top / "shared" / "hub"
        add_repo(tier, HELD, FILES, commit=person.hub.add_repo(HELD, FILES))
        before = listing(person.models), listing(tier)
        yield person
        assert (listing(person.models), listing(tier)) == before, "P1: the user's folder, or the tier, was changed"
        assert person.asked_about(MINE) == [], "P2: the Hub was asked"
        assert person.hub.bytes_served(HELD) == 0, "P2: what the tier holds was fetched"
        assert not (person.cache / repo_folder(MINE)).exists()


def options(person: Person) -> tuple[str, ...]:
    return ("--below", str(person.home.parent / "shared/hub"), "--quiet")


# JavaScript -------------------------------------------------------------------------------------------------------

# It takes the Hub's address as an argument, and no variable.
_JAVASCRIPT = """
const { downloadFileToCacheDir, scanCacheDir, snapshotDownload } = await import(process.argv[1]);
const [repo, ...revision] = process.argv.slice(2);
const hub = { repo, hubUrl: process.env.HF_ENDPOINT, ...(revision.length && { revision: revision[0] }) };
const file = await downloadFileToCacheDir({ ...hub, path: "model.safetensors" });
const snapshot = await snapshotDownload(hub);
const { repos, warnings } = await scanCacheDir();
const ids = repos.map((each) => each.id.name);
console.log(JSON.stringify({ file, snapshot, repos: ids, warnings: warnings.map(String) }));
"""


@pytest.mark.parametrize(("repo_id", "revision"), [(MINE, ()), (MINE, ("HEAD",)), (HELD, ())])
def test_javascript(person: Person, repo_id: str, revision: tuple[str, ...]) -> None:
    """@huggingface/hub: one file, a snapshot, and a scan. It writes the ref that it asked for, whatever that holds."""
    module = aside.need_node("@huggingface/hub") / "dist" / "index.mjs"
    program = ("node", "--input-type=module", "-e", _JAVASCRIPT, "--", str(module), repo_id, *revision)
    said = json.loads(person.succeed(*as_a_user(), *program, options=options(person)).lines()[-1])
    assert said["warnings"] == []
    assert sorted(said["repos"]) == sorted([MINE, HELD])
    assert f"/{repo_folder(repo_id)}/" in said["file"]


# Rust: hf-hub 1.0 -------------------------------------------------------------------------------------------------

# What it does for a file, as its source has it (repository/download.rs, cache/storage.rs): it always writes the ref,
# and makes the link in the snapshot once more.
_FINALIZED = """
import os, sys
from pathlib import Path
from urllib.request import Request, urlopen
repo_id, revision, name = sys.argv[1:]
repo = Path(os.environ["HF_HUB_CACHE"], "models--" + repo_id.replace("/", "--"))
asked = Request(f"{os.environ['HF_ENDPOINT']}/{repo_id}/resolve/{revision}/{name}", method="HEAD")
with urlopen(asked, timeout=60) as answer:
    etag, commit = answer.headers["X-Linked-ETag"].strip('"'), answer.headers["X-Repo-Commit"]
blob, pointer = repo / "blobs" / etag, repo / "snapshots" / commit / name
assert blob.exists(), "it would be downloaded"
(repo / "refs").mkdir(exist_ok=True)
(repo / "refs" / revision).write_text(commit)
pointer.unlink()
pointer.symlink_to(os.path.relpath(blob, pointer.parent))
print(pointer.read_bytes().hex())
"""


@pytest.mark.parametrize("revision", ["main", "HEAD"])
def test_hf_hub_of_rust_writes_the_ref_and_the_link_of_a_file_that_it_found(person: Person, revision: str) -> None:
    program = (*as_a_user(), PYTHON, "-c", _FINALIZED, MINE, revision, "sub/more.txt")
    assert person.succeed(*program, options=options(person)).out == f"{b'more'.hex()}\n"


# Rust: before 1.0 -------------------------------------------------------------------------------------------------

# outlines-core has hf-hub 0.4 get what it needs. That looks for its cache in HF_HOME, or, depending on the call, in the
# user's home, and in no other variable.
_RUST = """
from outlines_core import Vocabulary
print(len(Vocabulary.from_pretrained(sys.argv[1])))
"""
_IN_THE_OVERLAY = """
export HF_HOME="${HF_HUB_CACHE%/hub}" HOME="$1"
mkdir -p "$HOME/.cache" && ln -sfn "$HF_HOME" "$HOME/.cache/huggingface"
shift && exec "$@"
"""


@pytest.mark.parametrize("repo_id", [MINE, HELD])
def test_hf_hub_of_rust_finds_files_where_its_home_is_the_overlays(
    person: Person, repo_id: str, tmp_path: Path
) -> None:
    aside.need("outlines_core")
    program = (PYTHON, "-c", aside.START + _RUST, repo_id)
    done = person.succeed("sh", "-c", _IN_THE_OVERLAY, "sh", str(tmp_path), *program, options=options(person))
    assert done.out == f"{len(VOCABULARY)}\n"
    assert not person.cache.exists() or not list(person.cache.rglob("tokenizer.json"))
