"""The overlay is one plain cache that holds what wins: each read call of huggingface_hub answers the same on both.

Folders and caches are drawn; what should win is written by hand into a plain cache (`lay_expected`), without a line
of the overlay's code; every release of huggingface_hub reads both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import hf_overlay
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support import hubs
from tests.support.folders import settle
from tests.support.hfcache import add_repo, etag, listing, repo_folder
from tests.support.reader import Call, Reader, open_readers

Kind = Literal["llama", "sharded", "pipeline", "other type", "no weights", "no json", "half copied"]
Layout = Literal["folder", "linked folder", "linked files", "cache"]
RepoType = Literal["model", "dataset", "space"]

LOADED_BY_MLX: tuple[Kind, ...] = ("llama", "sharded")
LOADED_BY_ANY = (*LOADED_BY_MLX, "pipeline", "other type", "no weights")
IDS = ("acme/tiny", "zoo/tiny", "solo", "org/sub/deep", "my org/odd é")
BY_PATH_ONLY = "acme/x--y"
"""An id that a cache's layout cannot hold; as a cached repo the name stands for another id."""
EXTRAS = ("tokenizer.json", "nested/deep/file.txt", "1_Pooling/config.json", ".gitattributes", "a b é.txt")
TWINS = ("twin-1.txt", "twin-2.txt")
"""Equal bytes, which are one blob where the Hub's etags are known."""
JUNK = (
    "._config.json",
    ".DS_Store",
    "nested/._file.txt",
    "model.safetensors.incomplete",
    ".cache/huggingface/.gitignore",
    ".git/config",
)


# What is drawn -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Custom:
    """A model in a model path."""

    id: str
    kind: Kind
    layout: Layout
    from_hub: Literal["no", "yes", "changed since"]
    """Whether `hf download --local-dir` left its metadata beside the files."""
    extras: frozenset[str]
    junk: bool
    is_settled: bool
    refs: tuple[str, ...]
    """In cache layout only."""
    salt: int

    @property
    def is_identified(self) -> bool:
        """Whether the Hub's commit and etags are known."""
        return self.layout == "cache" or self.from_hub == "yes"

    def commit(self, root: str) -> str:
        return hashlib.sha1(f"{self.id} {root} {self.layout} {self.salt}".encode()).hexdigest()

    def contents(self, root: str) -> dict[str, bytes]:
        names = {"llama": ["model.safetensors"], "other type": ["model.safetensors"], "no json": ["model.safetensors"]}
        shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        config = {"model_type": "no such type" if self.kind == "other type" else "llama", "salt": self.salt}
        files = {"config.json": b"{" if self.kind == "no json" else json.dumps(config).encode()}
        if self.kind == "pipeline":
            files = {"model_index.json": b'{"_class_name": "Pipeline"}', "unet/config.json": b"{}"}
        if self.kind in ("sharded", "half copied"):
            files["model.safetensors.index.json"] = json.dumps(
                {"weight_map": dict.fromkeys("ab", shards[0]) | {"c": shards[1]}}
            ).encode()
            names[self.kind] = shards if self.kind == "sharded" else shards[:1]
        for name in [*names.get(self.kind, []), *self.extras]:
            files[name] = f"{name} of {self.id} in {root}, {self.salt}".encode()
        return files | (dict.fromkeys(TWINS, b"twins") if self.is_identified else {})


@dataclass(frozen=True)
class Cached:
    """A repo in the real cache."""

    id: str
    type: RepoType
    revisions: int
    refs: Mapping[str, int]
    """Name -> number of the revision."""
    fault: str
    has_tree: bool
    salt: int

    def commit(self, revision: int) -> str:
        return hashlib.sha1(f"{self.type} {self.id} {revision} {self.salt}".encode()).hexdigest()


@dataclass(frozen=True)
class World:
    """The disk: two model paths and the real cache."""

    roots: tuple[Sequence[Custom], Sequence[Custom]]
    cached: Sequence[Cached]
    others: frozenset[str]
    """What lies beside the repos in the real cache."""
    all_kinds: bool = field(default=False)


