"""P3: what a client holds a lock for is not moved under its hands, and no lock of ours is left behind."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hf_overlay.tree import usage
from hf_overlay.tree.writeback import bring_home

from tests.overlay.tree.test_writeback import CONFIG, MAIN, Dead
from tests.support.alone import check_stands_alone
from tests.support.hfcache import add_repo, etag

ETAG = "c" * 64
FOLDER = "models--org--m"


@pytest.fixture
def dead(tmp_path: Path) -> Dead:
    return Dead(tmp_path)


@contextmanager
def held(dead: Dead, name: str = ETAG) -> Iterator[Path]:
    """The lock that every release from 0.36 to 2.4 holds while it downloads what has that etag."""
    lock = dead.hub / ".locks" / FOLDER / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lock


def bring(dead: Dead) -> dict[str, str]:
    """Move what can be moved, whoever uses the tree."""
    (session,) = dead.left()
    return bring_home(str(session), str(dead.hub))


@pytest.mark.parametrize("is_new", [True, False], ids=["a new repo", "a repo that the cache has"])
@pytest.mark.parametrize("name", [ETAG, f"{ETAG}.incomplete", f"{ETAG}.1a2b3c4d.incomplete"])
def test_a_file_whose_lock_is_held_waits(dead: Dead, name: str, is_new: bool) -> None:
    with dead.written() as hub:
        add_repo(hub, "org/m", {"config.json": CONFIG})
        file = hub / FOLDER / "blobs" / name
        file.write_bytes(b"weights")
        file = file.resolve()
    if not is_new:
        add_repo(dead.hub, "org/m", {"other.json": b"{}"}, commit=MAIN)
    moved = dead.repo("org/m") / "blobs" / name
    with held(dead) as lock:
        assert list(bring(dead).values()) == ["a program is downloading the same"]
        assert file.read_bytes() == b"weights"
        assert not moved.exists()
        assert (dead.repo("org/m") / "blobs" / etag("config.json", CONFIG)).exists(), "others need not wait"
    assert bring(dead) == {}
    assert moved.read_bytes() == b"weights"
    assert list(dead.hub.glob(".locks/**/*.lock")) == [lock], "the client's own stays, as clients leave it"
    dead.clear()
    assert dead.left() == []


def test_a_link_to_a_blob_that_is_being_replaced_waits(dead: Dead) -> None:
    with dead.written() as hub:
        add_repo(hub, "org/m", {"config.json": CONFIG})
    add_repo(dead.hub, "org/m", {"config.json": CONFIG}, commit=MAIN)
    (revision,) = dead.sessions.glob(f"*/hubs/1/{FOLDER}/snapshots/*")
    with held(dead, etag("config.json", CONFIG)):
        assert len(bring(dead)) == 1
        assert not (dead.repo("org/m") / "snapshots" / revision.name).exists()
    dead.clear()
    assert (dead.repo("org/m") / "snapshots" / revision.name / "config.json").read_bytes() == CONFIG
    assert dead.left() == []
    check_stands_alone(dead.hub)


def test_a_client_that_takes_the_lock_after_we_looked_keeps_its_partial_file(
    dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{ETAG}.incomplete"
    with dead.written() as hub:
        add_repo(hub, "org/m", {"config.json": CONFIG})
        (hub / FOLDER / "blobs" / name).write_bytes(b"longer")
    add_repo(dead.hub, "org/m", {"other.json": b"{}"}, commit=MAIN)
    partial = dead.repo("org/m") / "blobs" / name
    partial.write_bytes(b"x")
    with held(dead):
        monkeypatch.setattr(usage, "is_held", lambda _lock: False)
        bring(dead)
        assert partial.read_bytes() == b"x", "the client appends to it"
    dead.clear()
    assert partial.read_bytes() == b"longer"


@pytest.mark.parametrize("there", [None, b"x", b"longer than ours"], ids=["none", "shorter", "longer"])
def test_no_lock_is_left_behind(dead: Dead, there: bytes | None) -> None:
    name = f"{ETAG}.incomplete"
    with dead.written() as hub:
        add_repo(hub, "org/m", {"config.json": CONFIG})
        (hub / FOLDER / "blobs" / name).write_bytes(b"partial")
    add_repo(dead.hub, "org/m", {"other.json": b"{}"}, commit=MAIN)
    partial = dead.repo("org/m") / "blobs" / name
    if there is not None:
        partial.write_bytes(there)
    dead.clear()
    assert partial.read_bytes() == max(b"partial", there or b"", key=len)
    assert not list(dead.hub.glob(".locks/**/*.lock"))
    assert dead.left() == []
