"""P1, P3 and P4: whatever is done through an overlay, the user's folders and the real cache keep every byte.

`World` is what is at stake, with the listing it must have. Every release of huggingface_hub does to it each operation
that deletes or downloads: once each, so that a failure names operation and release, and then in orders that
Hypothesis draws, between starts, refreshes, ends and kills of sessions and changes that the user makes.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import hf_overlay
import pytest
from hf_overlay.session import clear_dead
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support import hubs
from tests.support.folders import lay_model, settle
from tests.support.hfcache import Entry, add_repo, etag, listing, repo_folder
from tests.support.hubs import Answer, Worker
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import PYTHON, finish

CUSTOM = (
    "acme/borrowed",
    "acme/elsewhere",
    "acme/linked",
    "acme/tiny",
    "deep/sub/model",
    "org/both",
    "org/front",
    "org/second",
    "solo",
    "twin",
)
"""The user's models at first (see `World`)."""
CACHED = ("org/cached", "org/many")
"""What only the real cache holds."""
CHANGING = ("acme/added", "acme/tiny", "org/front", "solo")
"""What the user adds, changes and removes."""
CONFIG = b'{"model_type": "llama"}'


class World:
    """A user's folders, a real cache, and how both have to look."""

    def __init__(self, base: Path) -> None:
        self.users = base / "users"
        self.drive = self.users / "drive"
        self.roots = [self.drive / "models", self.users / "second"]
        self.hf_home = base / "home/.cache/huggingface"
        self.hub = self.hf_home / "hub"
        self.sessions = base / "sessions"
        self.link = base / "link"
        self.environ = {
            "HOME": str(base / "home"),
            "PATH": os.environ["PATH"],
            "HF_OVERLAY_DIR": str(self.sessions),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        self._lay_cache()
        self._lay_folders()
        self.mine = listing(self.users)
        self.cache = listing(self.hf_home)
        self.may_go: set[str] = set()
        """What a client was asked to delete since the last check; names as in the cache's listing."""
        self.may_come: set[str] = set()
        """Repo folders that a client downloaded to, which come home to the real cache when a session ends."""

    def _lay_cache(self) -> None:
        """Several revisions and refs, a file of one revision only, another kind of repo, half a download."""
        add = partial(add_repo, self.hub, tree=True, locks=True)
        add("org/both", _files("both"))
        add("org/cached", _files("cached"))
        add("org/cached", _files("cached") | {"config.json": CONFIG + b"\n"})
        add("org/front", _files("front, at first"), refs=("v1",))
        add("org/front", _files("front, now"))
        add("org/many", _files("many, at first") | {"gone.json": b"{}"}, refs=())
        add("org/many", _files("many, then"), refs=("v1", "refs/pr/1"), no_exist=("absent.json",))
        add("org/many", _files("many, now"))
        add_repo(self.hub, "org/data", {"data.csv": b"1,2"}, repo_type="dataset", refs=("v1",))
        add_repo(self.hub, "org/data", {"data.csv": b"3,4"}, repo_type="dataset")
        (self.hub / repo_folder("org/many") / "blobs" / f"{'0' * 40}.incomplete").write_bytes(b"half")
        (self.hf_home / "token").write_bytes(b"secret")
        (self.hf_home / "datasets").mkdir()
        (self.hf_home / "datasets/data.arrow").write_bytes(b"arrow")

    def _lay_folders(self) -> None:
        """Plain, flat, deep and linked folders, links to files, downloads with their commit, a second cache."""
        models, second = self.roots
        store = self.users / "store"
        lay_model(models / "acme/tiny", {"sub/vocab.json": b"{}", ".DS_Store": b"junk", "._config.json": b"junk"})
        lay_model(models / "solo", settled=True)
        lay_model(models / "deep/sub/model")
        lay_model(models / "org/front")
        lay_model(store / "elsewhere")
        (models / "acme/elsewhere").symlink_to("../../../store/elsewhere")
        linked = lay_model(models / "acme/linked")
        (linked / "model.safetensors").rename(store / "weights")
        (linked / "model.safetensors").symlink_to("../../../../store/weights")
        (linked / "sub").symlink_to("../../../../store/elsewhere")
        borrowed = lay_model(models / "acme/borrowed")
        (borrowed / "model.safetensors").unlink()
        (snapshot,) = (self.hub / repo_folder("org/both") / "snapshots").iterdir()
        (borrowed / "model.safetensors").symlink_to(snapshot / "model.safetensors")
        _lay_local_dir(models / "org/both", _files("both"), snapshot.name)
        # `hf download org/cached --local-dir twin`, before org/cached changed: its commit under another id.
        main = (self.hub / repo_folder("org/cached") / "refs/main").read_text()
        (old,) = {path.name for path in (self.hub / repo_folder("org/cached") / "snapshots").iterdir()} - {main}
        _lay_local_dir(models / "twin", _files("cached"), old)
        add_repo(second, "org/second", _files("second, at first"), refs=("v1",), tree=True)
        add_repo(second, "org/second", _files("second, now"), tree=True)

    def open(self) -> AbstractContextManager[hf_overlay.Session]:
        return hf_overlay.open_session(self.roots, environ=self.environ)

    def recover(self) -> list[str]:
        """What the next start does first; returns what it reports as kept."""
        return [path for cleared in clear_dead(str(self.sessions)) for path in cleared.kept]

    # What it must look like

    def check(self) -> None:
        """Fail unless all is as at the last check, but for what the user changed and what a client was to delete."""
        changed = _changes(self.mine, listing(self.users))
        assert not changed, f"P1 is broken: the user's folders changed:\n{changed}"
        before, after = self.cache, listing(self.hf_home)
        unequal = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        fine = {name for name in unequal & self.may_go if name not in after}
        fine |= {name for name in unequal & after.keys() if self._may_come(name, is_new=name not in before)}
        touched = {os.path.dirname(name) or "." for name in fine}
        touched |= {name for name in unequal if self._may_come(name, is_new=True)}  # files lie there until complete
        folders = {name for name in touched & before.keys() & after.keys() if before[name][0] == "folder"}
        fine |= {name for name in folders if before[name][:2] == after[name][:2]}  # but for size and time
        changed = _changes(
            *({name: found[name] for name in (unequal - fine) & found.keys()} for found in (before, after))
        )
        assert not changed, f"P1 is broken: the real cache changed beyond what was asked:\n{changed}"
        leading_out = {
            name: entry[4]
            for name, entry in after.items()
            if entry[0] == "link" and not os.path.normpath(f"{os.path.dirname(name)}/{entry[4]}").startswith("hub/")
        }
        assert not leading_out, f"P4 is broken: links in the real cache lead out of it: {leading_out}"
        self.cache, self.may_go = after, set()

    def _may_come(self, name: str, *, is_new: bool) -> bool:
        """Whether a download home brings this: anything new in its repo, its locks, and a ref that it moves."""
        first, *rest = name.removeprefix("hub/").removeprefix(".locks/").split("/")
        return first in self.may_come and (is_new or rest[:1] == ["refs"])

    def check_over(self) -> None:
        """Fail unless all is as it was and no session is left."""
        self.check()
        left = sorted(path.name for path in self.sessions.glob("session-*"))
        assert not left, f"P1 is broken: sessions were left behind: {left}"

    def changed_by_the_user(self) -> None:
        self.mine = listing(self.users)

    def ask(self, hub: Path, asked: Callable[[str, str], bool], *, incomplete: bool = False) -> None:
        """Note what a deletion through the overlay `hub` may take from the real cache.

        `asked` tells whether it is to delete a revision, from `type/id` and commit. Of the repos that the overlay
        shows that is: what these revisions hold alone, and the whole repo once all of its revisions are to go.
        """
        for name in self.shown(hub):
            inside = self.inside(name)
            kind, *parts = name.split("--")
            repo_id = f"{kind.removesuffix('s')}/{'/'.join(parts)}"
            commits = {path.split("/")[3] for path in inside if path.startswith(f"hub/{name}/snapshots/")}
            chosen = {commit for commit in commits if asked(repo_id, commit)}
            self.may_go |= inside if chosen == commits else self._of_revisions(inside, chosen)
            if incomplete:
                self.may_go |= {path for path in inside if path.endswith(".incomplete")}

    def shown(self, hub: Path) -> list[str]:
        """The real cache's repos that the overlay `hub` shows."""
        return [
            name
            for name in os.listdir(hub)
            if "--" in name and os.path.realpath(hub / name) == os.path.realpath(self.hub / name)
        ]

    def inside(self, name: str) -> set[str]:
        """A cached repo and all in it."""
        return {path for path in self.cache if f"{path}/".startswith(f"hub/{name}/")}

    def is_detached(self, repo_id: str, commit: str) -> bool:
        """Whether no ref of a cached repo leads to a revision."""
        kind, model_id = repo_id.split("/", 1)
        refs = f"hub/{repo_folder(model_id, kind)}/refs/"
        named = hashlib.sha1(commit.encode()).hexdigest()
        return not any(path.startswith(refs) and entry[4] == named for path, entry in self.cache.items())

    def _of_revisions(self, inside: Collection[str], commits: Collection[str]) -> set[str]:
        """Snapshots, the refs that lead to them, and blobs that no other snapshot links to."""
        named = {hashlib.sha1(commit.encode()).hexdigest() for commit in commits}
        chosen: set[str] = set()
        blobs: dict[bool, set[str]] = {True: set(), False: set()}
        for path in inside:
            kind, _, _, _, detail = self.cache[path]
            folder, inner = (*path.split("/"), "", "")[2:4]
            is_chosen = (folder == "snapshots" and inner in commits) or (folder == "refs" and detail in named)
            if is_chosen:
                chosen.add(path)
            if folder == "snapshots" and kind == "link":
                blobs[is_chosen].add(os.path.normpath(f"{os.path.dirname(path)}/{detail}"))
        return chosen | (blobs[True] - blobs[False])


def _lay_local_dir(folder: Path, files: Mapping[str, bytes], commit: str) -> None:
    """What `hf download --local-dir` leaves."""
    lay_model(folder, files)
    settle(folder)
    for name, content in files.items():
        path = folder / f".cache/huggingface/download/{name}.metadata"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{commit}\n{etag(name, content)}\n{time.time()}\n")


def _files(name: str) -> dict[str, bytes]:
    return {"config.json": CONFIG, "model.safetensors": f"weights of {name}".encode(), "sub/vocab.json": b"{}"}


def _changes(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> str:
    names = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    return "\n".join(f"  {name}: {before.get(name)} -> {after.get(name)}" for name in names)


def commits(hub: Path, model_id: str) -> list[str]:
    """The revisions that an overlay shows of a model."""
    try:
        return sorted(os.listdir(hub / repo_folder(model_id) / "snapshots"))
    except OSError:
        return []


def contents(model: hf_overlay.Model) -> dict[str, str]:
    """What loading a model must read: name -> sha1."""
    return {file.name: hashlib.sha1(Path(model.path, file.name).read_bytes()).hexdigest() for file in model.files}


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A folder of the test's own; in memory where the system offers that, since disks take many times as long."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with TemporaryDirectory(prefix="users-bytes-", dir=memory) as path:
            yield Path(path)
    else:
        yield tmp_path


@pytest.fixture
def world(base: Path) -> World:
    return World(base)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Worker]]:
    """The client process of a release, started when first asked for."""
    with ExitStack() as stack:
        started: dict[str, Worker] = {}

        def get(release: str) -> Worker:
            if release not in started:
                started[release] = stack.enter_context(hubs.open_worker(release, tmp_path_factory.mktemp("client")))
            return started[release]

        yield get