def customs(id_: str) -> st.SearchStrategy[Custom]:
    return st.builds(
        Custom,
        id=st.just(id_),
        kind=st.sampled_from([*LOADED_BY_ANY, *LOADED_BY_MLX, "no json", "half copied"]),
        layout=st.sampled_from(["folder", "linked folder", "linked files", "cache"]),
        from_hub=st.sampled_from(["no", "yes", "changed since"]),
        extras=st.frozensets(st.sampled_from(EXTRAS)),
        junk=st.booleans(),
        is_settled=st.booleans(),
        refs=st.sampled_from([("main",), ("main", "v1"), ()]),
        salt=st.integers(0, 3),
    )


ROOTS = (
    st.lists(st.sampled_from([*IDS, BY_PATH_ONLY]).flatmap(customs), max_size=6)
    # A folder holds one thing of a name; the cache layout's names are its own.
    .map(lambda drawn: list({(each.id, each.layout == "cache"): each for each in drawn}.values()))
    .map(lambda drawn: [each for each in drawn if each.layout != "cache" or each.id != BY_PATH_ONLY])
)


def refs(revisions: int) -> st.SearchStrategy[dict[str, int]]:
    return st.dictionaries(st.sampled_from(["main", "v1", "refs/pr/1"]), st.integers(0, revisions - 1))


# Faults of one cached repo: what each does to its folder.
def dangling_file(repo: Path, snapshot: Path) -> None:
    (snapshot / "gone.bin").symlink_to("../../blobs/gone")


def ref_to_nothing(repo: Path, snapshot: Path) -> None:
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/gone").write_text("e" * 40)


def no_snapshots(repo: Path, snapshot: Path) -> None:
    shutil.rmtree(repo / "snapshots")


def file_in_snapshots(repo: Path, snapshot: Path) -> None:
    (repo / "snapshots/._junk").write_bytes(b"")


def incomplete_download(repo: Path, snapshot: Path) -> None:
    (repo / "blobs/abc.incomplete").write_bytes(b"half")


def finder_file_in_refs(repo: Path, snapshot: Path) -> None:
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/.DS_Store").write_bytes(b"\0\0\0\1Bud1\xff\xfe")


def file_in_place_of_the_repo(repo: Path, snapshot: Path) -> None:
    shutil.rmtree(repo)
    repo.write_bytes(b"")


def binary_ref(repo: Path, snapshot: Path) -> None:
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/odd").write_bytes(b"\xff\xfe")


def apple_double_ref(repo: Path, snapshot: Path) -> None:
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/._main").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X\xa3\xb0")


def dangling_ref(repo: Path, snapshot: Path) -> None:
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs/lost").symlink_to("nowhere")


def dangling_revision(repo: Path, snapshot: Path) -> None:
    (repo / "snapshots" / ("f" * 40)).symlink_to("nowhere")


Fault = Callable[[Path, Path], None]
REPORTED: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        dangling_file,
        ref_to_nothing,
        no_snapshots,
        file_in_snapshots,
        incomplete_download,
        finder_file_in_refs,
        file_in_place_of_the_repo,
    )
}
"""A scan of the plain cache gets over these, with a warning or without."""
RAISING: dict[str, Fault] = {
    fault.__name__: fault for fault in (binary_ref, apple_double_ref, dangling_ref, dangling_revision)
}
"""These make every scan of the plain cache fail."""

