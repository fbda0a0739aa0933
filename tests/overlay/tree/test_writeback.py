"""P3 and P4 for what clients wrote into a session's tree: all of it comes home, whatever breaks on the way.

`Dead` is a session whose owner has died, with downloads of every kind in it; clearing it is what the next start does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hf_overlay import config, keeping
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.messages import Messages
from hf_overlay.patience import NoAnswer, Patience
from hf_overlay.session import Session
from hf_overlay.tree import moving
from hf_overlay.tree.clear import Cleared, clear_dead
from hf_overlay.tree.lease import Lease, sessions_folder
from hf_overlay.tree.writeback import bring_home

from tests.support.alone import check_stands_alone, contents
from tests.support.folders import lay_model
from tests.support.hfcache import add_repo, etag, repo_folder

CONFIG = b'{"model_type": "llama"}'
MAIN, OTHER = "a" * 40, "b" * 40
"""Commits."""


class Dead:
    """A session that nobody owns any more, the user's models in it and the real cache behind it."""

    def __init__(self, base: Path) -> None:
        self.models = base / "drive"
        self.home = base / "home"
        self.hub = self.home / ".cache/huggingface/hub"
        self.environ = {"HOME": str(self.home)}
        self.sessions = Path(sessions_folder({"HF_OVERLAY_DIR": str(base / "sessions")}))
        self.models.mkdir()
        self.home.mkdir()
        self._tree = base

    @contextmanager
    def written(self) -> Iterator[Path]:
        """The session's hub folder while it lives, for what clients write; afterwards it is dead."""
        settings = config.load([str(self.models)], self.environ, "/")
        owner = Lease.acquire(str(self.sessions), settings)
        try:
            yield Session(Catalog(settings), self.environ, owner, Messages()).hub_cache
        finally:
            owner.release()

    def clear(self) -> list[Cleared]:
        return clear_dead(str(self.sessions))

    def left(self) -> list[Path]:
        return sorted(self.sessions.glob("session-*"))

    def held(self) -> Counter[bytes]:
        """The bytes of every file in a session or the real cache: bytes -> how often."""
        inside = (found for folder in (self.sessions, self.hub) for found in os.walk(folder))
        files = (os.path.join(folder, name) for folder, _, names in inside for name in names)
        return Counter(Path(path).read_bytes() for path in files if os.path.isfile(path) and not os.path.islink(path))

    def repo(self, repo_id: str) -> Path:
        return self.hub / repo_folder(repo_id)


@pytest.fixture
def dead(tmp_path: Path) -> Dead:
    return Dead(tmp_path)


# Merged by revision ------------------------------------------------------------------------------------------------


def test_a_new_repo_comes_home_as_it_is(dead: Dead) -> None:
    with dead.written() as hub:
        add_repo(hub, "org/new", {"config.json": CONFIG, "nested/x.txt": b"x"}, tree=True, locks=True, no_exist=["y"])
        before = contents(hub / "models--org--new")
    (cleared,) = dead.clear()
    assert cleared.kept == ()
    assert contents(dead.repo("org/new")) == before
    assert (dead.hub / "CACHEDIR.TAG").is_file()
    assert dead.left() == []
    check_stands_alone(dead.hub)


def test_a_revision_joins_those_that_the_cache_has(dead: Dead) -> None:
    """A repo that a plain program downloaded meanwhile: files they share are there once, the newer `main` counts."""
    with dead.written() as hub:
        add_repo(dead.hub, "org/m", {"config.json": CONFIG, "old.txt": b"old"}, commit=MAIN, refs=["main"])
        os.utime(dead.repo("org/m") / "refs/main", (1, 1))
        add_repo(
            hub,
            "org/m",
            {"config.json": CONFIG, "nested/new.txt": b"new"},
            commit=OTHER,
            refs=["main", "refs/pr/1"],
            no_exist=["absent"],
            tree=True,
        )
    (cleared,) = dead.clear()
    assert cleared.kept == ()
    repo = dead.repo("org/m")
    assert (repo / f"snapshots/{OTHER}/nested/new.txt").read_bytes() == b"new"
    assert (repo / f"snapshots/{OTHER}/config.json").read_bytes() == CONFIG
    assert (repo / f"snapshots/{MAIN}/old.txt").read_bytes() == b"old"
    assert [(repo / f"refs/{ref}").read_text() for ref in ("main", "refs/pr/1")] == [OTHER, OTHER]
    assert (repo / f"trees/{OTHER}.json").is_file()
    assert (repo / f".no_exist/{OTHER}/absent").is_file()
    assert dead.held()[CONFIG] == 1
    assert dead.left() == []
    check_stands_alone(dead.hub)


