"""Tiers are only read (P1), and what is downloaded of their repos comes home (P3, P4)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hf_overlay
import pytest

from tests.support import hubs, processes
from tests.support.folders import lay_files, lay_model, weights
from tests.support.hfcache import add_repo, etag, listing, repo_folder
from tests.support.inotify import watched
from tests.support.online import contents, leads_outside

REPO = repo_folder("org/held")
HELD = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"the tier's"),
    "tokenizer.json": b"{}",
}
NEWER = HELD | {"config.json": b'{"model_type": "llama", "newer": 1}', "sub/more.txt": b"more"}
FETCHED = {name: content for name, content in NEWER.items() if name not in HELD or HELD[name] != content}


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Path]:
    """With one model and one dataset; in the end it is as it was (P1)."""
    folder = tmp_path / "shared"
    add_repo(folder, "org/held", HELD, tree=True)
    add_repo(folder, "org/held", {"rows.csv": b"1"}, repo_type="dataset")
    before = listing(folder)
    with watched(folder) as changed:
        yield folder
    assert listing(folder) == before
    assert changed == []


def download(hub: Path, *, has_listing: bool = True) -> Path:
    """What a client leaves that fetches the newer revision, of which it finds some blobs; its snapshot.

    Releases from 1.31 on leave a listing as well.
    """
    snapshot = add_repo(hub, "org/held", {}, commit="c" * 40)
    for name, content in NEWER.items():
        blob = hub / REPO / "blobs" / etag(name, content)
        if not blob.exists():
            assert name in FETCHED
            blob.write_bytes(content)
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    if has_listing:
        whole = add_repo(hub.parent / "scratch", "org/held", NEWER, commit=snapshot.name, tree=True).parents[1]
        shutil.copy(whole / f"trees/{snapshot.name}.json", hub / REPO / "trees")
        shutil.rmtree(hub.parent / "scratch")
    return snapshot


@pytest.mark.parametrize("has_listing", [True, False])
def test_a_refresh_brings_home_what_has_been_downloaded_and_the_tree_goes_on_showing_it(
    tier: Path, hub: Path, sessions: Path, has_listing: bool
) -> None:
    """P3: an overlay may be served for months. A load that has begun reads on where it began."""
    with hf_overlay.open_session([], below=[tier]) as session:
        snapshot = download(session.hub_cache, has_listing=has_listing).resolve()
        session.refresh()
        home = hub / REPO / "snapshots" / ("c" * 40)
        assert contents(home) == FETCHED
        assert not leads_outside(hub), "P4: nothing at home depends on the tier"
        assert contents(session.hub_cache / REPO / "snapshots" / ("c" * 40)) == NEWER
        assert contents(snapshot) == NEWER
        assert (session.hub_cache / REPO / "refs/main").read_text() == "c" * 40
        assert not [
            path
            for path in session.path.rglob("*")
            if path.is_file() and not path.is_symlink() and path.read_bytes() in FETCHED.values()
        ]
        before = listing(hub)
        session.refresh()
        assert listing(hub) == before
    assert listing(hub) == before


def test_a_refresh_leaves_what_a_client_is_still_writing(tier: Path, hub: Path, sessions: Path) -> None:
    with hf_overlay.open_session([], below=[tier]) as session:
        partial = session.hub_cache / REPO / "blobs/0123.incomplete"
        partial.write_bytes(b"half")
        session.refresh()
        assert partial.read_bytes() == b"half"
        assert not (hub / REPO / "blobs").exists()


def test_other_bytes_than_the_caches_of_the_same_name_are_not_replaced(tier: Path, hub: Path, sessions: Path) -> None:
    """P3: neither by a refresh, nor at the end."""
    lay_files(hub / REPO, {"blobs/0123": b"the cache's"})
    with hf_overlay.open_session([], below=[tier]) as session:
        mine = session.hub_cache / REPO / "blobs/0123"
        mine.write_bytes(b"other bytes than")
        session.refresh()
        assert mine.read_bytes() == b"other bytes than"
    assert (hub / REPO / "blobs/0123").read_bytes() == b"the cache's"
    (hub / REPO / "blobs/0123").unlink()
    with hf_overlay.open_session([], below=[tier]):
        assert (hub / REPO / "blobs/0123").read_bytes() == b"other bytes than"


def test_a_killed_sessions_download_comes_home_with_the_next_start(tier: Path, hub: Path, home: Path) -> None:
    script = (
        "import os, sys, hf_overlay\nfrom pathlib import Path\nfrom tests.overlay.test_tiers import download\n"
        "with hf_overlay.open_session([], below=[sys.argv[1]]) as session:\n"
        "    download(session.hub_cache)\n    os.kill(os.getpid(), 9)\n"
    )
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    done = processes.finish([processes.PYTHON, "-c", script, str(tier)], environ, cwd=Path(__file__).parents[2])
    assert done.status == -9, done.err
    with hf_overlay.open_session([], below=[tier]) as session:
        assert contents(hub / REPO / "snapshots" / ("c" * 40)) == FETCHED
        assert contents(session.hub_cache / REPO / "snapshots" / ("c" * 40)) == NEWER
    assert not leads_outside(hub)
    assert not (hub / REPO / "refs").exists(), "the revision is not whole at home"


def test_between_a_snapshot_and_a_tiers_file_is_a_link_of_ours(tier: Path, sessions: Path) -> None:
    """P1: clients take the first link for the blob, and unlink what it leads to."""
    with hf_overlay.open_session([], below=[tier]) as session:
        (snapshot,) = (session.hub_cache / REPO / "snapshots").iterdir()
        for file in snapshot.iterdir():
            blob = Path(os.path.realpath(snapshot), os.readlink(file))
            assert blob.is_symlink()
            assert blob.parent.resolve().is_relative_to(session.path)
            assert blob.resolve().is_relative_to(tier)


def test_a_revision_that_a_client_deletes_is_back_with_the_next_refresh(tier: Path, hub: Path, sessions: Path) -> None:
    """As a user's folder is; the tier keeps it."""
    with hf_overlay.open_session([], below=[tier]) as session:
        (session.hub_cache / REPO).unlink()
        (snapshot,) = (session.hub_cache / "datasets--org--held/snapshots").iterdir()
        snapshot.unlink()
        session.refresh()
        (shown,) = (session.hub_cache / REPO / "snapshots").iterdir()
        assert contents(shown) == HELD
        assert contents(snapshot) == {"rows.csv": b"1"}
    assert not hub.exists()


