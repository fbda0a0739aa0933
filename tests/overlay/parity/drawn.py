"""What is drawn: worlds of the user's models and a real cache, with everything that may be wrong in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hypothesis import strategies as st

from tests.support import hubs
from tests.support.folders import weights
from tests.support.hfcache import add_repo

Kind = Literal["llama", "sharded", "pipeline", "other type", "no weights", "no json", "half copied"]
Layout = Literal["folder", "linked folder", "linked files", "cache"]
RepoType = Literal["model", "dataset", "space"]

LOADED_BY_MLX: tuple[Kind, ...] = ("llama", "sharded")
LOADED_BY_ANY = (*LOADED_BY_MLX, "pipeline", "other type", "no weights")
IDS = ("acme/tiny", "zoo/tiny", "solo", "org/sub/deep", "my org/odd é")
BY_PATH_ONLY = "acme/x--y"
"""An id that a cache's layout cannot hold; as a cached repo the name stands for another id."""
EXTRAS = ("merges.txt", "nested/deep/file.txt", "1_Pooling/config.json", ".gitattributes", "a b é.txt")
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
        for name in [*names.get(self.kind, []), "tokenizer.json", *self.extras]:
            content = f"{name} of {self.id} in {root}, {self.salt}".encode()
            files[name] = weights(content) if name.endswith(".safetensors") else content
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

RELEASES = st.sampled_from(hubs.ALL)
"""The release that reads: they differ little from each other, and worlds a lot."""