@pytest.fixture(params=hubs.ALL)
def client(request: pytest.FixtureRequest, workers: Callable[[str], Worker]) -> Worker:
    """A client of each release."""
    return workers(request.param)


# The clients -------------------------------------------------------------------------------------------------------


def test_the_releases_are_those_whose_deletions_differ(client: Worker) -> None:
    makefile = Path(__file__).parents[2] / "Makefile"
    assert f"HUB_VERSIONS := {' '.join(hubs.ASIDE)}\n" in makefile.read_text()
    if client.release == hubs.INSTALLED:
        assert int(client.version.split(".")[0]) >= 2
    else:
        assert client.version == client.release


def test_every_model_loads_so_that_there_is_something_to_lose(world: World, client: Worker) -> None:
    with world.open() as session:
        scanned = client.ask("scan", hub=str(session.hub_cache)).value
        assert set(scanned) == {f"model/{model_id}" for model_id in (*CUSTOM, *CACHED)} | {"dataset/org/data"}
        assert all(len(found) == (1 if name[6:] in CUSTOM else len(found)) for name, found in scanned.items())
        for model in session.models:
            answer = load(world, client, session.hub_cache, model.id)
            if model.id.count("/") > 1:
                assert answer.error is not None
                assert answer.error.startswith("HFValidationError")
            else:
                assert answer == Answer(contents(model), None)
                for how in ("file", "cached"):
                    one = client.ask(how, hub=str(session.hub_cache), model_id=model.id, name="config.json")
                    assert one == Answer({"config.json": answer.value["config.json"]}, None)
    world.check_over()


