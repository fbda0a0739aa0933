"""Moving what clients downloaded into a session's tree to the real cache, where it would have gone without an overlay.

It is done when a session has ended, however it ended. Every step leaves the real cache valid and can be repeated: blobs
come before the snapshots that link to them, refs last; each file appears under its name complete or not at all. A
download that cannot be moved (no room, no permission, its lock held by a client) stays where it is and is tried again
at the next start.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

from hf_overlay import hfcache, keeping
from hf_overlay.patience import Patience
from hf_overlay.progress import alive
from hf_overlay.tree import files, moving, store, usage
from hf_overlay.tree.files import has_payload


class _Place:
    """The place of a repo in the real cache."""

    def __init__(self, path: str, locks: tuple[str, ...], aside: str) -> None:
        self.path = path
        self.locks = locks
        """The folders with the locks that clients hold: in the real cache, and in the tree for those that go by it."""
        self.aside = aside
        """The path of a file until it is complete, where no program looks for one."""
        self.is_busy = False
        """Whether something was left in the tree because a client is writing it."""

    def is_free(self, blob: str) -> bool:
        """Whether no client is writing a blob, given the name of the blob or of its partial file."""
        is_held = any(usage.is_held(f"{folder}/{hfcache.lock_name(blob)}") for folder in self.locks)
        self.is_busy |= is_held
        return not is_held


def bring_home(session: str, hub: str) -> dict[str, str]:
    """Move every download in a dead session's tree into the real cache `hub`.

    Returns the paths that must stay because not all of each could be moved: path -> why. Looks at no disk but the
    session's and the cache's, except where it can be given up on; reports progress (see progress).
    """
    for folder in ("home", "hubs", *store.FOLDERS):
        files.remove_litter(f"{session}/{folder}")
    stuck: dict[str, str] = {}
    for repo, name in _written_repos(session):
        alive()
        place = _place(session, hub, name)
        try:
            _make_hub(hub)
            if not _move_whole(repo, place):
                _merge(repo, place)
            if place.is_busy:
                stuck[repo] = "a program is downloading the same"
        except OSError as error:
            if is_worth_keeping(repo):
                stuck[repo] = f"{error.strerror or error}: {error.filename2 or error.filename or hub}"
    for each in _hubs(session):
        tag = f"{each}/{hfcache.CACHEDIR_TAG}"
        if os.path.isfile(tag) and os.path.isdir(hub) and not os.path.lexists(f"{hub}/{hfcache.CACHEDIR_TAG}"):
            try:
                os.rename(tag, f"{hub}/{hfcache.CACHEDIR_TAG}")
            except OSError:  # another volume: the next client makes one
                pass
    return stuck


def bring_home_finished(session: str, hub: str) -> None:
    """Move what clients have finished downloading into the merged repos of a living session to the real cache `hub`.

    The tree goes on showing it, by a link in its place. Raises OSError; can be repeated.
    """
    for folder in _names(f"{session}/{store.FOLDER}"):
        repo = f"{session}/{store.FOLDER}/{folder}"
        if store.is_written(repo) and store.is_merged(repo):
            _make_hub(hub)
            _merge(repo, _place(session, hub, store.repo_folder(folder)), link=f"{session}/link.next")


def _place(session: str, hub: str, name: str) -> _Place:
    # One name a session, so that what a kill leaves of it is overwritten when it is done again.
    aside = f"{hub}/{name}/{os.path.basename(session)}.incomplete"
    return _Place(f"{hub}/{name}", tuple(f"{each}/{hfcache.LOCKS}/{name}" for each in (hub, *_hubs(session))), aside)


def _make_hub(hub: str) -> None:
    problem = keeping.problem(hub)
    if problem is not None and problem.kind == "away":  # a folder made in its place would hide the drive
        raise OSError(errno.ENODEV, f"the Hugging Face cache {problem.text}")
    os.makedirs(hub, exist_ok=True)


def _written_repos(session: str) -> Iterator[tuple[str, str]]:
    """The repo folders that clients wrote into, their own and linked repos, each with the name it has in a cache."""
    for hub in _hubs(session):
        for name in _names(hub):
            path = f"{hub}/{name}"
            if hfcache.is_repo(name) and not os.path.islink(path) and os.path.isdir(path):
                yield path, name
    for folder in store.FOLDERS:
        for linked_repo in _names(f"{session}/{folder}"):
            path = f"{session}/{folder}/{linked_repo}"
            alive()
            if os.path.islink(path):
                continue
            if has_payload(path):
                _drop_copies(path)
            if is_worth_keeping(path):
                yield path, store.repo_folder(linked_repo)


def _hubs(session: str) -> list[str]:
    """The hub folders, and the one that a client made itself, after something had removed the link to them."""
    made = f"{session}/home/hub"
    is_made = os.path.isdir(made) and not os.path.islink(made)
    return [*(f"{session}/hubs/{name}" for name in _names(f"{session}/hubs")), *([made] if is_made else [])]


def is_worth_keeping(repo: str) -> bool:
    """Whether a client wrote something into a repo: bytes, or, once those are moved, the links of a revision."""
    own = _own_commit(repo)
    revisions = (f"{repo}/snapshots/{commit}" for commit in _names(f"{repo}/snapshots") if commit != own)
    return has_payload(repo) or any(files.below(revision) for revision in revisions)


def _move_whole(repo: str, place: _Place) -> bool:
    """Move a repo that is new to the cache, and on the same volume, in one rename. False when it must be merged."""
    if os.path.lexists(place.path) or os.path.exists(f"{repo}/{hfcache.ORIGIN}"):
        return False
    if any(map(usage.holds_lock, place.locks)):
        return False
    home = os.path.realpath(repo) + os.sep
    for name in files.below(repo):
        path = f"{repo}/{name}"
        # By its text first: what it leads to may be on a disk that does not answer.
        if os.path.islink(path) and not (_is_in(repo, path) and os.path.realpath(path).startswith(home)):
            return False
    try:
        os.rename(repo, place.path)
    except OSError:  # another volume, or somebody was faster: merging tells what is really wrong
        return False
    return True


def _is_in(folder: str, link: str) -> bool:
    """Whether the text of a link leads to a place below a folder."""
    return os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link))).startswith(f"{folder}/")


def _merge(repo: str, place: _Place, *, link: str | None = None) -> None:
    """Add a repo's downloads to the same repo in the cache, revision by revision. Raises OSError; can be repeated.

    `link` is set while programs use the repo: whatever is moved leaves a link in its place, which is made there first.
    """
    target, aside = place.path, place.aside
    own = _own_commit(repo)
    if has_payload(repo):
        os.makedirs(f"{target}/snapshots", exist_ok=True)  # a repo without it is a corrupt one to scans
    for name in _names(f"{repo}/blobs"):
        alive()
        path = f"{repo}/blobs/{name}"
        if os.path.islink(path) or not os.path.isfile(path) or not place.is_free(name):
            continue
        if link is not None:
            if not name.endswith(".incomplete"):
                moving.share(path, f"{target}/blobs/{name}", place.aside, link)
        elif name.endswith(".incomplete"):
            _move_incomplete(path, f"{target}/blobs/{name}", f"{place.locks[0]}/{hfcache.lock_name(name)}", aside)
        elif not os.path.exists(f"{target}/blobs/{name}"):
            moving.move(path, f"{target}/blobs/{name}", aside)
        elif os.path.getsize(f"{target}/blobs/{name}") == os.path.getsize(path):
            os.unlink(path)  # named by its content: the cache has it already
    if own is not None:
        _move_written(f"{repo}/{hfcache.VIEWS}/{own}", f"{target}/snapshots/{own}", aside)
    complete: set[str] = set()
    is_merged, made = store.is_merged(repo), store.made_with(repo)
    for commit in _names(f"{repo}/snapshots"):
        revision = _revision(repo, commit)
        if commit == own or os.path.islink(revision):  # a link to a view that a client has removed
            continue
        is_view = revision != f"{repo}/snapshots/{commit}"
        if is_view and set(files.below(revision)) <= set(made.get(commit, ())):  # nobody added anything to it
            continue
        if _merge_snapshot(revision, commit, place, is_used=link is not None):
            complete.add(commit)
    for folder in ("trees", ".no_exist", "refs"):
        for relative in files.below(f"{repo}/{folder}"):
            alive()
            path = f"{repo}/{folder}/{relative}"
            if store.is_ours(path):
                continue  # nobody wrote it: a tier has it, or the cache itself
            content = files.read(path)
            commit = content.decode("ascii", "replace") if folder == "refs" else relative.split("/")[0].split(".")[0]
            wanted = f"{target}/{folder}/{relative}"
            # A client's listing says what else belongs to a revision of which tiers have the rest.
            is_part = folder == "trees" and is_merged and os.path.isdir(f"{target}/snapshots/{commit}")
            if (commit in complete or is_part) and not _is_newer(wanted, path):
                moving.write(wanted, content, aside)


def _move_written(view: str, snapshot: str, aside: str) -> None:
    """Move the files that programs wrote into the revision of a user's model to where a cache alone would have them."""
    for relative in files.below(view):
        alive()
        path, wanted = f"{view}/{relative}", f"{snapshot}/{relative}"
        if os.path.islink(path) or not os.path.getsize(path):
            continue
        if not os.path.lexists(wanted):
            moving.move(path, wanted, aside)
        elif os.path.isfile(wanted) and moving.has_same_bytes(path, wanted):
            os.unlink(path)


