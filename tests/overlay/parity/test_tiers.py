"""The own cache and two tiers are one plain cache that holds the union: each read call answers the same on both.

Who holds which files of which revisions is drawn; the union is written by hand into a plain cache.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import hf_overlay
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.overlay.parity.compared import answers, differences
from tests.overlay.parity.disk import Place
from tests.overlay.parity.drawn import RELEASES, Fault
from tests.overlay.parity.test_parity import FAULTS
from tests.support import hubs
from tests.support.folders import lay_model, temporary_folder, weights
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.reader import Call, Reader

RepoType = Literal["model", "dataset", "space", "kernel"]
NAMES: Sequence[tuple[RepoType, str]] = (("model", "acme/tiny"), ("dataset", "acme/tiny"), ("space", "solo"))
KERNEL: tuple[RepoType, str] = ("kernel", "acme/fast")
REFS = ("main", "v1", "refs/pr/1")
ABSENT = "no such.json"


def revision(name: tuple[RepoType, str], number: int) -> dict[str, bytes]:
    """All files of one revision; some are the same in each."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": weights(f"{name} {number}".encode()),
        "nested/deep/file.txt": b"nested",
        "odd é.txt": f"{number // 2}".encode(),
    }


def commit(name: tuple[RepoType, str], number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


@dataclass(frozen=True)
class Part:
    """What one cache holds of one repo."""

    name: tuple[RepoType, str]
    revisions: Mapping[int, frozenset[str]]
    """Number -> names of the files."""
    refs: Mapping[str, int]
    trees: frozenset[int]
    """The revisions whose listing is there."""
    absent: frozenset[int]
    """The revisions of which it is known that a file is not there."""


PARTS = st.sampled_from([*NAMES, KERNEL]).flatmap(
    lambda name: st.builds(
        Part,
        name=st.just(name),
        revisions=st.dictionaries(
            st.integers(0, 2), st.frozensets(st.sampled_from(sorted(revision(name, 0))), min_size=1), min_size=1
        ),
        refs=st.dictionaries(st.sampled_from(REFS), st.integers(0, 2), max_size=2),
        trees=st.frozensets(st.integers(0, 2)),
        absent=st.frozensets(st.integers(0, 2)),
    )
)
HELD = st.lists(PARTS, max_size=3, unique_by=lambda part: part.name)
"""What one cache holds."""


def without_dead_refs(parts: Sequence[Part], all_parts: Sequence[Part]) -> list[Part]:
    """Parts whose refs lead to revisions that any of the caches has."""
    known = {(part.name, number) for part in all_parts for number in part.revisions}
    return [
        replace(part, refs={ref: number for ref, number in part.refs.items() if (part.name, number) in known})
        for part in parts
    ]


def lay(hub: Path, parts: Sequence[Part], scratch: Path) -> None:
    """Write parts into a cache."""
    hub.mkdir(parents=True, exist_ok=True)
    for part in parts:
        repo = hub / repo_folder(part.name[1], part.name[0])
        for number, files in part.revisions.items():
            sha = commit(part.name, number)
            contents = {name: content for name, content in revision(part.name, number).items() if name in files}
            absent = (ABSENT,) if number in part.absent else ()
            add_repo(hub, part.name[1], contents, repo_type=part.name[0], commit=sha, refs=(), no_exist=absent)
            if number in part.trees:
                whole = add_repo(
                    scratch, part.name[1], revision(part.name, number), repo_type=part.name[0], commit=sha, tree=True
                )
                (repo / "trees").mkdir(exist_ok=True)
                shutil.copy(whole.parents[1] / f"trees/{sha}.json", repo / "trees")
        for ref, number in part.refs.items():
            (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (repo / "refs" / ref).write_text(commit(part.name, number))


def calls() -> list[Call]:
    asked: list[Call] = [("scan", {})]
    for repo_type, repo_id in NAMES:
        repo = {"repo_id": repo_id, "repo_type": repo_type}
        for at in (None, *REFS, *(commit((repo_type, repo_id), number) for number in range(3))):
            of = repo | {"revision": at}
            asked += [("snapshot", of), ("tree", of), ("snapshot", of | {"allow_patterns": ["*.json"]})]
            for name in ("config.json", "nested/deep/file.txt", "odd é.txt", ABSENT):
                asked += [("file", of | {"filename": name}), ("cached", of | {"filename": name})]
    return asked


# Not shrunk: that takes minutes, and the message names the call that differs.
@settings(max_examples=8, phases=[Phase.reuse, Phase.generate])
@given(HELD, HELD, HELD, HELD, RELEASES)
def test_every_read_call_gives_what_one_cache_with_the_union_gives(
    readers: Mapping[str, Reader],
    own: Sequence[Part],
    first: Sequence[Part],
    second: Sequence[Part],
    later: Sequence[Part],
    release: str,
) -> None:
    """Also after a refresh, when the first tier has got more; and nothing in a tier has changed."""
    with temporary_folder() as folder:
        place = Place(folder)
        tiers = [place.top / "shared", place.top / "second"]
        all_parts = [*own, *first, *second]
        own, first, second = (without_dead_refs(parts, all_parts) for parts in (own, first, second))
        later = without_dead_refs(later, [*all_parts, *later])
        held = [(place.hub, own), *zip(tiers, (first, second), strict=True)]
        for hub, parts in held:
            lay(hub, parts, place.top / "scratch")
        before = [listing(tier) for tier in tiers]
        with hf_overlay.open_session([], below=tiers, kind="any", environ=place.environ) as session:
            compare(readers[release], session.hub_cache, place, held)
            assert [listing(tier) for tier in tiers] == before
            lay(tiers[0], later, place.top / "scratch")
            session.refresh()
            compare(readers[release], session.hub_cache, place, [*held[:1], (tiers[0], later), *held[1:]])


def complete(plain: Path, held: Sequence[tuple[Path, Sequence[Part]]]) -> None:
    """Add to revisions with a listing what it names and another revision has, where tiers hold anything more at all."""
    for name in (*NAMES, KERNEL):
        parts = [part for _, parts in held for part in parts if part.name == name]
        own = [part for part in held[0][1] if part.name == name]
        if facts(own) == facts(parts):
            continue
        there = {
            revision(name, number)[file] for part in parts for number, files in part.revisions.items() for file in files
        }
        for number in {number for part in parts for number in part.trees & part.revisions.keys()}:
            contents = {file: content for file, content in revision(name, number).items() if content in there}
            add_repo(plain, name[1], contents, repo_type=name[0], commit=commit(name, number), refs=())


def facts(parts: Sequence[Part]) -> set[tuple[str, object]]:
    """All that some parts of one repo hold together."""
    found: set[tuple[str, object]] = set()
    for part in parts:
        found |= {("file", (number, file)) for number, files in part.revisions.items() for file in files}
        found |= {("ref", ref) for ref in part.refs}
        found |= {("tree", number) for number in part.trees & part.revisions.keys()}
        found |= {("absent", number) for number in part.absent & part.revisions.keys()}
    return found


def compare(
    reader: Reader,
    overlay: Path,
    place: Place,
    held: Sequence[tuple[Path, Sequence[Part]]],
) -> None:
    plain = Path(tempfile.mkdtemp(dir=place.top)) / "plain"
    plain.mkdir()
    for _, parts in reversed(held):  # the refs of the first are written last
        lay(plain, parts, place.top / "scratch")
    complete(plain, held)
    asked = calls()
    ours = answers(reader, overlay, asked, {}, place.hub)
    theirs = answers(reader, plain, asked, {}, place.hub)
    for call, mine, expected in zip(asked, ours, theirs, strict=True):
        assert mine == expected, f"{call}: own cache + tiers != the union:\n{differences(mine, expected)}"


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_in_a_tier_makes_no_scan_fail_and_hides_nothing_else(
    tmp_path: Path, readers: Mapping[str, Reader], fault: Fault
) -> None:
    """P7, P8: what is broken is left out, of the repo in the tier and of one that the own cache has as well."""
    place = Place(tmp_path)
    tier = tmp_path / "shared"
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights(b"weights")}
    add_repo(tier, "acme/whole", files)
    own = add_repo(place.hub, "acme/both", files)
    for name in ("acme/both", "acme/broken"):
        snapshot = add_repo(tier, name, files | {"more.txt": b"more"})
        fault(snapshot.parents[1], snapshot)
    with hf_overlay.open_session([], below=[tier], environ=place.environ) as session:
        for release, reader in readers.items():
            scanned, whole, both = reader.read(
                session.hub_cache,
                [("scan", {}), ("snapshot", {"repo_id": "acme/whole"}), ("snapshot", {"repo_id": "acme/both"})],
            )
            assert "raises" not in scanned, f"P8: a scan fails with huggingface_hub {release}"
            assert scanned["warnings"] == [], f"with huggingface_hub {release}"
            assert "raises" not in whole
            assert both["path"].endswith(own.name)


def test_a_tier_may_be_a_whole_hf_home_or_hold_the_own_cache(tmp_path: Path, readers: Mapping[str, Reader]) -> None:
    place = Place(tmp_path)
    home = tmp_path / "shared"
    files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": weights(b"weights"),
        "tokenizer.json": b"{}",
    }
    add_repo(home / "hub", "acme/shared", files)
    lay_model(home / "datasets/acme/no-model-of-a-tier")
    add_repo(place.hub, "acme/own", files)
    with hf_overlay.open_session([], below=[home, place.hub.parent], environ=place.environ) as session:
        assert sorted(model.id for model in session.models) == ["acme/own", "acme/shared"]
        (found,) = readers[hubs.INSTALLED].read(session.hub_cache, [("scan", {})])
        assert sorted(repo["id"] for repo in found["repos"]) == ["acme/own", "acme/shared"]
        assert (session.hub_cache / "models--acme--own").readlink() == place.hub / "models--acme--own"