def test_a_late_recovery_does_not_move_main_back(dead: Dead) -> None:
    """What a plain program has downloaded since is what `main` leads to."""
    with dead.written() as hub:
        add_repo(hub, "org/m", {"config.json": CONFIG}, commit=OTHER)
        os.utime(hub / "models--org--m/refs/main", (1, 1))
        add_repo(dead.hub, "org/m", {"config.json": b"newer"}, commit=MAIN)
    dead.clear()
    assert (dead.repo("org/m") / "refs/main").read_text() == MAIN
    assert (dead.repo("org/m") / f"snapshots/{OTHER}/config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("is_copy", [False, True], ids=["a blob", "a copy in a snapshot"])
def test_other_bytes_of_the_same_name_are_kept_and_reported(dead: Dead, is_copy: bool) -> None:
    with dead.written() as hub:
        add_repo(dead.hub, "org/m", {"config.json": CONFIG})
        file = add_repo(hub, "org/m", {"config.json": CONFIG}) / "config.json"
        if is_copy:
            file.unlink()
        file.write_bytes(b"of another size")
    (cleared,) = dead.clear()
    assert [Path(path).name for path in cleared.kept] == ["models--org--m"]
    assert dead.held()[b"of another size"] == 1, "P3 is broken: a download was deleted"
    assert (dead.repo("org/m") / "blobs" / etag("config.json", CONFIG)).read_bytes() == CONFIG


def test_two_dead_sessions_bring_the_same_download_home_once(dead: Dead) -> None:
    for _ in range(2):
        with dead.written() as hub:
            add_repo(hub, "org/m", {"config.json": CONFIG, "model.safetensors": b"weights"}, tree=True)
            if hub.joinpath("models--org--m").is_symlink():
                pytest.fail("the second session found what the first had")
    assert [cleared.kept for cleared in dead.clear()] == [(), ()]
    assert dead.held()[b"weights"] == 1
    check_stands_alone(dead.hub)


# Partial downloads -------------------------------------------------------------------------------------------------


def partial(hub: Path, content: bytes) -> Path:
    blobs = hub / "models--org--m/blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    (hub / "models--org--m/snapshots").mkdir(exist_ok=True)
    path = blobs / f"{'c' * 64}.incomplete"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("is_there", [False, True], ids=["new repo", "repo in the cache"])
def test_a_partial_download_can_be_resumed(dead: Dead, is_there: bool) -> None:
    """By the releases that resume, under the name they look for."""
    with dead.written() as hub:
        if is_there:
            add_repo(dead.hub, "org/m", {"config.json": CONFIG})
        add_repo(hub, "org/m", {"config.json": CONFIG})
        partial(hub, b"the first half")
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert partial(dead.hub, b"").parent.is_dir()
    assert dead.left() == []


@pytest.mark.parametrize(("here", "there"), [(b"longer", b"short"), (b"short", b"longer")])
def test_of_two_partial_downloads_the_longer_stays(dead: Dead, here: bytes, there: bytes) -> None:
    with dead.written() as hub:
        partial(dead.hub, there)
        partial(hub, here)
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert [path.read_bytes() for path in dead.hub.rglob("*.incomplete")] == [b"longer"]


def test_a_partial_download_waits_for_a_program_that_is_at_it(dead: Dead) -> None:
    """Under its lock a program of an older release appends to the file: it must not be changed under its hands."""
    with dead.written() as hub:
        partial(dead.hub, b"1")
        partial(hub, b"longer")
    lock = dead.hub / f".locks/models--org--m/{'c' * 64}.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (cleared,) = dead.clear()
        assert [Path(path).name for path in cleared.kept] == ["models--org--m"]
        assert [path.read_bytes() for path in dead.hub.rglob("*.incomplete")] == [b"1"]
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert [path.read_bytes() for path in dead.hub.rglob("*.incomplete")] == [b"longer"]
    assert dead.left() == []


# Into a repo of the user's -----------------------------------------------------------------------------------------


def add_revision(hub: Path, model_id: str, files: Mapping[str, bytes]) -> Path:
    """Another revision beside the user's, as a client leaves it that does not mind what it may not write to."""
    for folder in (hub / repo_folder(model_id)).rglob("*"):
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o755)
    return add_repo(hub, model_id, files, commit=OTHER, tree=True)


