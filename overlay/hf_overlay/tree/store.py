"""The linked and merged repos in a session's folder.

They are made as the plan says, looked at for damage, and removed when nothing needs them.

A linked repo is made once, under another name, and renamed when it is whole. It is never edited afterwards: where a
client deleted something in it, another one is made beside it, because loads may still be reading the first.
"""

import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hf_overlay import hfcache
from hf_overlay.hfcache import LinkedRepo, Parts
from hf_overlay.tiers import MergedRepo
from hf_overlay.tree import files

FOLDER = "repos"
"""Folder in a session's folder that holds the linked repos, each named `<repo folder>.<fingerprint><number>`."""
FOLDERS = (FOLDER, "shadows")
"""All names the folder has had: a session that died may have been made by an earlier version."""
UNFINISHED = "new"
"""In a session's folder: the linked repo that is being made."""
_UNTOUCHED_NS = 10**18
"""Time of a linked repo's folders and files until a client changes them: no clock is too coarse to tell that."""


Repo = LinkedRepo | MergedRepo
"""What can be made: of a user's model, or of what the real cache and tiers hold."""


class Placed(NamedTuple):
    """A linked repo that was made on disk."""

    repo: Repo
    link: str
    """Target of a link in a hub folder that leads to it."""
    watched: tuple[str, ...]
    """Absolute paths of the folders that are touched when a client deletes in it, and of the ref it may rewrite."""


def place(session: str, name: str, repo: Repo) -> Placed:
    """Make the linked repo whose entry in a hub folder is called `name`. Raises OSError."""
    for number in itertools.count():
        folder = f"{name}.{repo.fingerprint[:12]}{number:04x}"
        path = f"{session}/{FOLDER}/{folder}"
        placed = Placed(repo, f"../../{FOLDER}/{folder}", tuple(f"{path}/{inner}" for inner in repo.watched))
        if not os.path.lexists(path):
            _make(repo, f"{session}/{UNFINISHED}", path)
            break
        if _is_whole(path, repo):  # the user's folder is again as it was at an earlier refresh
            break
    return placed


def is_untouched(placed: Placed) -> bool:
    """Whether a client has deleted and rewritten nothing: one `stat` for each thing that is watched."""
    try:
        for path in placed.watched:
            if os.stat(path).st_mtime_ns != _UNTOUCHED_NS:
                return False
    except OSError:
        return False
    return True


def unseal_refs(session: str, placed: Placed) -> None:
    """Let clients write refs in a linked repo of a session's own. Raises OSError."""
    path = f"{session}/{FOLDER}/{os.path.basename(placed.link)}"
    os.chmod(f"{path}/refs", 0o700)
    os.chmod(f"{path}/refs/main", 0o600)


def is_merged(repo: str) -> bool:
    """Whether a repo that was made here shows what the real cache and tiers hold, rather than a user's model."""
    return hfcache.MERGED in recorded(repo)


def made_with(repo: str) -> dict[str, list[str]]:
    """The names of the files that each revision of a merged repo was made with; empty for other repos."""
    made = recorded(repo).get(hfcache.MERGED)
    return made if isinstance(made, dict) else {}


def recorded(repo: str) -> dict[str, Any]:
    """The content of the file that tells repos of ours from a client's; empty where there is none."""
    try:
        origin = json.loads(files.read(f"{repo}/{hfcache.ORIGIN}"))
    except (OSError, ValueError, RecursionError):
        return {}
    return origin if isinstance(origin, dict) else {}


def is_ours(path: str) -> bool:
    """Whether a file is as it was made here, or nothing has come to or gone from a folder since. Raises OSError."""
    return os.lstat(path).st_mtime_ns == _UNTOUCHED_NS


def is_written(repo: str) -> bool:
    """Whether a client may have written into a repo that was made here: one `stat`, and one listing. Raises OSError."""
    return has_other_blobs(repo) or any(not entry.is_symlink() for entry in files.entries(f"{repo}/snapshots"))


def has_other_blobs(repo: str) -> bool:
    """Whether blobs came or went since a repo was made here: what every download changes. Raises OSError."""
    try:
        return os.stat(f"{repo}/blobs").st_mtime_ns != _UNTOUCHED_NS
    except FileNotFoundError:  # removed by a client
        return True


