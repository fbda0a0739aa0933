"""Repos whose blobs are in huggingface_hub 2's shared store are read wherever they are, and the store stays (P1, P8).

Each is read as from a cache of its own; the user's own cache has a test in test_parity.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import hf_overlay
import pytest

from tests.overlay.parity.compared import answers
from tests.overlay.parity.disk import Place
from tests.support import hubs
from tests.support.folders import weights
from tests.support.hfcache import add_repo, listing, repo_folder, share_blobs
from tests.support.reader import Call, Reader

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights(b"shared"), "tokenizer.json": b"{}"}
NEWER = {**FILES, "config.json": b'{"model_type": "llama", "newer": true}'}
BOTH = ("acme/one", "acme/two")
"""Two models with the same weights."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another cache than the user's own, in which both models share their weights."""
    hub = tmp_path / "other" / "hub"
    for model_id in BOTH:
        add_repo(hub, model_id, FILES, tree=True)
    share_blobs(hub, *map(repo_folder, BOTH))
    assert len([path for path in hub.glob("blobs/??/*") if len(path.name) == 64]) == 1
    return hub


ASKED: list[Call] = [
    *(("snapshot", {"repo_id": model_id}) for model_id in BOTH),
    *(("file", {"repo_id": model_id, "filename": "model.safetensors"}) for model_id in BOTH),
]


@pytest.mark.parametrize("layer", ["a tier", "a tier beside the own cache", "a model path"])
def test_they_are_read_from_another_cache(place: Place, other: Path, readers: Mapping[str, Reader], layer: str) -> None:
    if layer == "a tier beside the own cache":
        add_repo(place.hub, "acme/one", NEWER, refs=("newer",))
        share_blobs(place.hub, "models--acme--one")
        before = listing(place.hub)
    roots, below = ([other], []) if layer == "a model path" else ([], [other])
    shared = listing(other)
    with hf_overlay.open_session(roots, below=below, environ=place.environ) as session:
        for release in ("0.36.2", hubs.INSTALLED):
            reader = readers[release]
            [scanned] = reader.read(session.hub_cache, [("scan", {})])
            assert scanned["warnings"] == [], f"with huggingface_hub {release}"
            assert [repo["id"] for repo in scanned["repos"]] == list(BOTH)
            found = answers(reader, session.hub_cache, ASKED, {}, session.hub_cache)
            assert found == answers(reader, other, ASKED, {}, other), f"with huggingface_hub {release}"
        assert not (session.hub_cache / "blobs").exists(), "the store itself is no part of an overlay"
        assert {Path(model.path).parents[1].name for model in session.models} == set(map(repo_folder, BOTH))
    assert listing(other) == shared, "P1: the shared store was changed"
    if layer == "a tier beside the own cache":
        assert listing(place.hub) == before
