"""The overlay is one plain cache that holds what wins: each read call of huggingface_hub answers the same on both.

Folders and caches are drawn; what should win is written by hand into a plain cache (`lay_expected`), without a line
of the overlay's code; a release of huggingface_hub reads both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_overlay
import pytest
from hypothesis import Phase, given, settings

from tests.overlay.parity.compared import answers, assert_parity, overlay_commits
from tests.overlay.parity.disk import Place, lay_expected
from tests.overlay.parity.drawn import EXTRAS, RAISING, RELEASES, REPORTED, WORLDS, Custom, Fault, World
from tests.support import hubs
from tests.support.folders import temporary_folder
from tests.support.hfcache import add_repo, etag, listing
from tests.support.reader import Call, Reader


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    top = tmp_path_factory.mktemp("places")

    @contextmanager
    def make() -> Iterator[Place]:
        with temporary_folder(top) as folder:
            yield Place(folder)

    return make


# Not shrunk: that takes minutes, and the message names the call that differs.
@pytest.mark.mlx_lm
@settings(max_examples=30, phases=[Phase.reuse, Phase.generate])
@given(WORLDS, RELEASES)
def test_every_read_call_gives_what_one_plain_cache_gives(
    place: Callable[[], Any], readers: Mapping[str, Reader], world: World, release: str
) -> None:
    with place() as here:
        here.lay(world)
        with hf_overlay.open_session(
            here.roots, kind="any" if world.all_kinds else "mlx", environ=here.environ
        ) as session:
            assert_parity(session, here, world, readers[release])
        assert not list((here.top / "sessions").glob("session-*"))


@pytest.mark.mlx_lm
@settings(max_examples=10, phases=[Phase.reuse, Phase.generate])
@given(WORLDS, WORLDS, RELEASES)
def test_a_refresh_gives_what_one_plain_cache_gives(
    place: Callable[[], Any], readers: Mapping[str, Reader], before: World, after: World, release: str
) -> None:
    after = replace(after, all_kinds=before.all_kinds)
    with place() as here:
        here.lay(before)
        with hf_overlay.open_session(
            here.roots, kind="any" if before.all_kinds else "mlx", environ=here.environ
        ) as session:
            here.lay(after)
            session.refresh()
            assert_parity(session, here, after, readers[release])


def looping_file(repo: Path, snapshot: Path) -> None:
    (snapshot / "loop.bin").symlink_to("loop.bin")


def looping_ref(repo: Path, snapshot: Path) -> None:
    (repo / "refs/loop").symlink_to("loop")


def looping_revision(repo: Path, snapshot: Path) -> None:
    (repo / "snapshots" / ("f" * 40)).symlink_to("f" * 40)


def looping_snapshots(repo: Path, snapshot: Path) -> None:
    shutil.rmtree(repo / "snapshots")
    (repo / "snapshots").symlink_to("snapshots")


FAULTS = (
    REPORTED
    | RAISING
    | {fault.__name__: fault for fault in (looping_file, looping_ref, looping_revision, looping_snapshots)}
)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_fault_of_a_cached_repo_makes_a_scan_fail_or_hides_another(
    place: Callable[[], Any], readers: Mapping[str, Reader], fault: Fault
) -> None:
    with place() as here:
        add_repo(here.hub, "acme/whole", {"config.json": b'{"model_type": "llama"}'})
        for name in ("models--acme--broken", "datasets--acme--broken", "spaces--broken", "models--"):
            snapshot = add_repo(here.hub, "acme/to-break", {"config.json": b'{"model_type": "llama"}'})
            fault(snapshot.parents[1], snapshot)
            snapshot.parents[1].rename(here.hub / name)
        with hf_overlay.open_session([], environ=here.environ) as session:
            for release, reader in readers.items():
                asked: list[Call] = [("scan", {}), ("snapshot", {"repo_id": "acme/whole"})]
                ours = answers(reader, session.hub_cache, asked, {}, here.hub)
                plain = answers(reader, here.hub, asked, {}, here.hub)
                assert "raises" not in ours[0], f"P8: a scan fails with huggingface_hub {release}"
                assert "acme/whole" in [repo["id"] for repo in ours[0]["repos"]], "P7: another repo is hidden"
                assert ours[1] == plain[1], "P7: another repo does not load"
                if fault in REPORTED.values():
                    assert ours[0] == plain[0], f"the plain cache is read with huggingface_hub {release}"


@pytest.mark.parametrize("ref", ["odd", "refs/pr/1"])
def test_a_cached_repo_is_left_out_and_back_as_it_breaks_and_is_repaired(
    place: Callable[[], Any], readers: Mapping[str, Reader], ref: str
) -> None:
    """What a refresh shows follows from the disk alone (P5), and a fault is over when it is repaired (P7)."""
    with place() as here:
        refs = ("main", "refs/pr/2")
        repo = add_repo(here.hub, "acme/tiny", {"config.json": b"{}"}, refs=refs).parents[1]
        with hf_overlay.open_session([], environ=here.environ) as session:
            for broken in (False, True, False, True):
                if broken:
                    (repo / "refs" / ref).write_bytes(b"\xff\xfe")
                else:
                    (repo / "refs" / ref).unlink(missing_ok=True)
                session.refresh()
                (found,) = readers[hubs.INSTALLED].read(session.hub_cache, [("scan", {})])
                assert "raises" not in found, "P8: a repo that broke while a session was open makes scans fail"
                assert [each["id"] for each in found["repos"]] == ([] if broken else ["acme/tiny"])


def test_a_model_from_the_hub_has_the_hubs_blob_ids_in_its_tree(
    place: Callable[[], Any], readers: Mapping[str, Reader]
) -> None:
    """For a file in LFS that is the pointer's git id; its sha256 is another field."""
    with place() as here:
        model = Custom("acme/tiny", "llama", "folder", "yes", frozenset(EXTRAS), False, False, (), 0)
        world = World(([model], []), [], frozenset())
        here.lay(world)
        lay_expected(here.top / "plain", here, world)
        with hf_overlay.open_session(here.roots, environ=here.environ) as session:
            for release, reader in readers.items():
                asked: list[Call] = [("tree", {"repo_id": "acme/tiny"})]
                ours, plain = reader.read(session.hub_cache, asked), reader.read(here.top / "plain", asked)
                assert ours == plain, f"with huggingface_hub {release}"