def _revision(repo: str, commit: str) -> str:
    """The folder of one revision; in a merged repo, clients add files to those that we made, which are views."""
    view = f"{repo}/{hfcache.VIEWS}/{commit}"
    is_view = os.path.islink(f"{repo}/snapshots/{commit}") and os.path.isdir(view)
    return view if is_view else f"{repo}/snapshots/{commit}"


def _is_newer(path: str, other: str) -> bool:
    """Whether `path` was written after `other`, by a program that ran since the session died."""
    return os.path.exists(path) and os.path.getmtime(path) > os.path.getmtime(other)


def _merge_snapshot(snapshot: str, commit: str, place: _Place, *, is_used: bool) -> bool:
    """Add one revision's links to the cache's repo; False when nothing or only a part of it may be in the cache.

    While programs use it, files that are no links stay where they are.

    No folder is made before there is something to put into it, because clients take an empty one for a revision.
    """
    target = f"{place.path}/snapshots/{commit}"
    is_complete = True
    for relative in files.below(snapshot):
        alive()
        path, wanted = f"{snapshot}/{relative}", f"{target}/{relative}"
        is_link = os.path.islink(path)
        if not is_link and is_used:
            is_complete = False
            continue
        if os.path.lexists(wanted):
            if not is_link and os.path.isfile(wanted) and os.path.getsize(wanted) == os.path.getsize(path):
                os.unlink(path)  # one commit's file is one file
            continue
        if not is_link:  # clients copy where they cannot link
            moving.move(path, wanted, place.aside)
            continue
        link = os.readlink(path)
        blob = os.path.normpath(os.path.join(os.path.dirname(wanted), link))
        is_blob = os.path.dirname(blob) == os.path.normpath(f"{place.path}/blobs") and os.path.isfile(blob)
        if is_blob and place.is_free(os.path.basename(blob)):
            os.makedirs(os.path.dirname(wanted), exist_ok=True)
            os.symlink(link, wanted)
        else:  # it leads to a user's folder, or a client is writing that blob
            is_complete = False
    return is_complete and os.path.isdir(target)