def test_a_client_refuses_to_delete_a_link_to_a_repo_or_takes_just_the_link(world: World, client: Worker) -> None:
    """Else the deletions tested here would not be deletions."""
    world.roots[0].joinpath("twin").rename(world.users / "twin")  # else the next test's matter
    world.changed_by_the_user()
    with world.open() as session:
        for model_id in [*CUSTOM[:-1], *CACHED]:
            answer = remove_repo(world, client, session.hub_cache, model_id)
            is_there = os.path.lexists(session.hub_cache / repo_folder(model_id))
            if client.release in hubs.FOLLOWING_LINKS:
                assert "symbolic link" in (answer.error or "")
                assert is_there
            else:
                assert answer == Answer("done", None)
                assert not is_there
    world.check_over()


# Each operation once ------------------------------------------------------------------------------------------------


Operation = Callable[[World, Worker, Path, str], Answer | None]
"""Does something about one id through an overlay's hub folder; returns what the client said, where there is one."""


def load(_world: World, client: Worker, hub: Path, model_id: str) -> Answer:
    for how in ("file", "cached"):
        client.ask(how, hub=str(hub), model_id=model_id, name="config.json")
    return client.ask("snapshot", hub=str(hub), model_id=model_id)


def force_download(_world: World, client: Worker, hub: Path, model_id: str) -> Answer:
    client.ask("force_download", hub=str(hub), model_id=model_id, name="config.json")
    return client.ask("force_download", hub=str(hub), model_id=model_id, name=None)