def force(hub: Path, model_id: str, name: str, content: bytes) -> None:
    """What a forced download of one file leaves: bytes where the link to the user's file was."""
    (snapshot,) = (hub / repo_folder(model_id)).glob("snapshots/*")
    blob = (snapshot / name).parent / os.readlink(snapshot / name)
    blob.unlink()
    blob.write_bytes(content)


def test_a_forced_download_of_the_users_own_bytes_is_dropped_as_a_copy(dead: Dead) -> None:
    folder = lay_model(dead.models / "org/m", settled=True)
    weights = (folder / "model.safetensors").read_bytes()
    with dead.written() as hub:
        force(hub, "org/m", "model.safetensors", weights)
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert contents(dead.hub) == {}, "a gigabyte twice serves nobody"


@pytest.mark.parametrize("what", ["gone", "of another size", "on a disk that does not answer"])
def test_a_forced_download_is_kept_when_the_users_file_is(
    dead: Dead, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lay_model(dead.models / "org/m", settled=True)
    weights = (folder / "model.safetensors").read_bytes()
    with dead.written() as hub:
        force(hub, "org/m", "model.safetensors", weights)
    if what == "gone":
        (folder / "model.safetensors").unlink()
    elif what == "of another size":
        (folder / "model.safetensors").write_bytes(b"changed by the user")
    else:
        with monkeypatch.context() as patched:
            patched.setattr(Patience, "ask", _no_answer)
            bring_home(str(dead.left()[0]), str(dead.hub))
    dead.clear()
    assert dead.held()[weights] == 1, "P3 is broken: the only copy was deleted"
    check_stands_alone(dead.hub)


def test_what_programs_write_into_a_users_model_comes_home_and_leaves_no_session(dead: Dead) -> None:
    """As vLLM does, which keeps weights there in a format of its own. Once more, and the cache has it already."""
    lay_model(dead.models / "org/m", settled=True)
    for _ in range(2):
        with dead.written() as hub:
            (snapshot,) = (hub / "models--org--m/snapshots").iterdir()
            (snapshot / "np").mkdir()
            (snapshot / "np/weights.npy").write_bytes(b"a copy")
        assert [cleared.kept for cleared in dead.clear()] == [()]
        assert dead.held()[b"a copy"] == 1, "P3 is broken: what a program wrote was deleted"
    assert (dead.repo("org/m") / f"snapshots/{snapshot.name}/np/weights.npy").read_bytes() == b"a copy"
    check_stands_alone(dead.hub)


def test_what_programs_write_into_a_users_model_is_kept_where_the_cache_has_something_else_of_that_size(
    dead: Dead,
) -> None:
    lay_model(dead.models / "org/m", settled=True)
    for content in (b"a copy", b"a.copy"):
        with dead.written() as hub:
            (snapshot,) = (hub / "models--org--m/snapshots").iterdir()
            (snapshot / "weights.npy").write_bytes(content)
        kept = [cleared.kept for cleared in dead.clear()]
    assert kept != [()], "P3 is broken: a session with a file that is nowhere else counts as brought home"
    assert dead.held()[b"a.copy"] == 1, "P3 is broken: what a program wrote was deleted"


def _no_answer(_patience: Patience, root: str, _function: object) -> None:
    raise NoAnswer(root)


def test_another_revision_of_a_users_model_comes_home_without_anything_of_ours(dead: Dead) -> None:
    """The real cache gets the revision that was downloaded, and neither our commit nor a link to the user's folder."""
    lay_model(dead.models / "org/m", {"config.json": CONFIG}, settled=True)
    with dead.written() as hub:
        (own,) = (path.name for path in hub.glob("models--org--m/snapshots/*"))
        add_revision(hub, "org/m", {"config.json": b"{}", "model.safetensors": b"new"})
    assert [cleared.kept for cleared in dead.clear()] == [()]
    repo = dead.repo("org/m")
    assert os.listdir(repo / "snapshots") == [OTHER]
    assert os.listdir(repo / "trees") == [f"{OTHER}.json"]
    assert (repo / "refs/main").read_text() == OTHER
    assert own not in " ".join(contents(dead.hub)), "P4 is broken: our own commit is in the real cache"
    assert (repo / f"snapshots/{OTHER}/model.safetensors").read_bytes() == b"new"
    check_stands_alone(dead.hub)


def test_a_revision_that_is_partly_the_users_comes_home_without_that_part_and_without_a_ref(dead: Dead) -> None:
    """A client links a file it takes for cached: what it links to is the user's."""
    lay_model(dead.models / "org/m", {"config.json": CONFIG}, settled=True)
    with dead.written() as hub:
        (ours,) = hub.glob("models--org--m/snapshots/*/config.json")
        snapshot = add_revision(hub, "org/m", {"model.safetensors": b"new"})
        (snapshot / "config.json").symlink_to(os.readlink(ours))
    assert [cleared.kept for cleared in dead.clear()] == [()]
    repo = dead.repo("org/m")
    assert os.listdir(repo / f"snapshots/{OTHER}") == ["model.safetensors"]
    assert not (repo / "refs/main").exists()
    assert not (repo / f"trees/{OTHER}.json").exists(), "else a client takes the part for the whole"
    check_stands_alone(dead.hub)


def test_a_revision_of_which_all_is_the_users_leaves_nothing_in_the_cache(dead: Dead) -> None:
    """Not even empty folders, which offline programs would take for the revision."""
    lay_model(dead.models / "org/m", {"config.json": CONFIG, "sub/vocab.json": b"{}"}, settled=True)
    with dead.written() as hub:
        (ours,) = hub.glob("models--org--m/snapshots/*")
        snapshot = add_revision(hub, "org/m", {})
        (snapshot / "sub").mkdir()
        for name in ("config.json", "sub/vocab.json"):
            (snapshot / name).symlink_to(os.readlink(ours / name))
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert not dead.repo("org/m").exists()
    assert dead.left() == []


def test_a_folder_of_a_revision_that_is_the_users_is_not_made(dead: Dead) -> None:
    lay_model(dead.models / "org/m", {"config.json": CONFIG, "sub/vocab.json": b"{}"}, settled=True)
    with dead.written() as hub:
        (ours,) = hub.glob("models--org--m/snapshots/*/sub/vocab.json")
        snapshot = add_revision(hub, "org/m", {"model.safetensors": b"new"})
        (snapshot / "sub").mkdir()
        (snapshot / "sub/vocab.json").symlink_to(os.readlink(ours))
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert os.listdir(dead.repo("org/m") / f"snapshots/{OTHER}") == ["model.safetensors"]
    check_stands_alone(dead.hub)


def test_a_ref_of_a_revision_of_which_nothing_has_come_yet_stays_out(dead: Dead) -> None:
    """A client that is killed at its start leaves the ref, an empty folder and the first bytes of a file."""
    with dead.written() as hub:
        add_repo(dead.hub, "org/m", {"config.json": CONFIG}, commit=MAIN, refs=[])
        add_repo(hub, "org/m", {}, commit=OTHER)
        partial(hub, b"the first bytes")
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert dead.held()[b"the first bytes"] == 1
    check_stands_alone(dead.hub)


def as_made_by_an_earlier_version(session: Path) -> None:
    """The folder of linked repos had another name."""
    (session / "repos").rename(session / "shadows")
    for link in session.glob("hubs/*/*"):
        if link.is_symlink():
            target = os.readlink(link)
            link.unlink()
            link.symlink_to(target.replace("/repos/", "/shadows/"))


def test_downloads_into_a_session_of_an_earlier_version_come_home(dead: Dead) -> None:
    lay_model(dead.models / "org/m", {"config.json": CONFIG}, settled=True)
    forced = lay_model(dead.models / "org/forced", settled=True)
    weights = (forced / "model.safetensors").read_bytes()
    with dead.written() as hub:
        add_revision(hub, "org/m", {"config.json": b"{}", "model.safetensors": b"new"})
        force(hub, "org/forced", "model.safetensors", weights)
    (forced / "model.safetensors").unlink()
    (session,) = dead.left()
    as_made_by_an_earlier_version(session)
    assert [cleared.kept for cleared in dead.clear()] == [()]
    assert (dead.repo("org/m") / f"snapshots/{OTHER}/model.safetensors").read_bytes() == b"new"
    assert dead.held()[weights] == 1, "P3 is broken: the only copy was deleted"
    assert dead.left() == []
    check_stands_alone(dead.hub)


def test_a_download_into_a_session_of_an_earlier_version_stays_when_it_cannot_be_moved(dead: Dead) -> None:
    lay_model(dead.models / "org/m", {"config.json": CONFIG}, settled=True)
    with dead.written() as hub:
        add_revision(hub, "org/m", {"model.safetensors": b"new"})
        dead.hub.parent.mkdir(parents=True, exist_ok=True)
        dead.hub.write_text("in the way")
    (session,) = dead.left()
    as_made_by_an_earlier_version(session)
    (cleared,) = dead.clear()
    assert [Path(path).parent for path in cleared.kept] == [session / "shadows"]
    assert b"new" in {path.read_bytes() for path in session.rglob("*") if path.is_file()}


# Whatever breaks on the way ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in place of a system call: after it, nothing is done to the disk any more, as after signal 9."""


class Disk:
    """Watches what this process does to the disk below a folder, and may break one step or part it in two volumes."""

    def __init__(self) -> None:
        self._below: str | None = None
        self._steps: list[str] = []
        self._number = 0
        self._how: BaseException | None = None
        self._volumes: tuple[str, ...] = ()
        sys.addaudithook(self._heard)

    @contextmanager
    def breaking(
        self, below: Path, number: int = 0, how: BaseException | None = None, volumes: tuple[str, ...] = ()
    ) -> Iterator[list[str]]:
        """The step `number` fails as `how` says; yields the steps so far. Nothing is renamed between `volumes`."""
        self._below, self._number, self._how, self._volumes = str(below), number, how, volumes
        self._steps = []
        try:
            yield self._steps
        finally:
            self._below = None

    def _heard(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._below is None or not event.startswith(("os.", "open")):
            return
        path = self._changed(event, arguments)
        if path is None or not path.startswith(self._below):
            return
        self._steps.append(f"{event} {path}")
        if len(self._steps) == self._number and self._how is not None:
            raise self._how
        if event == "os.rename" and self._volume(str(arguments[0])) != self._volume(path):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), arguments[0], None, path)

    def _changed(self, event: str, arguments: tuple[object, ...]) -> str | None:
        """The path that is about to be changed."""
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return path if writes and isinstance(path, str) else None
        if event in ("os.rename", "os.symlink"):
            return str(arguments[1])
        if event in ("os.mkdir", "os.remove", "os.rmdir", "os.utime", "os.chmod"):
            return str(arguments[0])
        return None

    def _volume(self, path: str) -> str | None:
        return next((volume for volume in self._volumes if path.startswith(volume)), None)