CACHED = st.tuples(
    st.sampled_from([*IDS, "acme/x/y"]), st.sampled_from(["model", "model", "dataset", "space"])
).flatmap(
    lambda name: st.integers(1, 3).flatmap(
        lambda revisions: st.builds(
            Cached,
            id=st.just(name[0]),
            type=st.just(name[1]),
            revisions=st.just(revisions),
            refs=refs(revisions),
            fault=st.one_of(st.just(""), st.sampled_from(["", *REPORTED, *RAISING])),
            has_tree=st.booleans(),
            salt=st.integers(0, 3),
        )
    )
)
OTHERS: dict[str, Callable[[Path], object]] = {
    ".DS_Store": lambda path: path.write_bytes(b"\0\xff"),
    "._models--acme--tiny": lambda path: path.write_bytes(b"\0\xff"),
    "version.txt": lambda path: path.write_text("1"),
    "CACHEDIR.TAG": lambda path: path.write_text("Signature: 8a477f597d28d172789f06886806bc55"),
    ".locks": lambda path: (path / "models--acme--tiny").mkdir(parents=True),
    "tmp0123": lambda path: path.mkdir(),
    "models--": lambda path: path.mkdir(),
    "models--gone": lambda path: path.symlink_to("/nonexistent/models--gone"),
    "models--empty--one": lambda path: path.mkdir(),
    "kernels--acme--fast": lambda path: add_repo(path.parent, "acme/fast", {"a": b"a"}, repo_type="kernel"),
}
LEFT_OUT_OTHERS = (".DS_Store", "._models--acme--tiny")
"""Never part of an overlay: the plain cache reports some of them, so it may only report less."""

WORLDS = st.builds(
    World,
    roots=st.tuples(ROOTS, ROOTS),
    cached=st.lists(CACHED, max_size=4, unique_by=lambda each: (each.type, each.id)),
    others=st.frozensets(st.sampled_from(sorted(OTHERS)), max_size=4),
    all_kinds=st.booleans(),
)


ASIDE = st.sampled_from(hubs.ASIDE)
"""The release that reads beside the installed one."""


# On disk -------------------------------------------------------------------------------------------------------


class Place:
    """Folders for one example."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.roots = [top / "drive", top / "second drive"]
        self.hub = top / "hf home" / "hub"
        self.environ = {
            "HOME": str(top),
            "PATH": os.environ["PATH"],
            "HF_HOME": str(self.hub.parent),
            "HF_OVERLAY_DIR": str(top / "sessions"),
        }

    def lay(self, world: World) -> None:
        for path in (*self.roots, self.top / "elsewhere", self.hub):
            if path.exists():
                shutil.rmtree(path)
        for root, folders in zip(self.roots, world.roots, strict=True):
            root.mkdir()
            for custom in folders:
                lay_custom(root, custom, self.top / "elsewhere")
        for cached in world.cached:
            lay_cached(self.hub, cached)
        for name in sorted(world.others):
            self.hub.mkdir(parents=True, exist_ok=True)
            OTHERS[name](self.hub / name)


def lay_custom(root: Path, custom: Custom, elsewhere: Path) -> None:
    contents, commit = custom.contents(root.name), custom.commit(root.name)
    if custom.layout == "cache":
        if "main" in custom.refs:
            old = contents | {"config.json": b'{"model_type": "llama", "old": true}'}
            add_repo(root, custom.id, old, commit="0" * 40, refs=())
        add_repo(root, custom.id, contents, commit=commit, refs=custom.refs)
        return
    folder = root / custom.id
    folder.parent.mkdir(parents=True, exist_ok=True)
    target = elsewhere / root.name / custom.id
    if custom.layout == "linked folder":
        target.mkdir(parents=True)
        folder.symlink_to(target)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if custom.layout == "linked files":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(target / name)
        (folder / name).write_bytes(content)
    for name in JUNK if custom.junk else ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\xff junk")
    if custom.is_settled:
        settle(folder)
    if custom.from_hub != "no":
        for name, content in contents.items():
            metadata = folder / ".cache/huggingface/download" / f"{name}.metadata"
            metadata.parent.mkdir(parents=True, exist_ok=True)
            written = (folder / name).stat().st_mtime + (5 if custom.from_hub == "yes" else -5)
            metadata.write_text(f"{commit}\n{etag(name, content)}\n{written}\n")


def lay_cached(hub: Path, cached: Cached) -> None:
    snapshot = hub
    for revision in range(cached.revisions):
        snapshot = add_repo(
            hub,
            cached.id,
            {
                "config.json": b'{"model_type": "llama"}',
                "model.safetensors": f"{cached.id} {revision} {cached.salt}".encode(),
                "nested/deep/file.txt": b"nested",
            },
            repo_type=cached.type,
            commit=cached.commit(revision),
            refs=[name for name, number in cached.refs.items() if number == revision],
            no_exist=("no such.json",),
            tree=cached.has_tree,
        )
    if cached.fault:
        (REPORTED | RAISING)[cached.fault](snapshot.parents[1], snapshot)


def winners(world: World) -> dict[str, tuple[Custom, str]]:
    """The precedence, said once more: first model path first, in it a folder before a cache's repo."""
    won: dict[str, tuple[Custom, str]] = {}
    for name, folders in zip(("drive", "second drive"), world.roots, strict=True):
        for custom in sorted(folders, key=lambda each: each.layout == "cache"):
            if custom.kind in (LOADED_BY_ANY if world.all_kinds else LOADED_BY_MLX):
                won.setdefault(custom.id, (custom, name))
    return won


