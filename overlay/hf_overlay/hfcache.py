"""The Hugging Face cache's layout on disk: the one module that knows models--a--b, refs, blobs, snapshots and trees.

The layout is huggingface_hub's (docs: "Understand caching"; source: file_download.py, _tree_cache.py,
utils/_cache_manager.py, utils/_validators.py of 2.4).
"""

import errno
import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from hf_overlay.errors import check_descriptors
from hf_overlay.models import File, Model

LOCKS = ".locks"
CACHEDIR_TAG = "CACHEDIR.TAG"
"""Clients put it into a hub folder, to keep backups out."""
ORIGIN = "overlay.json"
"""File in a linked repo that names the user's folder and our commit. No client looks at it."""
MERGED = "merged"
"""In the ORIGIN of a merged repo: the names of the files that each of its revisions was made with, by commit."""
VIEWS = "views"
"""Folder in a linked repo with the links that make up its revision; `snapshots/<commit>` is a link to it."""
SHARED_BLOBS = "blobs"
"""huggingface_hub >= 2 keeps payloads that several repos share here; reached through each repo's own links."""

_PARTIAL = r"(\.[0-9a-f]{8})?\.incomplete$"
_KINDS = frozenset({"models", "datasets", "spaces", "kernels"})
_HUB_ID = r"(?a)(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b"
_OS_HELPERS = frozenset(
    {
        *(".DS_Store", ".localized", ".apdisk", ".VolumeIcon.icns", "Icon\r"),  # macOS
        *("Thumbs.db", "ehthumbs.db", "desktop.ini"),  # Windows
        ".directory",  # KDE
    }
)
_OS_FOLDERS = frozenset(
    {
        *(".AppleDouble", ".DocumentRevisions-V100", ".Spotlight-V100", ".TemporaryItems", ".Trashes", ".fseventsd"),
        *("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    }
)
_NAME_MAX = 255 - len(".0123456789abcdef")


class NoSnapshot(Exception):
    """A repo folder holds no revision that `main` stands for; the text says why."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is made by operating systems for themselves, such as `.DS_Store`."""
    return name.startswith("._") or name in _OS_HELPERS or name in _OS_FOLDERS


def is_junk(name: str) -> bool:
    """Whether a file of this name is never part of a model: litter, unfinished downloads, locks."""
    return is_litter(name) or name.endswith((".incomplete", ".lock"))


# Names ---------------------------------------------------------------------------------------------------------


def repo_folder(repo_id: str, kind: str = "models") -> str:
    """The folder name of a repo in a cache: `org/name` -> `models--org--name`."""
    return "--".join([kind, *repo_id.split("/")])


def model_id(folder: str) -> str | None:
    """The model id a folder name stands for, as scan_cache_dir reads it; None for any other name."""
    kind, separator, rest = folder.partition("--")
    return rest.replace("--", "/") if kind == "models" and separator and rest else None


def full_id(folder: str) -> str:
    """The id that a repo's folder name stands for, with its kind unless that is a model: `datasets/org/name`."""
    kind, _, rest = folder.partition("--")
    return rest.replace("--", "/") if kind == "models" else f"{kind}/{rest.replace('--', '/')}"


def is_repo(folder: str) -> bool:
    """Whether a name in a hub folder is the folder name of a cached repo of any kind."""
    return model_id(folder) is not None or is_other_repo(folder)


def is_other_repo(folder: str) -> bool:
    """Whether this is the folder name of a cached dataset, space or kernel."""
    kind, _, rest = folder.partition("--")
    return kind != "models" and kind in _KINDS and rest != ""


def why_not_linkable(id_: str) -> str | None:
    """Why a model of this id can be loaded by path only; None when the id can stand in a cache under its own name."""
    folder = repo_folder(id_)
    if model_id(folder) != id_:
        return "cannot be written in the cache's layout, where `--` stands for `/`"
    if len(os.fsencode(folder)) > _NAME_MAX:
        return "is too long for a folder name in a cache"
    return None


def why_not_hub_id(model_id: str) -> str | None:
    """Why Hub clients refuse the id (huggingface_hub's validate_repo_id); None when they accept it."""
    if model_id.count("/") > 1:
        return "has more than one `/`"
    if "--" in model_id or ".." in model_id:
        return "has `--` or `..` in it"
    if model_id.endswith(".git"):
        return "ends with `.git`"
    if not re.fullmatch(_HUB_ID, model_id):
        return "is none that the Hub takes: letters, digits, `-`, `_` and `.`, up to 96, neither `-` nor `.` at an end"
    return None


def is_hub_repo(folder: str) -> bool:
    """Whether a folder name is that of a repo whose id Hub clients accept."""
    kind, _, rest = folder.partition("--")
    return kind in _KINDS and why_not_hub_id(rest.replace("--", "/")) is None


def lock_name(blob: str) -> str:
    """The name of the lock that clients hold while they write a blob, given its name or that of its partial file.

    A partial file is called `<etag>.incomplete`, to which any process appends, in huggingface_hub 0.36, and
    `<etag>.<8 hex digits>.incomplete` in those that give each process its own (1.31 to 2.4). All hold `<etag>.lock`.
    """
    return f"{re.sub(_PARTIAL, '', blob)}.lock"


# Reading -------------------------------------------------------------------------------------------------------


def main_commit(repo: str, *, any_single: bool) -> str:
    """The commit that revision `main` of a cached repo stands for.

    `any_single` accepts, where there is no `main`, the only revision there is. Raises NoSnapshot.
    """
    try:
        with open(f"{repo}/refs/main", encoding="ascii", errors="strict") as file:
            commit = file.read(64)
    except FileNotFoundError:
        commits = _subfolders(f"{repo}/snapshots")
        if any_single and len(commits) == 1:
            return commits[0]
        count = "1 revision" if len(commits) == 1 else f"{len(commits)} revisions"
        held = f"; it holds {count} by commit only" if commits else " and no revision"
        raise NoSnapshot(f"has no refs/main{held}") from None
    except UnicodeDecodeError:
        raise NoSnapshot("has a refs/main that is not text") from None
    if not commit or "/" in commit or commit in (".", "..") or "\0" in commit:
        raise NoSnapshot("has a refs/main that names no commit")
    if not os.path.isdir(snapshot(repo, commit)):
        raise NoSnapshot(f"has no snapshot of the commit that refs/main names ({commit[:12]})")
    return commit


def snapshot(repo: str, commit: str) -> str:
    """The folder of one revision."""
    return f"{repo}/snapshots/{commit}"


def entries(hub: str) -> dict[str, str]:
    """The entries of the real cache that an overlay shows: name -> path; empty while there is no cache. Raises OSError.

    They do not include the shared blob store: clients compute paths in it lexically, so through a link they would
    write a payload into the overlay and leave a broken link in the real cache. Repos lead into it by their own links.
    """
    try:
        return {name: f"{hub}/{name}" for name in os.listdir(hub) if name != SHARED_BLOBS and not is_junk(name)}
    except FileNotFoundError:
        return {}


def watched(repo: str) -> tuple[str, ...]:
    """The paths that look different when a cached repo gets another main revision, or gains or loses a blob.

    Whether that revision is still there, its own folder tells.
    """
    return (f"{repo}/refs/main", f"{repo}/blobs")


def watched_by_main(repo: str) -> tuple[str, ...]:
    """As `watched`, with each revision, which may be a link to a drive that is away, and its config.json."""
    try:
        names = os.listdir(f"{repo}/snapshots")
    except OSError:
        names = []
    revisions = (f"{repo}/snapshots/{name}" for name in names)
    return (
        *watched(repo),
        f"{repo}/snapshots",
        *(path for folder in revisions for path in (folder, f"{folder}/config.json")),
    )


def watched_by_examine(repo: str) -> tuple[str, ...]:
    """The paths that look different when a revision or ref of a cached repo comes, goes, or changes its mode."""
    try:
        is_flat = os.stat(f"{repo}/refs").st_nlink == 2  # no folder in it; other numbers may mean anything
    except OSError:
        is_flat = True
    below = () if is_flat else (f"{repo}/refs/refs", f"{repo}/refs/refs/pr")
    return (f"{repo}/refs", f"{repo}/snapshots", *below)


class Examined(NamedTuple):
    """The facts about a cached repo that the plan depends on."""

    commits: tuple[str, ...]
    """Its revisions."""
    problem: str | None
    """Why `scan_cache_dir` would raise on it instead of reporting it; None when it does not."""


def examine(repo: str) -> Examined:
    """Look through a cached repo for what makes `scan_cache_dir` raise.

    `scan_cache_dir` does not catch what reading a ref or entering a folder raises (huggingface_hub 0.36 to 2.4).
    Something that vanishes meanwhile, because another process writes the cache, does not count as a problem.
    """
    commits: list[str] = []
    try:
        for folder in ("snapshots", "blobs"):
            if os.path.isdir(f"{repo}/{folder}"):
                os.stat(f"{repo}/{folder}/.")  # scans go in without asking whether they may
        for name in os.listdir(f"{repo}/snapshots"):
            revision = f"{repo}/snapshots/{name}"
            if os.path.isdir(revision):
                os.stat(f"{revision}/.")
                commits.append(name)
                if loop := _link_loop(revision):
                    return Examined((), f"snapshots/{name}/{loop} is a link to itself")
            elif os.path.islink(revision) and not os.path.exists(revision):
                return Examined((), f"snapshots/{name} is a broken link")
        for folder, _, names in os.walk(f"{repo}/refs", onerror=check_descriptors):
            for name in names:
                if name != ".DS_Store":  # the one name that all releases pass over
                    with open(os.path.join(folder, name), encoding="utf-8") as file:
                        file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if error.filename is not None and os.path.islink(error.filename):
            return Examined((), str(error))
    except UnicodeDecodeError as error:
        return Examined((), str(error))
    except OSError as error:
        check_descriptors(error)
        return Examined((), str(error))
    return Examined(tuple(commits), None)


def _link_loop(revision: str) -> str | None:
    """The first file of a snapshot that is a link to itself, on which releases up to 1.31 fail."""
    for folder, _, names in os.walk(revision, onerror=check_descriptors):
        for name in names:
            try:
                os.stat(f"{folder}/{name}")
            except OSError as error:
                if error.errno == errno.ELOOP:
                    return os.path.relpath(f"{folder}/{name}", revision)
    return None


def _subfolders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


# Linking: a user's folder as a repo of one revision --------------------------------------------------------------


class Parts(NamedTuple):
    """All that a repo folder of ours is made of. Paths are relative to it."""

    folders: tuple[str, ...]
    """Parents before children."""
    links: tuple[tuple[str, str], ...]
    """(where, target)"""
    files: tuple[tuple[str, bytes], ...]
    """(where, content)"""


class LinkedRepo(NamedTuple):
    """A repo folder in cache layout, made of links, that stands in the tree for a user's model.

    It has exactly one revision, in which each file is two links away from the user's. Two hops, because clients take
    the first for the blob and unlink it; one revision, because with two, huggingface_hub <= 1.31 follows links to their
    end and deletes what is there. So that a client that goes past the gateway does not add a second one, refs and
    snapshots are sealed; which does not stop root, and so the snapshot is a link: those releases delete snapshots
    before blobs, with an rmtree that refuses a link and ends the deletion. It leads to a folder as deep as itself, for
    links in it are read by their text as well as by the kernel.
    """

    model: Model
    commit: str
    """Name of its only revision: the Hub's commit where the folder proves it, else the fingerprint."""
    fingerprint: str
    """Another one for each other content."""

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """The folder that its links lead to, with the model path that it is in."""
        return ((self.model.path, self.model.root),)

    @property
    def sealed(self) -> tuple[str, ...]:
        """Files and folders that nobody may write to; refs until a client tells that it will (`Tree.let_write`)."""
        return ("refs/main", "refs", "snapshots")

    @property
    def watched(self) -> tuple[str, ...]:
        """What has another time when a client takes a file of the revision away, or rewrites its ref."""
        # The view is watched through its snapshot, so that a missing snapshot is noticed as well.
        return ("blobs", "refs/main", f"snapshots/{self.commit}", *self._folders())

    @property
    def parts(self) -> Parts:
        """What it is made of, worked out anew: most sessions find a repo that was made already."""
        return self.parts_with({})

    def parts_with(self, recorded: Mapping[str, str]) -> Parts:
        """As `parts`, with more in the file that tells a repo of ours from a client's."""
        revision = f"{VIEWS}/{self.commit}"
        blobs: dict[str, str] = {}
        links: list[tuple[str, str]] = [(f"snapshots/{self.commit}", f"../{revision}")]
        tree: dict[str, dict[str, object]] = {}
        for file in self.model.files:
            blob = etag(self.model, file)
            blobs.setdefault(f"blobs/{blob}", f"{self.model.path}/{file.name}")
            links.append((f"{revision}/{file.name}", f"{'../' * (2 + file.name.count('/'))}blobs/{blob}"))
            tree[file.name] = {"size": file.size, "blob_id": blob_id(blob, file.size)}
            if len(blob) == 64:
                tree[file.name] |= {"lfs_sha256": blob, "lfs_size": file.size}
        listing = json.dumps({"format_version": 1, "files": tree})
        origin = json.dumps({"folder": self.model.path, "commit": self.commit, **recorded})
        return Parts(
            folders=("refs", "blobs", "trees", "snapshots", VIEWS, revision, *self._folders()),
            links=(*blobs.items(), *links),
            files=(
                ("refs/main", self.commit.encode()),
                (f"trees/{self.commit}.json", listing.encode()),
                (ORIGIN, origin.encode()),
            ),
        )

    def _folders(self) -> tuple[str, ...]:
        """The folders in its revision."""
        folders: dict[str, None] = {}
        for file in self.model.files:
            if "/" not in file.name:
                continue
            parents = file.name.split("/")[:-1]
            for depth in range(len(parents)):
                folders["/".join((VIEWS, self.commit, *parents[: depth + 1]))] = None
        return tuple(folders)


def fingerprint(model: Model) -> str:
    """40 hex digits that change with any name, size or time in the folder, and that differ between any two folders."""
    return model.fingerprint or sha1(json.dumps([model.id, model.path, model.commit, model.files]))


def etag(model: Model, file: File) -> str:
    """A file's etag in the tree: the Hub's where it is known, else a stable one that no other file has."""
    return file_etag(model.path, file)


def file_etag(folder: str, file: File) -> str:
    """The etag of a file in the folder of a model or snapshot, as `etag`."""
    return file.etag or sha1(f"{folder}/{file.name}\0{file.size}\0{file.mtime_ns}")


def blob_id(etag: str, size: int) -> str:
    """Git's id of a file with this etag: for a file in LFS, whose etag is a SHA-256, the id of the pointer to it."""
    if len(etag) == 40:
        return etag
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{etag}\nsize {size}\n"
    return sha1(f"blob {len(pointer)}\0{pointer}")


def linked_repo(model: Model) -> LinkedRepo:
    """The linked repo of a model."""
    mark = fingerprint(model)
    return LinkedRepo(model, model.commit or mark, mark)


def sha1(text: str) -> str:
    """40 hex digits that differ for different texts."""
    import hashlib  # OpenSSL takes milliseconds to load, and listing models needs no hash

    return hashlib.sha1(text.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()
