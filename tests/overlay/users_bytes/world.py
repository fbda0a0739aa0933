"""P1, P3 and P4: whatever is done through an overlay, the user's folders and the real cache keep every byte.

`World` is what is at stake, with the listing it must have. Every release of huggingface_hub does to it each operation
that deletes or downloads: once each, so that a failure names operation and release, and then in orders that
Hypothesis draws, between starts, refreshes, ends and kills of sessions and changes that the user makes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import hf_overlay
from hf_overlay.tree.clear import clear_dead

from tests.support.folders import lay_model, settle, unseal, weights
from tests.support.hfcache import Entry, add_repo, etag, listing, repo_folder
from tests.support.hubs import Answer, HubProcess

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
BELOW = ("acme/behind", "org/shared", "tier/only")
"""What a tier below the real cache holds: a plain folder, revisions beside the cache's own, and a repo of its own."""
CONFIG = b'{"model_type": "llama"}'


class World:
    """A user's folders, a real cache, and how both have to look."""

    def __init__(self, base: Path) -> None:
        self.users = base / "users"
        self.drive = self.users / "drive"
        self.roots = [self.drive / "models", self.users / "second"]
        self.tier = self.users / "shared"
        self.hf_home = base / "home/.cache/huggingface"
        self.hub = self.hf_home / "hub"
        self.sessions = base / "sessions"
        self.link = base / "link"
        self.environ = {
            "HOME": str(base / "home"),
            "PATH": os.environ["PATH"],
            "HF_OVERLAY_DIR": str(self.sessions),
            "HF_OVERLAY_BELOW": str(self.tier),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        self._lay_cache()
        self._lay_folders()
        self._lay_tier()
        self.mine = listing(self.users)
        self.cache = listing(self.hf_home)
        self.may_go: set[str] = set()
        """What a client was asked to delete since the last check; names as in the cache's listing."""
        self.may_come: set[str] = set()
        """Repo folders that a client downloaded to, which come home to the real cache when a session ends."""

    def _lay_cache(self) -> None:
        """Several revisions and refs, a file of one revision only, another kind of repo, half a download."""
        add = partial(add_repo, self.hub, tree=True, locks=True)
        add("org/both", model_files("both"))
        add("org/cached", model_files("cached"))
        add("org/cached", model_files("cached") | {"config.json": CONFIG + b"\n"})
        add("org/front", model_files("front, at first"), refs=("v1",))
        add("org/front", model_files("front, now"))
        add("org/many", model_files("many, at first") | {"gone.json": b"{}"}, refs=())
        add("org/many", model_files("many, then"), refs=("v1", "refs/pr/1"), no_exist=("absent.json",))
        add("org/many", model_files("many, now"))
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
        _lay_local_dir(models / "org/both", model_files("both"), snapshot.name)
        # `hf download org/cached --local-dir twin`, before org/cached changed: its commit under another id.
        main = (self.hub / repo_folder("org/cached") / "refs/main").read_text()
        (old,) = {path.name for path in (self.hub / repo_folder("org/cached") / "snapshots").iterdir()} - {main}
        _lay_local_dir(models / "twin", model_files("cached"), old)
        add_repo(second, "org/second", model_files("second, at first"), refs=("v1",), tree=True)
        add_repo(second, "org/second", model_files("second, now"), tree=True)

    def _lay_tier(self) -> None:
        """Revisions that share files with each other, and with what the real cache has of the same repo."""
        add = partial(add_repo, self.tier, tree=True, locks=True)
        add("tier/only", model_files("only, at first"), refs=("v1",), no_exist=("absent.json",))
        add("tier/only", model_files("only, now"))
        add("org/shared", model_files("shared, at first"))
        add("org/shared", model_files("shared, in both"), refs=("v2",))
        add_repo(self.hub, "org/shared", model_files("shared, in both"), refs=())
        add_repo(self.hub, "org/shared", model_files("shared, now") | {"own.json": b"{}"}, tree=True)
        add_repo(self.tier, "org/data", {"data.csv": b"5,6"}, repo_type="dataset")
        lay_model(self.tier / "acme/behind")

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

    def keep_only(self, *model_ids: str) -> None:
        """Remove every model and dataset but these, where what is tested has hundreds of steps for each."""
        names = {*model_ids, *map(repo_folder, model_ids)}
        for folder in (*self.roots, self.tier, self.hub):
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.name.startswith(".") and entry.name not in names:
                    shutil.rmtree(entry)
        self.mine, self.cache = listing(self.users), listing(self.hf_home)

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


def model_files(name: str) -> dict[str, bytes]:
    return {
        "config.json": CONFIG,
        "model.safetensors": weights(f"weights of {name}".encode()),
        "tokenizer.json": b"{}",
        "sub/vocab.json": b"{}",
    }


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


Operation = Callable[[World, HubProcess, Path, str], Answer | None]
"""Does something about one id through an overlay's hub folder; returns what the client said, where there is one."""


def load(_world: World, client: HubProcess, hub: Path, model_id: str) -> Answer:
    for how in ("file", "cached"):
        client.ask(how, hub=str(hub), model_id=model_id, name="config.json")
    return client.ask("snapshot", hub=str(hub), model_id=model_id)


def force_download(_world: World, client: HubProcess, hub: Path, model_id: str) -> Answer:
    client.ask("force_download", hub=str(hub), model_id=model_id, name="config.json")
    return client.ask("force_download", hub=str(hub), model_id=model_id, name=None)


def remove_repo(world: World, client: HubProcess, hub: Path, model_id: str) -> Answer:
    world.ask(hub, lambda repo_id, _: repo_id == f"model/{model_id}")
    return client.ask("remove", hub=str(hub), targets=[f"model/{model_id}"])


def remove_revisions(world: World, client: HubProcess, hub: Path, model_id: str) -> None:
    for commit in commits(hub, model_id):
        world.ask(hub, partial(_is, commit))
        client.ask("remove", hub=str(hub), targets=[commit])
        world.check()


def delete_revisions(world: World, client: HubProcess, hub: Path, model_id: str) -> None:
    for commit in commits(hub, model_id):
        world.ask(hub, partial(_is, commit))
        client.ask("delete_revisions", hub=str(hub), commits=[commit])
        world.check()


def _is(commit: str, _repo_id: str, other: str) -> bool:
    return commit == other


def prune(world: World, client: HubProcess, hub: Path, _model_id: str) -> Answer:
    world.ask(hub, world.is_detached, incomplete=True)
    return client.ask("prune", hub=str(hub))


def delete_all_revisions(world: World, client: HubProcess, hub: Path, _model_id: str) -> Answer:
    world.ask(hub, lambda *_: True)
    return client.ask("delete_all_revisions", hub=str(hub))


def delete_one_file(world: World, client: HubProcess, hub: Path, model_id: str) -> Answer:
    world.ask(hub, lambda repo_id, _: repo_id == f"model/{model_id}")
    world.may_go = {path for path in world.may_go if "/blobs/" in path or path.endswith("/model.safetensors")}
    return client.ask("delete_files", hub=str(hub), model_id=model_id, name="model.safetensors")


def delete_files(world: World, client: HubProcess, hub: Path, model_id: str) -> Answer:
    world.ask(hub, lambda repo_id, _: repo_id == f"model/{model_id}")
    return client.ask("delete_files", hub=str(hub), model_id=model_id, name=None)


def manage_delete(world: World, client: HubProcess, hub: Path, pattern: str) -> Answer:
    world.ask(hub, lambda repo_id, _: pattern in repo_id.split("/", 1)[1])
    return client.ask("manage_delete", hub=str(hub), pattern=pattern)


def remove_folder(world: World, _client: HubProcess, hub: Path, model_id: str, *, how: str) -> None:
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


def download(world: World, hub: Path, model_id: str, payload: bytes) -> None:
    """What a download leaves: of a model that was nowhere, or of another revision than the one there is."""
    repo = hub / repo_folder(model_id)
    world.may_come.add(repo.name)
    for sealed in (repo.resolve(), world.sessions / "shared"):  # as they are to root, whom no mode stops
        unseal(sealed)
    files = {"config.json": CONFIG, "model.safetensors": payload, "tokenizer.json": b"{}"}
    for name, content in files.items():
        blob = repo / "blobs" / etag(name, content)
        if blob.is_symlink() and not blob.exists():
            blob.unlink()  # a client renames over it
    add_repo(hub, model_id, files, tree=True)


def held(world: World, payloads: Collection[bytes]) -> set[bytes]:
    """Which downloads are still anywhere: in a session, or in the real cache."""
    folders = (world.sessions, world.hub) if payloads else ()
    named = {hashlib.sha1(payload).hexdigest(): payload for payload in payloads}
    entries = (entry for folder in folders if folder.exists() for entry in listing(folder).values())
    return {named[entry[4]] for entry in entries if entry[4] in named}


def kill_owner(world: World, hub_process: HubProcess, kill_at: int, refreshes: int) -> bool:
    """Kill the owner of a session right before its change `kill_at` to a disk; False when it came to its end."""
    answer = hub_process.ask(
        "own_a_session",
        link=str(world.link),
        targets=[str(root) for root in world.roots],
        environ=world.environ,
        refreshes=refreshes,
        kill_at=kill_at,
    )
    return bool(answer.value["killed"])