@pytest.fixture(scope="module")
def disk() -> Disk:
    """One: what watches a process can never be taken away again."""
    return Disk()


PAYLOADS = (b"new weights", b"merged weights", b"pull request", b"revision of a user's", b"forced", b"copied" * 9)


def lay_everything(dead: Dead) -> None:
    """Downloads of every kind, with each of PAYLOADS once."""
    folder = lay_model(dead.models / "org/mine", {"config.json": CONFIG}, settled=True)
    add_repo(dead.hub, "org/cached", {"config.json": CONFIG}, tree=True, locks=True)
    with dead.written() as hub:
        add_repo(hub, "org/new", {"config.json": CONFIG, "n/model.safetensors": b"new weights"}, tree=True, locks=True)
        add_repo(dead.hub, "org/merged", {"config.json": CONFIG, "old.txt": b"old"}, commit=MAIN)
        os.utime(dead.repo("org/merged") / "refs/main", (1, 1))
        merged = add_repo(
            hub,
            "org/merged",
            {"config.json": CONFIG, "n/model.safetensors": b"merged weights"},
            commit=OTHER,
            tree=True,
        )
        (merged / "copy.bin").write_bytes(b"copied" * 9)
        partial(hub, b"half")
        add_repo(hub, "org/merged", {"pr.txt": b"pull request"}, refs=["refs/pr/1"], no_exist=["x"])
        add_repo(hub, "org/data", {"config.json": CONFIG}, repo_type="dataset")
        add_revision(hub, "org/mine", {"new.safetensors": b"revision of a user's"})
        (own,) = (path for path in hub.glob("models--org--mine/snapshots/*") if path.name != OTHER)
        blob = own / os.readlink(own / "model.safetensors")
        blob.unlink()
        blob.write_bytes(b"forced")
    (folder / "model.safetensors").write_bytes(b"changed by the user")


