"""Repos that several caches hold parts of: what each of them holds, and the merged repo that shows all of it.

The user's own cache comes first, then the tiers behind it. A merged repo has the revisions of all of them. Each file
and each ref comes from the first cache that has it. Clients may add to a merged repo. Their downloads lie in it until
they are moved to the user's own cache; what a tier holds stays in the tier.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from hf_overlay import hfcache, records
from hf_overlay.errors import check_descriptors
from hf_overlay.hfcache import Parts
from hf_overlay.models import CachedRepo, File, Model, Revision
from hf_overlay.progress import alive

Value = TypeVar("Value")

_MAX_TREE_BYTES = 64 * 2**20
"""A listing longer than this was not written by a client."""


# Reading -------------------------------------------------------------------------------------------------------


def place(tier: str) -> str:
    """Return the folder of a tier's repos and models: the tier itself, or its `hub` where it is a whole HF_HOME."""
    hub = f"{tier}/hub"
    is_home = os.path.isdir(hub) and not _has_repos(tier) and _has_repos(hub)
    return hub if is_home else tier


def repos(hub: str) -> dict[str, str]:
    """Return the repos of every kind in a hub folder: name -> path. Raises OSError."""
    names = sorted(name for name in os.listdir(hub) if hfcache.is_repo(name))
    return {name: f"{hub}/{name}" for name in names if os.path.isdir(f"{hub}/{name}/snapshots")}


def watched(repo: str) -> tuple[str, ...]:
    """Return the paths that look different when `read` would return something else; look at them before it."""
    refs = [path for path, is_folder in _walk(f"{repo}/refs") if not is_folder]
    folders = [
        path
        for name in ("refs", "snapshots", "trees", ".no_exist")
        for path, is_folder in [(f"{repo}/{name}", True), *_walk(f"{repo}/{name}")]
        if is_folder
    ]
    return (*folders, *refs)


def read(name: str, repo: str, root: str) -> CachedRepo:
    """Return what a cache holds of a repo, without what is broken in it. Raises OSError where it cannot be read."""
    revisions = tuple(
        Revision(entry.name, entry.path, _files(entry.path))
        for entry in _entries(f"{repo}/snapshots")
        if entry.is_dir() and not entry.name.startswith(".")
    )
    refs = ((path[len(repo) + 6 :], _text(path)) for path, is_folder in _walk(f"{repo}/refs") if not is_folder)
    trees = (
        (entry.name.removesuffix(".json"), _content(entry.path))
        for entry in _entries(f"{repo}/trees")
        if entry.name.endswith(".json")
    )
    absent = (path[len(repo) + 11 :] for path, is_folder in _walk(f"{repo}/.no_exist") if not is_folder)
    return CachedRepo(name, repo, root, revisions, tuple(refs), tuple(trees), tuple(absent))


def of_model(model: Model) -> CachedRepo | None:
    """Return a plain folder in a tier as a repo of one revision; None where it does not prove the Hub's commit."""
    if model.commit is None:
        return None
    revision = Revision(model.commit, model.path, model.files)
    name = hfcache.repo_folder(model.id)
    return CachedRepo(name, model.path, model.root, (revision,), refs=(("main", model.commit),))


def _has_repos(folder: str) -> bool:
    try:
        return bool(repos(folder))
    except OSError as error:
        check_descriptors(error)
        return False


def _files(snapshot: str) -> tuple[File, ...]:
    files = []
    for path, is_folder in _walk(snapshot):
        name = path[len(snapshot) + 1 :]
        if is_folder or (hfcache.is_junk(os.path.basename(name)) and not os.path.islink(path)):
            continue
        try:
            status = os.stat(path)
        except OSError:  # a broken link
            continue
        if os.path.isfile(path):
            files.append(File(name, status.st_size, status.st_mtime_ns, records.blob_name(path)))
    return tuple(files)


def _walk(folder: str) -> Iterator[tuple[str, bool]]:
    """Yield all paths below a folder, sorted, and whether each is a real folder. Links are not followed."""
    for entry in _entries(folder):
        is_folder = entry.is_dir(follow_symlinks=False)
        yield entry.path, is_folder
        if is_folder:
            yield from _walk(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    alive()
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if _is_utf8(entry.name)), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _text(path: str) -> str:
    return _content(path, 64).decode("ascii", "replace")


def _content(path: str, limit: int = _MAX_TREE_BYTES) -> bytes:
    """Return a file's bytes; nothing where it is too long, cannot be read, or is no file."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > limit:
            return b""
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        check_descriptors(error)
        return b""


# Merging ---------------------------------------------------------------------------------------------------------


class MergedRepo(NamedTuple):
    """A repo folder in cache layout, made of links, that shows what several caches hold of one repo.

    Paths are relative to the repo folder; the fields are those of `hfcache.LinkedRepo`. Nothing in it is sealed,
    because clients may add revisions.
    """

    holders: tuple[CachedRepo, ...]
    """What it shows. Where several of them have the same part, the first one counts."""
    fingerprint: str
    parts: Parts
    watched: tuple[str, ...]
    sealed: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """The folders that its links lead to, each with the cache or tier that contains it."""
        return tuple((holder.path, holder.root) for holder in self.holders)


def holds_all(own: CachedRepo, tiers: Sequence[CachedRepo]) -> bool:
    """Return whether the user's own cache has every file, ref, listing and absent file that tiers have of a repo."""
    return _Parts.of([own]).size() == _Parts.of([own, *tiers]).size()