def remove_repo(world: World, client: Worker, hub: Path, model_id: str) -> Answer:
    world.ask(hub, lambda repo_id, _: repo_id == f"model/{model_id}")
    return client.ask("remove", hub=str(hub), targets=[f"model/{model_id}"])


def remove_revisions(world: World, client: Worker, hub: Path, model_id: str) -> None:
    for commit in commits(hub, model_id):
        world.ask(hub, partial(_is, commit))
        client.ask("remove", hub=str(hub), targets=[commit])
        world.check()


def delete_revisions(world: World, client: Worker, hub: Path, model_id: str) -> None:
    for commit in commits(hub, model_id):
        world.ask(hub, partial(_is, commit))
        client.ask("delete_revisions", hub=str(hub), commits=[commit])
        world.check()


def _is(commit: str, _repo_id: str, other: str) -> bool:
    return commit == other


def prune(world: World, client: Worker, hub: Path, _model_id: str) -> Answer:
    world.ask(hub, world.is_detached, incomplete=True)
    return client.ask("prune", hub=str(hub))


def delete_all_revisions(world: World, client: Worker, hub: Path, _model_id: str) -> Answer:
    world.ask(hub, lambda *_: True)
    return client.ask("delete_all_revisions", hub=str(hub))


def delete_one_file(world: World, client: Worker, hub: Path, model_id: str) -> Answer:
    world.ask(hub, lambda repo_id, _: repo_id == f"model/{model_id}")
    world.may_go = {path for path in world.may_go if "/blobs/" in path or path.endswith("/model.safetensors")}
    return client.ask("delete_files", hub=str(hub), model_id=model_id, name="model.safetensors")


def delete_files(world: World, client: Worker, hub: Path, model_id: str) -> Answer:
    world.ask(hub, lambda repo_id, _: repo_id == f"model/{model_id}")
    return client.ask("delete_files", hub=str(hub), model_id=model_id, name=None)


def manage_delete(world: World, client: Worker, hub: Path, pattern: str) -> Answer:
    world.ask(hub, lambda repo_id, _: pattern in repo_id.split("/", 1)[1])
    return client.ask("manage_delete", hub=str(hub), pattern=pattern)


def remove_folder(world: World, _client: Worker, hub: Path, model_id: str, *, how: str) -> None:
    """Deletions without huggingface_hub, of what a cached repo's folder holds, or only seems to."""
    name = repo_folder(model_id)
    if name in world.shown(hub):
        world.may_go |= world.inside(name)
    try:
        REMOVALS[how](hub / name)
    except OSError:
        pass  # as rmtree does at a link