@pytest.mark.parametrize("is_settled", [False, True], ids=["new files", "old files"])
def test_a_newer_commit_of_the_same_files_is_shown_by_a_refresh(place: Callable[[], Any], is_settled: bool) -> None:
    """`hf download --local-dir` writes it into its metadata alone when none of the files differ (P2, P5)."""
    with place() as here:
        model = Custom("acme/tiny", "llama", "folder", "yes", frozenset(), False, is_settled, (), 0)
        here.lay(World(([model], []), [], frozenset()))
        download = here.roots[0] / "acme/tiny/.cache/huggingface/download"
        with hf_overlay.open_session(here.roots, environ=here.environ) as session:
            before = overlay_commits(session.hub_cache, {"acme/tiny": ""})
            assert before == {"acme/tiny": model.commit("drive")}
            for metadata in download.iterdir():
                metadata.write_text(metadata.read_text().replace(before["acme/tiny"], "c" * 40))
            session.refresh()
            assert overlay_commits(session.hub_cache, before) == {"acme/tiny": "c" * 40}


def test_payloads_in_the_shared_blob_store_are_read(place: Callable[[], Any], readers: Mapping[str, Reader]) -> None:
    """The store itself is not part of an overlay; repos lead into it by links of their own."""
    with place() as here:
        snapshot = add_repo(here.hub, "acme/tiny", {"config.json": b"{}", "model.safetensors": b"weights"}, tree=True)
        store = here.hub / "blobs" / "ab" / ("ab" * 32)
        store.parent.mkdir(parents=True)
        (here.hub / "blobs/.huggingface-shared-blobs").write_text("1\n")
        blob = snapshot.parents[1] / "blobs" / etag("model.safetensors", b"weights")
        blob.rename(store)
        blob.symlink_to(os.path.relpath(store, blob.parent))
        before = listing(here.hub)
        with hf_overlay.open_session([], environ=here.environ) as session:
            asked: list[Call] = [("scan", {}), ("snapshot", {"repo_id": "acme/tiny"})]
            asked += [("file", {"repo_id": "acme/tiny", "filename": "model.safetensors"})]
            for release, reader in readers.items():
                ours = answers(reader, session.hub_cache, asked, {}, here.hub)
                plain = answers(reader, here.hub, asked, {}, here.hub)
                assert ours[0]["repos"] == plain[0]["repos"], f"with huggingface_hub {release}"
                assert set(ours[0]["warnings"]) <= set(plain[0]["warnings"])
                assert ours[1:] == plain[1:], f"with huggingface_hub {release}"
        assert listing(here.hub) == before