def merged_repo(holders: Sequence[CachedRepo]) -> MergedRepo:
    """Return the merged repo of what `holders` hold, the user's own cache first.

    As in a user's model, two links lead to each file, and each snapshot is a link, at which deletions by clients stop
    (see `hfcache.LinkedRepo`).
    """
    parts = _Parts.of(holders).completed()
    views = {f"{hfcache.VIEWS}/{commit}": f"snapshots/{commit}" for commit in parts.revisions}
    links = {snapshot: f"../{view}" for view, snapshot in views.items()}
    for where, (blob, target) in parts.files.items():
        links.setdefault(f"blobs/{blob}", target)
        links[f"{hfcache.VIEWS}/{where}"] = f"{'../' * (1 + where.count('/'))}blobs/{blob}"
    shown: dict[str, list[str]] = {commit: [] for commit in parts.revisions}
    for where in parts.files:
        commit, _, name = where.partition("/")
        shown[commit].append(name)
    contents = {
        **{f"refs/{ref}": commit.encode() for ref, commit in parts.refs.items()},
        **{f"trees/{commit}.json": listing for commit, listing in parts.trees.items()},
        **{f".no_exist/{where}": b"" for where in parts.absent},
        hfcache.ORIGIN: json.dumps({hfcache.MERGED: shown}).encode(),
    }
    folders = dict.fromkeys(("refs", "blobs", "trees", "snapshots", ".no_exist", hfcache.VIEWS, *views))
    folders |= dict.fromkeys(folder for where in (*links, *contents) for folder in _parents(where))
    deep = (folder for folder in folders if folder.startswith(f"{hfcache.VIEWS}/") and folder not in views)
    identity = [sorted(links.items()), [(where, content.hex()) for where, content in sorted(contents.items())]]
    return MergedRepo(
        holders=tuple(holders),
        fingerprint=hfcache.sha1(json.dumps(identity)),
        parts=Parts(tuple(folders), tuple(links.items()), tuple(contents.items())),
        watched=(
            "blobs",
            *views.values(),
            *deep,
        ),  # views through their snapshots, which may be missing
    )


class _Parts(NamedTuple):
    """All that caches hold of one repo, each part from the first cache that has it."""

    revisions: dict[str, None]
    files: dict[str, tuple[str, str]]
    """`<commit>/<name>` -> (etag, path)"""
    refs: dict[str, str]
    trees: dict[str, bytes]
    absent: dict[str, None]
    """`<commit>/<name>`"""

    @classmethod
    def of(cls, holders: Sequence[CachedRepo]) -> "_Parts":
        """Return the parts of a repo, without those of revisions that are not there."""
        revisions = [revision for holder in holders for revision in holder.revisions]
        commits = dict.fromkeys(sorted(revision.commit for revision in revisions))
        files = _first(
            (f"{revision.commit}/{file.name}", (hfcache.file_etag(revision.path, file), f"{revision.path}/{file.name}"))
            for revision in revisions
            for file in revision.files
        )
        refs = (ref for holder in holders for ref in holder.refs if ref[1] in commits)
        trees = (tree for holder in holders for tree in holder.trees if tree[0] in commits and tree[1])
        absent = (
            (where, None)
            for holder in holders
            for where in holder.absent
            if where not in files and where.partition("/")[0] in commits
        )
        return cls(commits, files, _first(refs), _first(trees), _first(absent))

    def completed(self) -> "_Parts":
        """Return the same, completed with files that a revision's listing names and whose bytes another revision has.

        So a revision that was fetched beside a tier is whole again, although the tier's files were not moved with it.
        """
        blobs = dict(self.files.values())
        listed = (
            (f"{commit}/{name}", (blob, blobs[blob]))
            for commit, listing in self.trees.items()
            for name, blob in records.listed_blobs(listing).items()
            if blob in blobs
        )
        return self._replace(files=_first((*self.files.items(), *listed)))

    def size(self) -> int:
        """Return the number of all parts."""
        return len(self.revisions) + len(self.files) + len(self.refs) + len(self.trees) + len(self.absent)


def _first(parts: Iterable[tuple[str, Value]]) -> dict[str, Value]:
    """Return the first value for each path. Of a file and a folder at one path, the first counts, too."""
    found: dict[str, Value] = {}
    folders: set[str] = set()
    for path, value in parts:
        parents = _parents(path)
        if path not in found and path not in folders and not found.keys() & parents:
            found[path] = value
            folders.update(parents)
    return found


def _parents(path: str) -> list[str]:
    """Return the folders above a relative path, the topmost first."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