def outcome(dead: Dead) -> dict[str, tuple[str, str]]:
    """The real cache: name -> kind, and bytes or target. Where and when the user's model was made is left out."""
    found = {}
    for name, (kind, _, detail) in contents(dead.hub).items():
        folder, _, blob = name.rpartition("/")
        is_named_by_us = folder == "models--org--mine/blobs" and len(blob) == 40
        if not name.startswith(".locks"):
            found[f"{folder}/{detail}" if is_named_by_us else name] = (kind, detail)
    return found


def in_memory() -> str | None:
    """A folder in memory where the system offers one: disks take many times as long."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def no_room() -> BaseException:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("how", [no_room, Killed], ids=["no room", "killed"])
def test_a_copy_that_is_cut_never_has_its_files_name(
    disk: Disk, how: Callable[[], BaseException], dead: Dead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between volumes, in the middle of the bytes."""
    with dead.written() as hub:
        add_repo(hub, "org/m", {"model.safetensors": b"weights"})
    blob = dead.repo("org/m") / "blobs" / etag("model.safetensors", b"weights")

    def cut(_fd: int) -> None:
        raise how()

    apart = tuple(str(tmp_path / name) for name in ("sessions", "home"))
    with monkeypatch.context() as patch, disk.breaking(tmp_path, volumes=apart), suppress(Killed):
        patch.setattr(moving, "_PIECE_BYTES", 3)
        patch.setattr(os, "fsync", cut)
        dead.clear()
    assert not blob.exists(), "P4 is broken: half of a file is in the cache"
    with disk.breaking(tmp_path, volumes=apart):
        dead.clear()
    assert blob.read_bytes() == b"weights", "P3 is broken"
    assert dead.held()[b"weights"] == 1