REMOVALS: dict[str, Callable[[Path], None]] = {
    "unlink": os.unlink,
    "rmtree of the link": shutil.rmtree,
    "rmtree through the link": lambda path: shutil.rmtree(f"{path}/"),
    "rmtree of what it leads to": lambda path: shutil.rmtree(path.resolve(strict=True)),
    "rmtree of the snapshots": lambda path: shutil.rmtree(path / "snapshots"),
}
OPERATIONS: dict[str, Operation] = {
    "load": load,
    "forced download": force_download,
    "hf cache rm model/ID": remove_repo,
    "hf cache rm COMMIT": remove_revisions,
    "hf cache prune": prune,
    "delete_revisions of one": delete_revisions,
    "delete_revisions of all": delete_all_revisions,
    "delete_files of one": delete_one_file,
    "delete_files of all": delete_files,
    "mlx_lm.manage --delete": manage_delete,
    **{how: partial(remove_folder, how=how) for how in REMOVALS},
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_no_operation_touches_a_users_file_or_another_cached_model(
    world: World, client: Worker, operation: Operation
) -> None:
    """On every model, and neither do a refresh, the session's end and the next start after it."""
    with world.open() as session:
        for model_id in (*CUSTOM, *CACHED):
            operation(world, client, session.hub_cache, model_id)
            session.refresh()
            world.check()
    world.check_over()
    assert world.recover() == []
    world.check_over()


def test_no_two_repos_of_an_overlay_have_the_same_commit(world: World, client: Worker) -> None:
    """A client deletes by commit, whichever repo it meets first: asked for one model it would take another."""
    with world.open() as session:
        scanned: dict[str, list[str]] = client.ask("scan", hub=str(session.hub_cache)).value
    owners: dict[str, list[str]] = {}
    for repo_id, found in scanned.items():
        for commit in found:
            owners.setdefault(commit, []).append(repo_id)
    shared = sorted(repo_ids for repo_ids in owners.values() if len(repo_ids) > 1)
    assert not shared, f"P1 is broken: deleting one of these may delete the other: {shared}"


@pytest.mark.parametrize("is_root", [False, True], ids=["as a user", "as root"])
@pytest.mark.parametrize(
    "operation", ["hf cache prune", "hf cache rm COMMIT", "delete_revisions of one", "mlx_lm.manage --delete"]
)
def test_a_newer_revision_that_a_client_downloads_does_not_lead_deletions_to_the_users(
    world: World, client: Worker, operation: str, is_root: bool
) -> None:
    """With two revisions in a repo, releases up to 1.31 delete the files of one where all links end."""
    model_id = "acme/tiny"
    world.may_come.add(repo_folder(model_id))
    with LoopbackHub() as newer, world.open() as session:
        newer.add_repo(model_id, _files("the Hub's own"))
        hub = session.hub_cache
        (mine,) = commits(hub, model_id)
        environment = (
            session.environment
            | newer.environment(Path(world.environ["HOME"]))
            | {
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
                **hubs.environment(client.release),
            }
        )
        if is_root:
            unseal(hub / repo_folder(model_id))
        download = (
            "import huggingface_hub; from tests.support.permissions import respected\n"
            f"with respected(): huggingface_hub.snapshot_download({model_id!r})"
        )
        done = finish([PYTHON, "-c", download], environment, cwd=Path(__file__).parents[2])
        if is_root:
            assert done.status == 0, done
            assert len(commits(hub, model_id)) == 2
        else:
            assert "Permission denied" in done.err, "a second revision beside a user's model was not refused"
            assert commits(hub, model_id) == [mine]
        OPERATIONS[operation](world, client, hub, model_id)
        world.check()
    world.check()


# With real programs -------------------------------------------------------------------------------------------------

WITH_HF_CACHE_RM = [release for release in hubs.ALL if release != "0.36.2"]
"""0.36.2 has no such command, and the transformers that mlx-lm needs do not work with it."""


@pytest.mark.parametrize("release", WITH_HF_CACHE_RM)
def test_hf_cache_rm_deletes_nothing_of_the_users(world: World, release: str) -> None:
    with world.open() as session:
        command = [PYTHON, "-m", "huggingface_hub.cli.hf", "cache", "rm", "model/acme/tiny", "model/org/second", "-y"]
        done = finish(command, session.environment | hubs.environment(release))
        is_refused = "symbolic link" in done.out + done.err
        assert is_refused == (release in hubs.FOLLOWING_LINKS), done
        assert (done.status != 0) == is_refused, done
        world.check()
    world.check_over()


@pytest.mark.parametrize("release", WITH_HF_CACHE_RM)
def test_hf_cache_prune_deletes_nothing_of_the_users(world: World, release: str) -> None:
    with world.open() as session:
        world.ask(session.hub_cache, world.is_detached, incomplete=True)
        command = [PYTHON, "-m", "huggingface_hub.cli.hf", "cache", "prune", "-y"]
        done = finish(command, session.environment | hubs.environment(release))
        assert "About to delete" in done.out, done
        world.check()
    world.check_over()


@pytest.mark.parametrize("release", WITH_HF_CACHE_RM)
def test_mlx_lm_manage_deletes_nothing_of_the_users(world: World, release: str) -> None:
    with world.open() as session:
        world.ask(session.hub_cache, lambda repo_id, _: "c" in repo_id.split("/", 1)[1])
        command = [PYTHON, "-m", "mlx_lm", "manage", "--delete", "--pattern", "c"]
        done = finish(command, session.environment | hubs.environment(release), stdin=b"y\n")
        assert "Found the following models" in done.out, done
        assert "acme/tiny" in done.out, done
        world.check()
    world.check_over()


# What clients wrote into the tree -----------------------------------------------------------------------------------


def unseal(repo: Path) -> None:
    """A repo as it is to root, whom no mode stops."""
    for sealed in ("refs", "refs/main", "snapshots"):
        if (repo / sealed).exists():
            (repo / sealed).chmod(0o700)


def download(world: World, hub: Path, model_id: str, payload: bytes) -> None:
    """What a download leaves: of a model that was nowhere, or of another revision than the one there is."""
    repo = hub / repo_folder(model_id)
    world.may_come.add(repo.name)
    unseal(repo)
    config = repo / "blobs" / etag("config.json", CONFIG)
    if config.is_symlink() and not config.exists():
        config.unlink()  # a client renames over it
    add_repo(hub, model_id, {"config.json": CONFIG, "model.safetensors": payload}, tree=True)


def held(world: World, payloads: Collection[bytes]) -> set[bytes]:
    """Which downloads are still anywhere: in a session, or in the real cache."""
    folders = (world.sessions, world.hub) if payloads else ()
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {content for path in files if (content := path.read_bytes()) in payloads}


@pytest.mark.parametrize("is_killed", [False, True], ids=["ended", "killed"])
@pytest.mark.parametrize("model_id", ["org/new", "acme/tiny", "org/front"])
def test_a_download_that_cannot_come_home_stays_and_is_reported_at_each_start(
    world: World, workers: Callable[[str], Worker], model_id: str, is_killed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A new model's, or one into a repo of the user's; once what was in its way is gone, the next start moves it."""
    caplog.set_level(logging.WARNING, "hf_overlay")
    payload = b"downloaded"
    with ExitStack() as stack:
        if is_killed:
            assert kill_owner(world, workers(hubs.INSTALLED), kill_at=0, refreshes=0)
            (session,) = world.sessions.glob("session-*")
            hub = session / "home/hub"
        else:
            hub = stack.enter_context(world.open()).hub_cache
        download(world, hub, model_id, payload)
        where = os.path.realpath(hub / repo_folder(model_id))
        world.hub.rename(world.hub.with_name("away"))
        world.hub.write_bytes(b"in the way")
    for _ in range(2):
        assert world.recover() == [where], "P3 is broken: a download is not reported"
        assert where in caplog.text, "P3 is broken: nobody is told where a download is"
        assert held(world, [payload]), "P3 is broken: clearing a session deleted a download"
        caplog.clear()
    world.hub.unlink()
    world.hub.with_name("away").rename(world.hub)
    world.cache["."] = listing(world.hf_home)["."]
    world.check()
    assert world.recover() == []
    found = world.hub / repo_folder(model_id) / "snapshots"
    assert payload in [path.read_bytes() for path in found.glob("*/model.safetensors")], (
        "P3 is broken: not brought home"
    )
    world.check_over()


def test_a_download_into_a_users_repo_outlives_that_its_drive_goes_and_comes_back(world: World) -> None:
    payload = b"downloaded"
    with world.open() as session:
        download(world, session.hub_cache, "acme/tiny", payload)
        away = world.drive.rename(world.users / "away")
        session.refresh()
        assert held(world, [payload]), "P3 is broken: a refresh deleted a download"
        away.rename(world.drive)
        world.changed_by_the_user()
        session.refresh()
        assert held(world, [payload]), "P3 is broken: a refresh deleted a download"
    assert held(world, [payload]), "P3 is broken: the session's end deleted a download"
    world.check_over()


def test_a_download_in_place_of_a_users_repo_outlives_that_the_users_folder_goes(world: World) -> None:
    """A client deletes a user's model and downloads it again; later the drive goes away."""
    payload = b"downloaded"
    with world.open() as session:
        os.unlink(session.hub_cache / repo_folder("acme/tiny"))  # as `hf cache rm` does from 1.32 on
        download(world, session.hub_cache, "acme/tiny", payload)
        lay_model(world.roots[0] / "acme/added")
        session.refresh()
        world.drive.rename(world.users / "away")
        world.changed_by_the_user()
        session.refresh()
        assert held(world, [payload]), "P3 is broken: a refresh deleted a download"
    assert held(world, [payload]), "P3 is broken: the session's end deleted a download"
    world.check_over()


# Killed at every step -----------------------------------------------------------------------------------------------


def kill_owner(world: World, worker: Worker, kill_at: int, refreshes: int) -> bool:
    """Kill the owner of a session right before its change `kill_at` to a disk; False when it came to its end."""
    answer = worker.ask(
        "own_a_session",
        link=str(world.link),
        targets=[str(root) for root in world.roots],
        environ=world.environ,
        refreshes=refreshes,
        kill_at=kill_at,
    )
    return bool(answer.value["killed"])


@pytest.mark.parametrize("is_recovered", [True, False], ids=["then recovered", "then killed again"])
def test_an_owner_killed_at_any_step_loses_nothing_and_leaves_nothing(
    world: World, workers: Callable[[str], Worker], is_recovered: bool
) -> None:
    """Before each change to a disk in turn: at recovery, start, two refreshes that change all models, and end."""
    for folder in world.roots[0].iterdir():
        if folder.name != "solo":
            shutil.rmtree(folder)
    world.changed_by_the_user()
    for kill_at in range(1, 2000):
        was_killed = kill_owner(world, workers(hubs.INSTALLED), kill_at, refreshes=2)
        if is_recovered:
            assert world.recover() == [], f"killed at step {kill_at}"
            world.check_over()
        if not was_killed:
            break
    else:
        pytest.fail("the owner never came to its end")
    assert kill_at > 50, "the owner did less than a session takes"
    assert world.recover() == []
    world.check_over()


# In any order -------------------------------------------------------------------------------------------------------

IDS = st.sampled_from([*CUSTOM, *CACHED, "acme/added", "org/new0", "org/absent"])
WHICH = st.integers(0, 1)
is_open = precondition(lambda self: bool(self.open))


class Lives(RuleBasedStateMachine):
    """Sessions, clients, a user and a killer at work on one world, which is checked after each step."""

    def __init__(self, base: Path, client: Worker) -> None:
        super().__init__()
        self.base = base
        self.world = World(base)
        self.client = client
        self.open: list[tuple[ExitStack, hf_overlay.Session]] = []
        self.loadable: dict[str, dict[str, str]] = {}
        """What the newest session must give for an id; nothing once anything else has happened."""
        self.payloads: list[bytes] = []

    @contextmanager
    def by_us(self) -> Iterator[None]:
        """A step of the overlay's own, which deletes no download."""
        before = held(self.world, self.payloads)
        yield
        lost = before - held(self.world, self.payloads)
        assert not lost, f"P3 is broken: downloads were deleted: {lost}"

    def session(self, which: int) -> hf_overlay.Session:
        return self.open[which % len(self.open)][1]

    def operate(self, which: int, model_id: str, operation: str) -> None:
        OPERATIONS[operation](self.world, self.client, self.session(which).hub_cache, model_id)
        self.loadable = {}

    def new_payload(self) -> bytes:
        self.payloads.append(f"payload {len(self.payloads)}".encode())
        return self.payloads[-1]

    # Sessions

    @initialize()
    def start_first(self) -> None:
        self.start()

    @precondition(lambda self: len(self.open) < 2)
    @rule()
    def start(self) -> None:
        with self.by_us():
            stack = ExitStack()
            self.open.append((stack, stack.enter_context(self.world.open())))
        models = self.session(-1).models
        self.loadable = {model.id: contents(model) for model in models if model.id.count("/") < 2}

    @is_open
    @rule(which=WHICH)
    def refresh(self, which: int) -> None:
        with self.by_us():
            self.session(which).refresh()

    @is_open
    @rule(which=WHICH)
    def end(self, which: int) -> None:
        with self.by_us():
            self.open.pop(which % len(self.open))[0].close()
        self.loadable = {}

    @rule(kill_at=st.integers(0, 500), refreshes=st.integers(0, 3))
    def kill_an_owner(self, kill_at: int, refreshes: int) -> None:
        with self.by_us():
            kill_owner(self.world, self.client, kill_at, refreshes)

    @is_open
    @rule(which=WHICH)
    def let_an_hour_pass(self, which: int) -> None:
        """For the hub folders of before a refresh, which are kept so long."""
        for path in (self.session(which).path / "hubs").iterdir():
            os.utime(path, (1, 1))

    # Clients

    @is_open
    @rule(model_id=IDS)
    def load(self, model_id: str) -> None:
        answer = load(self.world, self.client, self.session(-1).hub_cache, model_id)
        if model_id in self.loadable:
            assert answer == Answer(self.loadable[model_id], None)

    @is_open
    @rule(which=WHICH, model_id=IDS)
    def force_download(self, which: int, model_id: str) -> None:
        self.operate(which, model_id, "forced download")

    @is_open
    @rule(which=WHICH, model_id=IDS, operation=st.sampled_from(["hf cache rm model/ID", "hf cache rm COMMIT"]))
    def hf_cache_rm(self, which: int, model_id: str, operation: str) -> None:
        self.operate(which, model_id, operation)

    @is_open
    @rule(which=WHICH, operation=st.sampled_from(["hf cache prune", "delete_revisions of all"]))
    def clean_up(self, which: int, operation: str) -> None:
        self.operate(which, "", operation)

    @is_open
    @rule(which=WHICH, model_id=IDS)
    def delete_revisions(self, which: int, model_id: str) -> None:
        self.operate(which, model_id, "delete_revisions of one")

    @is_open
    @rule(which=WHICH, model_id=IDS, operation=st.sampled_from(["delete_files of one", "delete_files of all"]))
    def delete_files(self, which: int, model_id: str, operation: str) -> None:
        self.operate(which, model_id, operation)

    @is_open
    @rule(which=WHICH, pattern=IDS | st.sampled_from(["acme", "o"]))
    def mlx_lm_manage_delete(self, which: int, pattern: str) -> None:
        self.operate(which, pattern, "mlx_lm.manage --delete")

    @is_open
    @rule(which=WHICH, model_id=IDS, how=st.sampled_from([*REMOVALS]))
    def remove_folder(self, which: int, model_id: str, how: str) -> None:
        self.operate(which, model_id, how)

    @is_open
    @rule(which=WHICH)
    def download_a_new_model(self, which: int) -> None:
        hub = self.session(which).hub_cache
        download(self.world, hub, f"org/new{len(self.payloads)}", self.new_payload())

    @is_open
    @rule(which=WHICH, model_id=st.sampled_from(["acme/tiny", "org/both", "org/front", "org/second", "solo", "twin"]))
    def download_a_newer_revision(self, which: int, model_id: str) -> None:
        hub = self.session(which).hub_cache
        if repo_folder(model_id) not in self.world.shown(hub):
            try:
                download(self.world, hub, model_id, self.new_payload())
            except FileExistsError:
                pass  # as a client does where another one has removed what the link leads to
            self.loadable = {}

    # The user

    @rule(
        model_id=st.sampled_from(CHANGING),
        what=st.sampled_from(["weights", "file", "time", "gone", "plug"]),
        is_noticed=st.booleans(),
    )
    def change(self, model_id: str, what: str, is_noticed: bool) -> None:
        """Bring the drive back if it is away; else take it away, or change a model on it. Then refresh, perhaps."""
        away = self.world.users / "away"
        folder = self.world.roots[0] / model_id
        if away.exists():
            away.rename(self.world.drive)
        elif what == "plug":
            self.world.drive.rename(away)
        elif not folder.exists():
            lay_model(folder)
        elif what == "gone":
            shutil.rmtree(folder)
        elif what == "time":
            settle(folder)
        else:
            path = folder / ("model.safetensors" if what == "weights" else "added.json")
            path.write_bytes((path.read_bytes() if path.exists() else b"") + b"{}")
        self.world.changed_by_the_user()
        self.loadable = {}
        for which in range(len(self.open) if is_noticed else 0):
            self.refresh(which)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        with self.by_us():
            for stack, _ in self.open:
                stack.close()
            self.world.recover()
        self.world.check()
        for session in self.world.sessions.glob("session-*"):
            files = {path.read_bytes() for path in session.rglob("*") if path.is_file() and not path.is_symlink()}
            assert files & set(self.payloads), f"a session was left behind for nothing: {session}"
        shutil.rmtree(self.base)


@pytest.mark.timeout(900)  # a failure takes minutes to be made small
def test_nothing_is_lost_in_any_order(base: Path, client: Worker) -> None:
    numbers = itertools.count()

    class LivesHere(Lives):
        def __init__(self) -> None:
            super().__init__(base / f"life{next(numbers)}", client)

    run_state_machine_as_test(
        LivesHere,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