def lay_expected(plain: Path, place: Place, world: World) -> dict[str, str]:
    """Make the plain cache that holds what wins; returns the commits of the users' models in it."""
    plain.mkdir()
    commits = {}
    for model_id, (custom, root) in winners(world).items():
        if model_id != BY_PATH_ONLY:
            commit = custom.commit(root)
            add_repo(plain, model_id, custom.contents(root), commit=commit, tree=True)
            commits[model_id] = commit
    for cached in world.cached:
        name = repo_folder(cached.id, cached.type)
        if cached.fault not in RAISING and not (plain / name).exists():
            if (place.hub / name).is_dir():
                shutil.copytree(place.hub / name, plain / name, symlinks=True)
            else:
                shutil.copy(place.hub / name, plain / name)
    for name in world.others.difference(LEFT_OUT_OTHERS):
        OTHERS[name](plain / name)
    return commits


# What is asked -------------------------------------------------------------------------------------------------


def calls(world: World) -> list[Call]:
    """Every read call for every repo there might be, by name and by commit."""
    asked: list[Call] = [("scan", {})]
    for repo_type, repo_id in repos(world):
        repo = {"repo_id": repo_id, "repo_type": repo_type}
        for revision in [None, "v1", "refs/pr/1", *commits_of(world, repo_type, repo_id)]:
            at = repo | {"revision": revision}
            asked += [("snapshot", at), ("tree", at), ("snapshot", at | {"allow_patterns": ["*.json"]})]
            for name in ("config.json", "nested/deep/file.txt", "no such.json", "absent.txt"):
                asked += [("file", at | {"filename": name}), ("cached", at | {"filename": name})]
    return asked


def repos(world: World) -> list[tuple[str, str]]:
    found = {("model", custom.id) for root in world.roots for custom in root}
    found |= {(cached.type, cached.id) for cached in world.cached}
    return [*sorted(found), ("model", "not/there"), ("dataset", "acme/tiny")]


def commits_of(world: World, repo_type: str, repo_id: str) -> list[str]:
    """Commits that people could know: of cached repos, even of those that a user's model hides."""
    return [
        cached.commit(revision)
        for cached in world.cached
        if (cached.type, cached.id) == (repo_type, repo_id)
        for revision in range(cached.revisions)
    ]


# What is compared ----------------------------------------------------------------------------------------------


def answers(reader: Reader, cache: Path, asked: Sequence[Call], commits: Mapping[str, str], real: Path) -> list[Any]:
    """What a cache answers, with names in place of the commits that differ and of the real cache's place."""
    said = json.dumps(reader.read(cache, asked), ensure_ascii=False).replace(str(real), "<cache>")
    for model_id, commit in commits.items():
        said = said.replace(commit, f"<commit of {model_id}>")
    found = json.loads(said)
    assert isinstance(found, list)
    return found