def carry_over(session: str, placed: Mapping[str, Placed]) -> None:
    """Have merged repos show the revisions that clients added to others of the same name, which they have replaced.

    `placed` has the current ones by name. What is added are links to files that the new one holds as well, and refs.
    Raises OSError.
    """
    if not any(isinstance(each.repo, MergedRepo) for each in placed.values()):
        return
    for entry in sorted(files.entries(f"{session}/{FOLDER}"), key=lambda entry: entry.name):
        current = placed.get(repo_folder(entry.name))
        if current is None or not isinstance(current.repo, MergedRepo):
            continue
        path = f"{session}/{FOLDER}/{os.path.basename(current.link)}"
        if path != entry.path and is_written(entry.path) and _carry_over(entry.path, path):
            mark_untouched(path, current.repo.watched)


def _carry_over(old: str, new: str) -> bool:
    """Whether anything was added."""
    added = False
    for folder in (hfcache.VIEWS, "snapshots"):
        for where, text in _links_below(f"{old}/{folder}"):
            commit = where.partition("/")[0]
            view = f"{new}/{hfcache.VIEWS}/{commit}"
            wanted = f"{view if os.path.isdir(view) else f'{new}/snapshots/{commit}'}/{where.partition('/')[2]}"
            if not os.path.lexists(wanted) and os.path.lexists(f"{new}/blobs/{os.path.basename(text)}"):
                os.makedirs(os.path.dirname(wanted), exist_ok=True)
                os.symlink(text, wanted)
                added = True
    for folder, _, names in os.walk(f"{old}/refs"):
        for name in names:
            ref = f"{folder}/{name}"
            wanted = f"{new}{ref.removeprefix(old)}"
            commit = files.read(ref).decode("ascii", "replace")
            is_later = not os.path.exists(wanted) or os.stat(wanted).st_mtime_ns < os.stat(ref).st_mtime_ns
            if not is_ours(ref) and is_later and os.path.isdir(f"{new}/snapshots/{commit}"):
                os.makedirs(os.path.dirname(wanted), exist_ok=True)
                import shutil  # with all compressors, which starts need not wait for

                shutil.copy2(ref, wanted)
    return added


def _links_below(folder: str) -> Iterator[tuple[str, str]]:
    """The links in the folders below one, by their paths relative to it, each with its text."""
    for inside, _, names in os.walk(folder):
        for name in names:
            path = f"{inside}/{name}"
            if inside != folder and os.path.islink(path):
                yield os.path.relpath(path, folder), os.readlink(path)


def prune(session: str, needed: Collection[str]) -> None:
    """Remove the linked repos to which no link in `needed` leads, unless a client downloaded into them."""
    for entry in files.entries(f"{session}/{FOLDER}"):
        if f"../../{FOLDER}/{entry.name}" not in needed and not files.has_payload(entry.path):
            files.remove(entry.path)


def repo_folder(folder: str) -> str:
    """The name in a cache of the repo that a linked repo's folder stands for."""
    return folder.rpartition(".")[0]


def _make(repo: Repo, aside: str, path: str) -> None:
    if os.path.isdir(aside):  # cut short by a full disk
        files.remove(aside)
    build(repo.parts, repo.watched, aside)
    os.rename(aside, path)
    for where in repo.sealed:
        os.chmod(f"{path}/{where}", 0o500)


def build(parts: Parts, watched: Iterable[str], path: str, *, mode: int = 0o666) -> None:
    """Make a repo folder of ours at `path`, where nothing is, with files of this mode. Raises OSError."""
    os.mkdir(path, 0o700)
    for inner in parts.folders:
        os.mkdir(f"{path}/{inner}")
    for where, target in parts.links:
        os.symlink(target, f"{path}/{where}")
    for where, content in parts.files:
        files.write(f"{path}/{where}", content, mode)
        os.utime(f"{path}/{where}", ns=(_UNTOUCHED_NS, _UNTOUCHED_NS))
    mark_untouched(path, watched)


def _is_whole(path: str, repo: Repo) -> bool:
    """Whether all that was made is still there; if so, it counts as untouched from now on.

    Looked at before and after the mark, so that the mark covers nothing that is missing or goes meanwhile.
    """
    parts = repo.parts
    made = [f"{path}/{where}" for where, _ in (*parts.links, *parts.files)]
    watched = [(f"{path}/{where}", content) for where, content in parts.files if where in repo.watched]

    def is_whole() -> bool:
        return all(map(os.path.lexists, made)) and all(files.read(file) == content for file, content in watched)

    try:
        if not is_whole():
            return False
        mark_untouched(path, repo.watched)
        return is_whole()
    except FileNotFoundError:
        return False


def mark_untouched(path: str, watched: Iterable[str]) -> None:
    """Have what is watched in a repo look as if nobody had changed anything in it. Raises OSError."""
    for where in watched:
        os.utime(f"{path}/{where}", ns=(_UNTOUCHED_NS, _UNTOUCHED_NS))
