"""What was downloaded goes to the store of the real cache, if it has one, and is there at each moment (P3, P4)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.tree import blobstore

from tests.support.hfcache import add_repo, repo_folder

CONTENT = b"the same in both"
ETAG = hashlib.sha256(CONTENT).hexdigest()
XET = "0f" * 32
ONE, TWO = "org/one", "org/two"
CALLS = ("link", "mkdir", "chmod", "rename", "symlink", "replace", "fsync")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache with a store, and two models with the same weights, each of its own."""
    hub = tmp_path / "hub"
    for repo_id in (ONE, TWO):
        add_repo(hub, repo_id, {"model.safetensors": CONTENT})
    (hub / "blobs").mkdir()
    (hub / "blobs/.huggingface-shared-blobs").write_text("1\n")
    return hub


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A session that has noted both."""
    session = tmp_path / "session"
    session.mkdir()
    for repo_id in (ONE, TWO):
        blobstore.note(str(session), repo_folder(repo_id), {ETAG: XET})
    return session


def blob(hub: Path, repo_id: str) -> Path:
    return hub / repo_folder(repo_id) / "blobs" / ETAG


def share(session: Path, hub: Path) -> None:
    blobstore.share(str(session), str(hub), time.time() - 60)


def shared(hub: Path) -> list[str]:
    """The models whose weights lead to the store; those of all are whole, and nothing else is left behind."""
    for repo_id in (ONE, TWO):
        assert blob(hub, repo_id).read_bytes() == CONTENT
    assert not list(hub.rglob("*.incomplete"))
    target = f"../../blobs/0f/{XET}"
    return [each for each in (ONE, TWO) if blob(hub, each).is_symlink() and os.readlink(blob(hub, each)) == target]


def test_they_lead_to_one_file(session: Path, hub: Path) -> None:
    for _ in range(2):  # the second time, there is nothing to do
        share(session, hub)
        assert shared(hub) == [ONE, TWO]
    lines = [f"{repo_folder(repo_id)}/blobs/{ETAG}\n" for repo_id in (ONE, TWO)]
    assert (hub / f"blobs/0f/{XET}.refs").read_text() == "".join(lines)
    for beside in ("refs", "lock"):
        assert (hub / f"blobs/0f/{XET}.{beside}").stat().st_mode & 0o777 == 0o666, "all users of a cache write there"
    assert (hub / f"blobs/0f/{XET}").stat().st_nlink == 1
    assert (hub / f"blobs/0f/{XET}").stat().st_mode & 0o777 in (0o400, 0o444)


@pytest.mark.parametrize("call", CALLS)
def test_whatever_fails_each_blob_is_whole_and_the_next_time_it_is_shared(
    session: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real: Callable[..., object] = getattr(os, call)

    def fail(*arguments: object, **more: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    share(session, hub)
    assert shared(hub) == []
    monkeypatch.setattr(os, call, real)
    share(session, hub)
    assert shared(hub) == [ONE, TWO]


def older(hub: Path) -> None:
    os.utime(blob(hub, ONE), (1, 1))


def other_bytes_in_the_store(hub: Path) -> None:
    (hub / "blobs/0f").mkdir()
    (hub / f"blobs/0f/{XET}").write_bytes(CONTENT[::-1])


def no_store(hub: Path) -> None:
    (hub / "blobs/.huggingface-shared-blobs").unlink()


def another_layout(hub: Path) -> None:
    (hub / "blobs/.huggingface-shared-blobs").write_text("2\n")


def store_elsewhere(hub: Path) -> None:
    (hub / "blobs").rename(hub.parent / "elsewhere")
    (hub / "blobs").symlink_to(hub.parent / "elsewhere")


def repo_elsewhere(hub: Path) -> None:
    (hub / repo_folder(TWO)).rename(hub.parent / "elsewhere")
    (hub / repo_folder(TWO)).symlink_to(hub.parent / "elsewhere")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (older, [TWO]),
        (other_bytes_in_the_store, []),
        (no_store, []),
        (another_layout, []),
        (store_elsewhere, []),
        (repo_elsewhere, [ONE]),
    ],
)
def test_what_is_not_to_be_shared_stays_as_it_is(
    session: Path, hub: Path, what: Callable[[Path], None], expected: list[str]
) -> None:
    what(hub)
    share(session, hub)
    assert shared(hub) == expected


def test_bytes_that_are_not_what_the_hub_named_stay_out_of_the_store(session: Path, hub: Path) -> None:
    blob(hub, ONE).write_bytes(b"cut off")
    share(session, hub)
    assert blob(hub, ONE).read_bytes() == b"cut off"
    assert (hub / f"blobs/0f/{XET}").read_bytes() == CONTENT, "the other one is right"


@pytest.mark.parametrize("lock", [f".locks/{repo_folder(ONE)}/{ETAG}.lock", f"blobs/0f/{XET}.lock"])
def test_what_a_client_is_at_waits(session: Path, hub: Path, lock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobstore, "_TRIES", 2)
    (hub / lock).parent.mkdir(parents=True)
    with (hub / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        share(session, hub)
        assert ONE not in shared(hub)
    share(session, hub)
    assert shared(hub) == [ONE, TWO]


def test_a_lock_that_is_held_for_a_moment_is_waited_for(
    session: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub / "blobs/0f").mkdir()
    with (hub / f"blobs/0f/{XET}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _seconds: held.close())
        share(session, hub)
    assert shared(hub) == [ONE, TWO]


@pytest.mark.parametrize("line", ["", "{", '["models--org--one"]', '["../..", {}]', '["models--org--one", {"x": 5}]'])
def test_a_record_that_cannot_be_read_hides_no_other(session: Path, hub: Path, line: str) -> None:
    (session / "expected").write_text(f"{line}\n{(session / 'expected').read_text()}")
    share(session, hub)
    assert shared(hub) == [ONE, TWO]


@pytest.mark.parametrize("name", ["HF_HUB_DISABLE_SHARED_BLOBS", "HF_HUB_DISABLE_XET"])
def test_who_has_switched_it_off_shares_nothing(home: Path, sessions: Path, name: str) -> None:
    environ = {"HOME": str(home), "HF_OVERLAY_DIR": str(sessions)}
    for value, is_noted in (("0", True), ("1", False)):
        with hf_overlay.open_session([], environ={**environ, name: value}) as session:
            session.expect_download(repo_folder(ONE), {ETAG: XET})
            assert blobstore.has_record(str(session.path)) is is_noted
        assert not list(sessions.glob("session-*"))
