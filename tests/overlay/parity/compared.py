"""The read calls of huggingface_hub that are asked of the overlay and of a plain cache, and how answers compare."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hf_overlay

from tests.overlay.parity.disk import Place, lay_expected, winners
from tests.overlay.parity.drawn import World
from tests.support.hfcache import repo_folder
from tests.support.reader import Call, Reader


def calls(world: World) -> list[Call]:
    """Every read call for every repo there might be, by name and by commit."""
    asked: list[Call] = [("scan", {})]
    for repo_type, repo_id in repos(world):
        repo = {"repo_id": repo_id, "repo_type": repo_type}
        for revision in [None, "v1", "refs/pr/1", *commits_of(world, repo_type, repo_id)]:
            at = repo | {"revision": revision}
            asked += [("snapshot", at), ("tree", at), ("snapshot", at | {"allow_patterns": ["*.json"]})]
            for name in ("config.json", "nested/deep/file.txt", "no such.json", "absent.txt"):
                asked += [("file", at | {"filename": name}), ("cached", at | {"filename": name})]
    return asked


def repos(world: World) -> list[tuple[str, str]]:
    found = {("model", custom.id) for root in world.roots for custom in root}
    found |= {(cached.type, cached.id) for cached in world.cached}
    return [*sorted(found), ("model", "not/there"), ("dataset", "acme/tiny")]


def commits_of(world: World, repo_type: str, repo_id: str) -> list[str]:
    """Commits that people could know: of cached repos, even of those that a user's model hides."""
    return [
        cached.commit(revision)
        for cached in world.cached
        if (cached.type, cached.id) == (repo_type, repo_id)
        for revision in range(cached.revisions)
    ]


def answers(reader: Reader, cache: Path, asked: Sequence[Call], commits: Mapping[str, str], real: Path) -> list[Any]:
    """What a cache answers, with names in place of the commits that differ and of the real cache's place."""
    said = json.dumps(reader.read(cache, asked), ensure_ascii=False).replace(str(real), "<cache>")
    for model_id, commit in commits.items():
        said = said.replace(commit, f"<commit of {model_id}>")
    found = json.loads(said)
    assert isinstance(found, list)
    return found


def without_blob_ids(answer: Any) -> Any:
    """A tree's sizes alone: blob ids are made up where nothing tells the Hub's."""
    return {name: size for name, (size, _) in answer.items()} if answer and "raises" not in answer else answer


def differences(ours: Any, theirs: Any, where: str = "") -> str:
    """Where two answers differ, a line each."""
    if ours == theirs:
        return ""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return "".join(differences(ours[key], theirs[key], f"{where}.{key}") for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        only = [each for each in ours if each not in theirs], [each for each in theirs if each not in ours]
        return f"{where}: {only[0]} != {only[1]}\n"
    return f"{where}: {ours} != {theirs}\n"


def overlay_commits(hub: Path, commits: Mapping[str, str]) -> dict[str, str]:
    found = {model_id: (hub / repo_folder(model_id) / "refs/main").read_text() for model_id in commits}
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in found.values()), "a commit is 40 hex digits"
    assert len(set(found.values())) == len(found), "no two repos have one commit"
    return found


def assert_parity(session: hf_overlay.Session, place: Place, world: World, reader: Reader) -> None:
    plain = Path(tempfile.mkdtemp(dir=place.top)) / "plain"
    expected_commits = lay_expected(plain, place, world)
    hub = session.hub_cache
    commits = overlay_commits(hub, expected_commits)
    for model_id, (custom, root) in winners(world).items():
        if model_id in commits:
            assert (commits[model_id] == custom.commit(root)) == custom.is_identified, "the Hub's where it is proven"
    asked = calls(world)
    found = answers(reader, hub, asked, commits, place.hub)
    expected = answers(reader, plain, asked, expected_commits, place.hub)
    for call, ours, theirs in zip(asked, found, expected, strict=True):
        if call[0] == "tree":
            ours, theirs = without_blob_ids(ours), without_blob_ids(theirs)
        assert ours == theirs, f"{call}: overlay != plain cache:\n{differences(ours, theirs)}"
    # P8: whatever else lies in the real cache.
    assert "raises" not in found[0]
    (real,) = answers(reader, place.hub, [("scan", {})], {}, place.hub)
    if "raises" not in real:
        assert set(found[0]["warnings"]) <= set(real["warnings"])
