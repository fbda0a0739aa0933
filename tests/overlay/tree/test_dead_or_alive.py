"""P3: a session counts as dead only where that is proven; what cannot be proven is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hf_overlay.config import OWNER_FILE, Settings
from hf_overlay.tree import lease

from tests.support.permissions import respected

_SETTINGS = Settings(roots=(), hub_cache="/hub", hf_home="/home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A session's folder without an owner's file."""
    path = tmp_path / "session-1-1"
    path.mkdir()
    return path


def is_dead(folder: Path) -> bool:
    with lease.dead(str(folder.parent), str(folder)) as answer:
        return answer


@pytest.mark.parametrize("name", ["hubs/1/models--org--m/blobs/x", "home/token", "made", ".hidden"])
def test_a_folder_with_content_and_no_owner_is_not_dead(folder: Path, name: str) -> None:
    """Nobody can say whose it is, and it may hold a download."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert not is_dead(folder)
    assert (folder / name).read_bytes() == b"x"


def test_an_empty_folder_whose_owner_died_before_the_lock_is_dead(folder: Path) -> None:
    assert is_dead(folder)


def test_a_folder_that_is_gone_is_nobody_s_to_clear(folder: Path) -> None:
    folder.rmdir()
    assert not is_dead(folder)


def test_a_folder_whose_lock_nobody_holds_is_dead_whatever_is_in_it(folder: Path) -> None:
    (folder / OWNER_FILE).write_text("{}")
    (folder / "hubs").mkdir()
    assert is_dead(folder)


def test_a_lease_lives_until_the_last_who_holds_it_lets_go(tmp_path: Path) -> None:
    owner = lease.Lease.acquire(str(tmp_path), _SETTINGS)
    child = os.dup(owner.fd)  # as a program that was started with it
    try:
        assert not is_dead(Path(owner.path))
        owner.release()
        assert not is_dead(Path(owner.path)), "a child still holds the lease"
    finally:
        os.close(child)
    assert is_dead(Path(owner.path))


def test_while_one_looks_at_a_dead_folder_no_other_may(folder: Path) -> None:
    (folder / OWNER_FILE).write_text("{}")
    with lease.dead(str(folder.parent), str(folder)) as mine:
        assert mine
        assert not is_dead(folder)
    assert is_dead(folder)


def test_a_folder_that_cannot_be_looked_at_is_not_dead(folder: Path) -> None:
    (folder / OWNER_FILE).write_text("{}")
    (folder / OWNER_FILE).chmod(0)
    with respected():
        assert not is_dead(folder)


def test_a_folder_that_holds_more_than_its_owner_s_file_is_not_removed(folder: Path) -> None:
    (folder / OWNER_FILE).write_text("{}")
    (folder / "download").write_bytes(b"x")
    with pytest.raises(OSError, match="not empty"):
        lease.remove(str(folder))
    assert sorted(os.listdir(folder)) == [OWNER_FILE, "download"], "without its file nobody could prove it dead"
    (folder / "download").unlink()
    lease.remove(str(folder))
    assert not folder.exists()


def test_an_owner_is_read_as_it_was_written(tmp_path: Path) -> None:
    owner = lease.Lease.acquire(str(tmp_path), _SETTINGS._replace(roots=("/a", "/b")))
    owner.record(_SETTINGS._replace(roots=("/a",) * 40), {"A": "1"})
    owner.record(_SETTINGS._replace(roots=("/c",)), {"HF_HUB_CACHE": "/x", "GONE": None})
    found = lease.read_owner(owner.path)
    owner.release()
    assert found is not None, "the longer record before it was not cut off"
    assert (found.pid, list(found.sources), found.hub_cache) == (os.getpid(), ["/c"], "/hub")
    assert found.service == {"HF_HUB_CACHE": "/x", "GONE": None}
    lease.remove(owner.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"pid": 1}', '{"pid": 1, "of_a_later_release": 2}'])
def test_an_owner_s_file_that_says_nothing_we_know_names_nobody(content: str, folder: Path) -> None:
    """Its session can be cleared all the same."""
    (folder / OWNER_FILE).write_text(content)
    assert lease.read_owner(str(folder)) is None
    assert is_dead(folder)


def test_a_session_without_an_owner_s_file_names_nobody(folder: Path) -> None:
    assert lease.read_owner(str(folder)) is None
