"""P4: a whole repo moves into the real cache only if every link in it leads to something in it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_overlay.hfcache import ORIGIN
from hf_overlay.tree.writeback import bring_home

from tests.support.alone import check_stands_alone, contents
from tests.support.hfcache import add_repo
from tests.support.sessions import new_name

_COMMIT = "a" * 40
_REPO = "models--org--m"


class Written:
    """A dead session into which a client wrote a repo, beside other things that links could lead to."""

    def __init__(self, base: Path) -> None:
        self.session = base / "sessions" / new_name()
        self.hub = base / "hub"
        self.snapshot = add_repo(self.session / "hubs/1", "org/m", {"config.json": b"{}"}, commit=_COMMIT, tree=True)
        self.repo = self.snapshot.parents[1]
        self.users = base / "drive/org/m/user.safetensors"
        add_repo(self.session / "hubs/1", "org/m-other", {"config.json": b"{}"}, commit="b" * 40)
        for path in (self.users, self.session / "file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"the user's")

    def bring_home(self) -> dict[str, str]:
        return bring_home(str(self.session), str(self.hub))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def test_a_repo_whose_links_stay_inside_moves_as_it_is(written: Written) -> None:
    before = contents(written.repo)
    inode = written.repo.stat().st_ino
    assert written.bring_home() == {}
    assert contents(written.hub / _REPO) == before
    assert (written.hub / _REPO).stat().st_ino == inode, "it was copied or merged; the test below shows nothing"
    assert not written.repo.exists()


_OUTWARD: dict[str, Callable[[Written], str]] = {
    "absolute": lambda written: str(written.users),
    "relative": lambda written: os.path.relpath(written.users, written.snapshot),
    "to a folder": lambda written: str(written.users.parent),
    "to a repo whose name begins alike": lambda written: f"../../../{_REPO}-other/refs/main",
    "to the session": lambda written: "../../../../../file",
    "to nothing outside": lambda written: "/nowhere/at/all",
}


@pytest.mark.parametrize("folder", ["", "sub/deeper"])
@pytest.mark.parametrize("where", _OUTWARD)
def test_a_link_that_leads_out_of_a_repo_does_not_come_into_the_cache(
    where: str, folder: str, written: Written, tmp_path: Path
) -> None:
    link = written.snapshot / folder / "leads-out"
    link.parent.mkdir(parents=True, exist_ok=True)
    target = _OUTWARD[where](written)
    link.symlink_to(target if os.path.isabs(target) else os.path.relpath(written.snapshot / target, link.parent))
    written.bring_home()
    assert not os.path.lexists(written.hub / link.relative_to(written.repo.parent)), "P4 is broken: it leads out"
    assert (written.hub / _REPO / f"snapshots/{_COMMIT}/config.json").read_bytes() == b"{}", "P3: the download is lost"
    assert written.users.read_bytes() == b"the user's"
    check_stands_alone(written.hub)


@pytest.mark.parametrize("place", ["blobs", "refs", "trees", "."])
def test_a_link_anywhere_in_a_repo_keeps_it_from_moving_whole(place: str, written: Written) -> None:
    (written.repo / place / "leads-out").symlink_to(written.users)
    written.bring_home()
    assert not os.path.lexists(written.hub / _REPO / place / "leads-out")
    check_stands_alone(written.hub)


def test_a_linked_repo_is_merged_and_its_record_of_where_it_came_from_stays_behind(written: Written) -> None:
    """Though all of its links stay inside, as after a download of every file."""
    (written.repo / ORIGIN).write_text(json.dumps({"folder": "/gone", "commit": "f" * 40}))
    assert written.bring_home() == {}
    home = written.hub / _REPO
    assert (home / "snapshots" / _COMMIT / "config.json").read_bytes() == b"{}"
    assert not (home / ORIGIN).exists(), "an overlay's own file in the real cache"


def test_what_is_copied_to_another_volume_keeps_its_time(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    (blob,) = (written.repo / "blobs").iterdir()
    os.utime(blob, (1_000_000, 1_000_000))
    rename = os.rename

    def on_two_volumes(path: str, target: str) -> None:
        if os.fspath(path).startswith(str(written.session)):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
        rename(path, target)

    monkeypatch.setattr(os, "rename", on_two_volumes)
    assert written.bring_home() == {}
    assert (written.hub / _REPO / "blobs" / blob.name).stat().st_mtime == 1_000_000