def test_no_folder_is_made_where_a_drive_belongs(dead: Dead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hide the drive when that comes."""
    with dead.written() as hub:
        add_repo(hub, "org/m", {"config.json": CONFIG})
    monkeypatch.setattr(keeping, "_DRIVE", f"{tmp_path}/media/[^/]+")
    stuck = bring_home(str(dead.left()[0]), f"{tmp_path}/media/drive/hub")
    assert [f"{tmp_path}/media/drive, which is not there" in why for why in stuck.values()] == [True]
    assert not (tmp_path / "media").exists()
    dead.clear()
    assert dead.held()[CONFIG] == 1


def test_a_revision_of_which_the_bytes_are_home_and_the_links_are_not_stays_for_the_next_start(
    dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_repo(dead.hub, "org/m", {"other.json": b"{}"}, commit=OTHER)
    with dead.written() as hub:
        (hub / "models--org--m").unlink()  # as `hf cache rm` does from 1.32 on
        add_repo(hub, "org/m", {"config.json": CONFIG}, commit=MAIN)

    def fail(*_: object) -> None:
        raise no_room()

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", fail)
        (cleared,) = dead.clear()
    assert cleared.kept, "the links of the revision are worth keeping"
    dead.clear()
    assert (dead.repo("org/m") / f"snapshots/{MAIN}/config.json").read_bytes() == CONFIG
    assert dead.left() == []


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("volumes", [(), ("sessions", "home")], ids=["one volume", "two volumes"])
@pytest.mark.parametrize("how", [no_room, Killed], ids=["no room", "killed"])
def test_whatever_step_fails_nothing_is_lost_and_the_next_start_ends_it(
    disk: Disk, how: Callable[[], BaseException], volumes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, tuple[str, str]] = {}
    number = 0
    while number < 1000:
        with TemporaryDirectory(dir=in_memory()) as folder:
            dead = Dead(Path(folder))
            lay_everything(dead)
            apart = tuple(str(Path(folder, name)) for name in volumes)
            with disk.breaking(Path(folder), number, how(), apart) as steps, suppress(Killed):
                dead.clear()
            if number == 0:  # nothing was broken yet
                expected = outcome(dead)
                check_stands_alone(dead.hub)
            elif len(steps) < number:
                break
            step = f"step {number}, {steps[number - 1]}"
            held = dead.held()
            assert not set(PAYLOADS) - held.keys(), f"P3 is broken: lost at {step}"
            if not apart:
                assert all(held[payload] == 1 for payload in PAYLOADS), f"there twice after {step}"
            check_stands_alone(dead.hub, is_in_progress=True)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 4_000_000)  # another process's
                with disk.breaking(Path(folder), volumes=apart):
                    dead.clear()
            assert dead.left() == [], f"P3 is broken: after {step} the next start did not end it"
            assert outcome(dead) == expected, f"P3 or P4 is broken: after {step} the cache is another"
        number += 1
    assert number > 50, "many moments were tried"
