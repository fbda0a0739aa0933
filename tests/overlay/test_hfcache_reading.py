"""The cache's layout as it is read: the main commit, what makes scans raise, and what `--local-dir` recorded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hf_overlay import hfcache, records

from tests.support.hfcache import add_repo

COMMIT, OTHER = "c" * 40, "d" * 40
ETAG = "e" * 64


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """With COMMIT as its main revision."""
    return add_repo(tmp_path, "org/name", {"config.json": b"{}"}, commit=COMMIT).parents[1]


def why_no_main(repo: Path, *, any_single: bool = False) -> str:
    with pytest.raises(hfcache.NoSnapshot) as refused:
        hfcache.main_commit(str(repo), any_single=any_single)
    return str(refused.value)


def test_main_is_the_commit_in_its_ref(repo: Path) -> None:
    assert hfcache.main_commit(str(repo), any_single=False) == COMMIT


def test_a_commit_may_have_64_characters(tmp_path: Path) -> None:
    repo = add_repo(tmp_path, "org/name", {"config.json": b"{}"}, commit="f" * 64).parents[1]
    assert hfcache.main_commit(str(repo), any_single=False) == "f" * 64


@pytest.mark.parametrize("text", ["", ".", "..", "../blobs", "a/b", "a\0b"])
def test_a_ref_that_would_lead_elsewhere_names_no_commit(repo: Path, text: str) -> None:
    (repo / "refs/main").write_text(text)
    assert "names no commit" in why_no_main(repo)


def test_a_ref_to_a_revision_that_is_not_there_is_told_from_one_that_is(repo: Path) -> None:
    (repo / "refs/main").write_text(OTHER)
    assert f"({OTHER[:12]})" in why_no_main(repo)
    (repo / "refs/main").write_bytes(b"\xff\xfe")
    assert "not text" in why_no_main(repo)


def test_without_main_the_only_revision_is_taken_where_that_is_asked_for(repo: Path) -> None:
    (repo / "refs/main").unlink()
    assert hfcache.main_commit(str(repo), any_single=True) == COMMIT
    assert "1 revision by commit only" in why_no_main(repo)
    (repo / "snapshots" / OTHER).mkdir()
    assert "2 revisions by commit only" in why_no_main(repo, any_single=True)


def test_refs_of_pull_requests_are_watched_where_there_are_folders_of_refs(repo: Path) -> None:
    flat = hfcache.watched_by_examine(str(repo))
    assert flat == (f"{repo}/refs", f"{repo}/snapshots")
    (repo / "refs/refs/pr").mkdir(parents=True)
    assert hfcache.watched_by_examine(str(repo)) == (*flat, f"{repo}/refs/refs", f"{repo}/refs/refs/pr")
    assert hfcache.watched_by_examine(f"{repo}-none") == (f"{repo}-none/refs", f"{repo}-none/snapshots")


@pytest.mark.parametrize("folder", ["snapshots", "blobs"])
def test_a_folder_that_may_not_be_entered_is_a_problem(
    repo: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, modes stop nobody: the refusal is put into os.stat."""
    assert hfcache.examine(str(repo)) == ((COMMIT,), None)
    real = os.stat

    def stat_of(path: str, **options: bool) -> os.stat_result:
        if str(path) == f"{repo}/{folder}/.":
            raise PermissionError(13, "Permission denied", path)
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat_of)
    assert hfcache.examine(str(repo)).problem is not None


def test_a_revision_that_is_a_broken_link_is_a_problem(repo: Path) -> None:
    (repo / "snapshots" / OTHER).symlink_to("nowhere")
    assert hfcache.examine(str(repo)) == ((), f"snapshots/{OTHER} is a broken link")


def test_a_file_that_links_to_itself_is_a_problem(repo: Path) -> None:
    (repo / "snapshots" / COMMIT / "loop").symlink_to("loop")
    assert hfcache.examine(str(repo)) == ((), f"snapshots/{COMMIT}/loop is a link to itself")


def test_a_ref_that_is_not_text_is_a_problem_but_not_in_ds_store(repo: Path) -> None:
    (repo / "refs/.DS_Store").write_bytes(b"\xff\xfe")
    assert hfcache.examine(str(repo)).problem is None
    (repo / "refs/dev").write_bytes(b"\xff\xfe")
    assert hfcache.examine(str(repo)).problem is not None


def record(
    folder: Path, name: str, commit: str = COMMIT, etag: str = ETAG, saved: float = 1_700_000_000
) -> dict[str, int]:
    """Write what `hf download --local-dir` does for a file; the file itself is as old as its record."""
    path = folder / f".cache/huggingface/download/{name}.metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{commit}\n{etag}\n{saved}\n")
    return {name: int(saved * 1e9)}


def identity(folder: Path, mtimes_ns: dict[str, int]) -> object:
    return records.local_dir_identity(str(folder), mtimes_ns)


def test_a_local_dir_has_the_commit_and_etags_of_its_records(tmp_path: Path) -> None:
    times = record(tmp_path, "config.json") | record(tmp_path, "sub/weights.safetensors", etag="f" * 40)
    assert identity(tmp_path, times) == (COMMIT, {"config.json": ETAG, "sub/weights.safetensors": "f" * 40})
    assert identity(tmp_path, times | {"more.txt": 0}) is None, "a file without a record"
    assert identity(tmp_path, {}) is None


def test_records_of_two_commits_are_no_identity(tmp_path: Path) -> None:
    assert identity(tmp_path, record(tmp_path, "a") | record(tmp_path, "b", commit=OTHER)) is None


@pytest.mark.parametrize(("commit", "etag"), [("main", ETAG), ("", ETAG), (COMMIT, "weak"), (COMMIT, "")])
def test_a_record_that_is_not_of_a_commit_and_an_etag_proves_nothing(tmp_path: Path, commit: str, etag: str) -> None:
    assert identity(tmp_path, record(tmp_path, "config.json", commit, etag)) is None


def test_a_file_written_over_a_second_after_its_record_is_another(tmp_path: Path) -> None:
    ((name, written),) = record(tmp_path, "config.json").items()
    second = 10**9
    assert identity(tmp_path, {name: written + second // 2}) is not None
    assert identity(tmp_path, {name: written + 2 * second}) is None


def test_a_blobs_name_is_an_etag_only_if_it_looks_like_one(repo: Path) -> None:
    file = repo / "snapshots" / COMMIT / "config.json"
    assert records.blob_name(str(file)) == os.path.basename(os.readlink(file))
    (file.parent / "plain").touch()
    (file.parent / "odd").symlink_to("../../blobs/odd")
    assert records.blob_name(str(file.parent / "plain")) is None
    assert records.blob_name(str(file.parent / "odd")) is None
