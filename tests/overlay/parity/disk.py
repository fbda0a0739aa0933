"""Worlds on disk: the user's folders, the real cache, and the one plain cache that the overlay must equal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.overlay.parity.drawn import (
    BY_PATH_ONLY,
    JUNK,
    LEFT_OUT_OTHERS,
    LOADED_BY_ANY,
    LOADED_BY_MLX,
    OTHERS,
    RAISING,
    REPORTED,
    Cached,
    Custom,
    World,
)
from tests.support.folders import settle, weights
from tests.support.hfcache import add_repo, etag, repo_folder


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
                "model.safetensors": weights(f"{cached.id} {revision} {cached.salt}".encode()),
                "tokenizer.json": b"{}",
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
            # Links to files of which nothing says that they are a model's count for none.
            is_foreign = custom.layout == "linked files" and custom.kind == "no weights"
            if custom.kind in (LOADED_BY_ANY if world.all_kinds else LOADED_BY_MLX) and not is_foreign:
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