def without_blob_ids(answer: Any) -> Any:
    """A tree's sizes alone: blob ids are made up where nothing tells the Hub's."""
    return {name: size for name, (size, _) in answer.items()} if answer and "raises" not in answer else answer


def differences(ours: Any, theirs: Any, where: str = "") -> str:
    """Where two answers differ, a line each."""
    if ours == theirs:
        return ""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return "".join(differences(ours[key], theirs[key], f"{where}.{key}") for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        only = [each for each in ours if each not in theirs], [each for each in theirs if each not in ours]
        return f"{where}: {only[0]} != {only[1]}\n"
    return f"{where}: {ours} != {theirs}\n"


def overlay_commits(hub: Path, commits: Mapping[str, str]) -> dict[str, str]:
    found = {model_id: (hub / repo_folder(model_id) / "refs/main").read_text() for model_id in commits}
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in found.values()), "a commit is 40 hex digits"
    assert len(set(found.values())) == len(found), "no two repos have one commit"
    return found


def assert_parity(session: hf_overlay.Session, place: Place, world: World, readers: Mapping[str, Reader]) -> None:
    plain = Path(tempfile.mkdtemp(dir=place.top)) / "plain"
    expected_commits = lay_expected(plain, place, world)
    hub = session.hub_cache
    commits = overlay_commits(hub, expected_commits)
    for model_id, (custom, root) in winners(world).items():
        if model_id in commits:
            assert (commits[model_id] == custom.commit(root)) == custom.is_identified, "the Hub's where it is proven"
    asked = calls(world)
    for release, reader in readers.items():
        found = answers(reader, hub, asked, commits, place.hub)
        expected = answers(reader, plain, asked, expected_commits, place.hub)
        for call, ours, theirs in zip(asked, found, expected, strict=True):
            if call[0] == "tree":
                ours, theirs = without_blob_ids(ours), without_blob_ids(theirs)
            assert ours == theirs, (
                f"{call} with huggingface_hub {release}: overlay != plain cache:\n{differences(ours, theirs)}"
            )
        # P8: whatever else lies in the real cache.
        assert "raises" not in found[0]
        (real,) = answers(reader, place.hub, [("scan", {})], {}, place.hub)
        if "raises" not in real:
            assert set(found[0]["warnings"]) <= set(real["warnings"])


# Tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Reader]]:
    """One process for each release of huggingface_hub."""
    home = tmp_path_factory.mktemp("readers")
    with open_readers(home, {release: hubs.environment(release) for release in hubs.ALL}) as readers:
        yield readers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    top = tmp_path_factory.mktemp("places")

    @contextmanager
    def make() -> Iterator[Place]:
        with tempfile.TemporaryDirectory(dir=top) as folder:
            yield Place(Path(folder))

    return make


# Not shrunk: that takes minutes, and the message names the call that differs.
@settings(max_examples=30, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(WORLDS, ASIDE)
def test_every_read_call_gives_what_one_plain_cache_gives(
    place: Callable[[], Any], readers: Mapping[str, Reader], world: World, aside: str
) -> None:
    with place() as here:
        here.lay(world)
        with hf_overlay.open_session(
            here.roots, kind="any" if world.all_kinds else "mlx", environ=here.environ
        ) as session:
            assert_parity(session, here, world, {each: readers[each] for each in (hubs.INSTALLED, aside)})
        assert not list((here.top / "sessions").glob("session-*"))


@settings(max_examples=10, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(WORLDS, WORLDS, ASIDE)
def test_a_refresh_gives_what_one_plain_cache_gives(
    place: Callable[[], Any], readers: Mapping[str, Reader], before: World, after: World, aside: str
) -> None:
    after = replace(after, all_kinds=before.all_kinds)
    with place() as here:
        here.lay(before)
        with hf_overlay.open_session(
            here.roots, kind="any" if before.all_kinds else "mlx", environ=here.environ
        ) as session:
            here.lay(after)
            session.refresh()
            assert_parity(session, here, after, {each: readers[each] for each in (hubs.INSTALLED, aside)})


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