def test_what_the_own_cache_has_whole_is_the_own_caches(tier: Path, hub: Path, sessions: Path) -> None:
    """Then clients write and delete there as ever."""
    add_repo(hub, "org/held", HELD, tree=True)
    with hf_overlay.open_session([], below=[tier]) as session:
        assert (session.hub_cache / REPO).readlink() == hub / REPO
        assert not (session.hub_cache / "datasets--org--held").readlink().is_absolute()


def test_excluded_ids_are_the_caches_and_the_hubs(tier: Path, sessions: Path) -> None:
    lay_model(tier.parent / "plain/org/plain")
    excluded = ["org/held", "datasets/org/held", "org/plain"]
    with hf_overlay.open_session([], below=[tier, tier.parent / "plain"], exclude=excluded) as session:
        assert list(session.hub_cache.iterdir()) == []
        assert session.models == ()


READ = """
import json, os, sys
from hf_overlay.opening import open_session
from hf_overlay.patience import Patience
from tests.support.online import contents
from tests.support.permissions import respected
Patience.__init__.__defaults__ = (60.0,)  # no disk hangs here, however long a process waits for a processor
with open_session([]):
    pass  # what that imports, no fork has to
gate, opened = os.pipe()
readers = []
while len(readers) < 16:
    readers.append(os.fork())
    if readers[-1] == 0:
        break
os.close(opened)
if readers[-1] != 0:
    sys.exit(any([os.waitpid(reader, 0)[1] for reader in readers]))
os.read(gate, 1)
with respected(), open_session([], below=[sys.argv[1]]) as session:
    found = {path.parents[1].name: len(contents(path)) for path in session.hub_cache.glob("*--*/snapshots/*")}
    session.refresh()
print(json.dumps(found), flush=True)
os._exit(0)  # to take the interpreter down costs a fork more than all the rest
"""


@pytest.mark.slow
def test_16_processes_at_once_read_a_tier_that_is_anothers_and_change_nothing(
    tmp_path: Path, home: Path, sessions: Path
) -> None:
    """P1, P10: no file, no lock, no time. Its owner is another user, and nobody may write there.

    As forks of one process, all of them begin at the same moment.
    """
    tier = tmp_path / "shared"
    for number in range(10):
        add_repo(tier, f"org/held{number}", HELD, tree=True, locks=True)
    add_repo(tier, "org/data", {"rows.csv": b"1"}, repo_type="dataset")
    for path in (tier, *tier.rglob("*")):
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = listing(tier)
    environ = processes.environment(home, **hubs.environment(hubs.INSTALLED))
    command = [processes.PYTHON, "-c", READ, str(tier)]
    with watched(tier) as changed:
        done = processes.finish(command, environ)
    assert (done.status, done.err) == (0, "")
    expected = {repo_folder(f"org/held{number}"): 3 for number in range(10)} | {"datasets--org--data": 1}
    assert [json.loads(line) for line in done.lines()] == [expected] * 16
    assert changed == []
    assert listing(tier) == before
    assert not (home / ".cache/huggingface/hub").exists()


def test_a_download_that_the_own_cache_cannot_take_is_shown_by_the_next_session_and_comes_home_later(
    tier: Path, hub: Path, sessions: Path
) -> None:
    """P3: nothing is fetched twice because the cache was away."""
    hub.parent.mkdir(parents=True)
    hub.symlink_to(hub.with_name("a drive that is away"))
    with hf_overlay.open_session([], below=[tier], hold_downloads=True) as session:
        download(session.hub_cache)
    with hf_overlay.open_session([], below=[tier]) as session:
        shown = session.hub_cache / REPO / "snapshots" / ("c" * 40)
        assert contents(shown) == NEWER
        hub.unlink()
        with hf_overlay.open_session([], below=[tier]):
            assert contents(shown) == NEWER, "another start moves nothing that is being read"
    with hf_overlay.open_session([], below=[tier]) as session:
        assert contents(hub / REPO / "snapshots" / ("c" * 40)) == FETCHED
        assert contents(session.hub_cache / REPO / "snapshots" / ("c" * 40)) == NEWER