def _move_incomplete(path: str, target: str, lock: str, aside: str) -> None:
    """Move a partial download, to which older clients append under a lock, unless the cache's is longer."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.link(path, target)  # takes no lock: a client that begins now finds it, or was faster, and this fails
    except OSError:
        pass
    else:
        os.unlink(path)
        return
    with _locked(lock) as is_ours:
        if not is_ours:
            return
        if not os.path.exists(target) or os.path.getsize(target) < os.path.getsize(path):
            moving.move(path, target, aside)
        else:
            os.unlink(path)


@contextmanager
def _locked(lock: str) -> Iterator[bool]:
    """A context that holds a client's lock, True, or False while a client does. Raises OSError.

    A lock file that was made for it is removed again while it is held: a client that opened it meanwhile finds it
    without a name, and makes another one. Those of clients stay, as they leave them.
    """
    is_new = not os.path.lexists(lock)
    os.makedirs(os.path.dirname(lock), exist_ok=True)
    fd = os.open(lock, os.O_RDWR | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o664)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            if is_new:
                os.unlink(lock)
    finally:
        os.close(fd)


def _drop_copies(linked_repo: str) -> None:
    """Remove forced downloads of a user's own files, as long as those are there, to save the space."""
    origin = _origin(linked_repo)
    if origin is None:
        return
    view = f"{linked_repo}/{hfcache.VIEWS}/{origin['commit']}"
    copies: dict[str, str] = {}
    for relative in files.below(view):
        path = f"{view}/{relative}"
        if os.path.islink(path):
            if not _is_in(linked_repo, path):
                continue
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        if os.path.lexists(path) and not os.path.islink(path) and os.path.isfile(path):
            copies[relative] = path
    if not copies:
        return
    try:
        sizes = Patience().ask(origin["folder"], partial(_sizes, origin["folder"], tuple(copies)))
    except OSError:  # they stay, and move to the cache
        return
    for relative, path in copies.items():
        if os.path.lexists(path) and os.path.getsize(path) == sizes.get(relative):  # two names may share a blob
            os.unlink(path)


def _sizes(folder: str, names: Collection[str]) -> dict[str, int]:
    """The sizes of those files in a folder that are there."""
    return {name: os.path.getsize(f"{folder}/{name}") for name in names if os.path.isfile(f"{folder}/{name}")}


def _own_commit(repo: str) -> str | None:
    origin = _origin(repo)
    return origin["commit"] if origin else None


def _origin(repo: str) -> dict[str, str] | None:
    origin = store.recorded(repo)
    is_model = all(isinstance(origin.get(name), str) for name in ("folder", "commit"))
    return origin if is_model else None


def _names(folder: str) -> list[str]:
    """What is in a folder, which is not a link; nothing where there is none. Raises OSError."""
    return [] if os.path.islink(folder) else sorted(entry.name for entry in files.entries(folder))
