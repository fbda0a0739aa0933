"""Clears sessions that are over without losing a download.

A session that died may have downloads for a cache whose disk does not answer. So each look that may touch such a disk
is a question that is given up on (see patience): the session then stays as it is, and a later start clears it. Whoever
is in the middle of it, and waits for the disk, holds the session's lock, so that nobody else clears it meanwhile.
"""

import os
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

from hf_overlay import config, hfcache
from hf_overlay.config import OWNER_FILE
from hf_overlay.errors import OUT_OF_FILES, OutOfFiles, SessionError
from hf_overlay.messages import Messages
from hf_overlay.patience import NoAnswer, Patience
from hf_overlay.tree import announced, blobstore, files, lease, shared, store, usage, writeback

LINGER_SECONDS = 1.0
"""Longer than what a program started for itself takes to end after it, and another process to look at a lock."""
STALL_SECONDS = 3.0
"""A disk that takes so long to write a few megabytes does not answer."""
_STILL_USED = "a program still uses the overlay at {}; it is cleared at a later start"


class Cleared(NamedTuple):
    """A session that is over, and was cleared as far as possible."""

    path: str
    kept: tuple[str, ...]
    """The downloads in it that could not be moved into the real cache. They stay there.

    The session itself where it could not be cleared.
    """


class _Outcome(NamedTuple):
    """What became of some sessions that were to be cleared."""

    cleared: list[Cleared]
    used: set[str]
    """Paths of those that a program still uses."""
    warnings: list[str]


def check_answers(sessions: str, patience: Patience) -> None:
    """Raise SessionError when the disk of the folder of all sessions does not answer."""
    try:
        patience.ask(sessions, partial(os.path.isdir, sessions))
    except NoAnswer:
        raise SessionError(
            f"{sessions}, the folder for overlays, does not answer; check its drive or server, or set "
            f"{config.DIRECTORY_VARIABLE} to a folder elsewhere"
        ) from None


def clear_dead(sessions: str, patience: Patience | None = None, messages: Messages | None = None) -> list[Cleared]:
    """Clear every session that is over: its owner is known to be dead, and no program uses its tree.

    Raises OSError, or SessionError when the folder of all sessions is not to be trusted, or does not answer.
    """
    patience = patience or Patience()
    check_answers(sessions, patience)
    cleared = _clear_over(sessions, patience, messages or Messages())
    return [each for each in cleared if each.path not in each.kept]


def clear_earlier(environ: Mapping[str, str], patience: Patience, messages: Messages) -> None:
    """Clear dead sessions where earlier versions made them; what is wrong there is said, and keeps nothing back."""
    for folder in lease.all_sessions_folders(environ)[:-1]:
        try:
            clear_dead(folder, patience, messages)
        except (OSError, SessionError) as error:
            messages.warning(f"sessions in {folder} are not cleared: {error}")


def clear_ended(sessions: str, path: str, others: Collection[str], patience: Patience, messages: Messages) -> None:
    """Clear a session that this process has let go of, and those that are over since; `others` were there before it."""
    deadline = time.monotonic() + LINGER_SECONDS
    while path not in {each.path for each in _clear_over(sessions, patience, messages, others, own=path)}:
        if not os.path.lexists(path):
            return
        if time.monotonic() > deadline:
            messages.info(_STILL_USED.format(path))
            return
        time.sleep(0.02)


def _clear_over(
    sessions: str, patience: Patience, messages: Messages, others: Collection[str] = (), own: str = ""
) -> list[Cleared]:
    """As `clear_dead`, with those that could not be cleared: what is kept of each is all of it.

    Messages name neither `others`, of which there were some already, nor `own` as one that is still used.
    """
    cleared: list[Cleared] = []
    for disk, paths in _by_disk(sessions, messages if not own else None).items():
        try:
            patience.ask(disk, partial(os.path.isdir, disk))  # first without a lock, to leave the session to others
            found = patience.ask(disk, partial(_clear_each, sessions, paths, os.getpid()), seconds=STALL_SECONDS)
        except (OSError, OutOfFiles) as error:
            why = str(error)
            if isinstance(error, NoAnswer):
                why = f"{disk} does not answer; check that drive or server, or unmount it"
            for path in sorted(set(paths) - set(others)):
                messages.warning(
                    f"the overlay at {path} stays, with what was downloaded into it, until a later start: {why}"
                )
            cleared += [Cleared(path, (path,)) for path in paths]
            continue
        for warning in found.warnings:
            messages.warning(warning)
        for path in sorted(found.used - {*others, own}):
            messages.info(_STILL_USED.format(path))
        cleared += found.cleared
    return cleared


def _by_disk(sessions: str, messages: Messages | None) -> dict[str, list[str]]:
    """The sessions without a living owner, by a path on the disk that may keep whoever clears them waiting."""
    by_disk: dict[str, list[str]] = {}
    for path in lease.sessions_in(sessions, messages):
        with lease.dead(sessions, path) as is_dead:
            if not is_dead:
                continue
            owner = lease.read_owner(path)
            disk = owner.hub_cache if owner is not None and _leads_to_cache(path) else sessions
        by_disk.setdefault(disk, []).append(path)
    return by_disk


def _leads_to_cache(session: str) -> bool:
    """Whether the real cache is needed to clear a session: something was written there, or is to be moved there."""
    found = (entry for name in store.FOLDERS for entry in files.entries(f"{session}/{name}"))
    linked = (entry.path for entry in found if not entry.is_symlink())
    hubs = (entry for hub in files.entries(f"{session}/hubs") for entry in files.entries(hub.path))
    return (
        bool(announced.folders(session))
        or blobstore.has_record(session)
        or any(not entry.is_symlink() for entry in hubs)
        or any(map(writeback.is_worth_keeping, linked))
        or bool(shared.written(session))
    )


def _clear_each(sessions: str, paths: Collection[str], asker: int) -> _Outcome:
    """Clear those of some sessions that are over and in use by no program, for the process `asker`."""
    outcome = _Outcome([], set(), [])
    with ExitStack() as locks:
        # All are held before any is looked at, so that one look at the processes of this machine counts for all.
        dead = [path for path in paths if locks.enter_context(lease.dead(sessions, path))]
        outcome.used.update(usage.in_use(dead, asker=asker))
        for path in dead:
            if path not in outcome.used:
                outcome.cleared.append(_clear(path, outcome.warnings))
    return outcome


def _clear(path: str, warnings: list[str]) -> Cleared:
    """Clear one session that is over, and that nobody else clears."""
    try:
        shared.adopt(path)
        owner = lease.read_owner(path)
        stuck = {}
        if owner is not None:
            stuck = writeback.bring_home(path, owner.hub_cache)
            blobstore.share(path, owner.hub_cache, owner.started)
        kept = remove_tree(path, stuck)
        for kept_path in kept:
            reason = stuck.get(kept_path, "the cache holds, or a program is downloading, other bytes for it")
            warnings.append(f"a download stays in {kept_path} and is tried again at the next start: {reason}")
        if not kept:
            lease.remove(path)
    except OSError as error:
        if os.path.lexists(path):
            what = "it is tried again at the next start" if error.errno in OUT_OF_FILES else "remove it by hand"
            warnings.append(f"cannot clear the session at {path}: {error.strerror}; {what}")
        return Cleared(path, (path,))
    return Cleared(path, tuple(kept))


def remove_tree(session: str, unfinished: Collection[str] = ()) -> list[str]:
    """Remove a session's tree, except what clients downloaded into it: those paths are returned. Raises OSError.

    The `unfinished` stay as well: not all of each is in the real cache, even if its bytes are.
    """
    files.remove_links(session)  # first: from here on nothing in it leads out of it
    folders = ("home", "hubs", *store.FOLDERS)
    kept: list[str] = []
    for hub in files.entries(f"{session}/hubs"):
        if hub.is_dir(follow_symlinks=False):
            kept += _remove_unless_downloaded(hub.path, unfinished)
            files.remove_if_empty(hub.path)
        else:
            kept += _remove_stray(hub)
    for folder in (*store.FOLDERS, "home"):
        kept += _remove_unless_downloaded(f"{session}/{folder}", unfinished)
    if os.path.isdir(f"{session}/{store.UNFINISHED}"):
        files.remove(f"{session}/{store.UNFINISHED}")
    announced.remove_unused(session)
    blobstore.remove_record(session)
    for folder in folders:
        files.remove_if_empty(f"{session}/{folder}")
    for entry in files.entries(session):
        if entry.name != OWNER_FILE and not (entry.name in folders and entry.is_dir()):
            kept += _remove_stray(entry)
    return kept


def _remove_stray(entry: os.DirEntry[str]) -> list[str]:
    """Remove what nobody should have put there, unless it holds something: then its path is returned."""
    if files.has_bytes(entry.path) and not _is_litter(entry.name):
        return [entry.path]
    files.remove(entry.path)
    return []


def _is_litter(name: str) -> bool:
    """Whether a file of this name holds nothing that anybody wants, such as `.DS_Store`."""
    return hfcache.is_litter(name) or name.endswith(".lock")


def _remove_unless_downloaded(folder: str, unfinished: Collection[str]) -> list[str]:
    kept = []
    for entry in files.entries(folder):
        if entry.is_symlink() and entry.path not in unfinished:  # of ours
            os.unlink(entry.path)
            continue
        if entry.name in (hfcache.LOCKS, hfcache.CACHEDIR_TAG) or _is_litter(entry.name):
            is_payload = False  # put by clients beside what they download
        else:
            is_repo = hfcache.is_repo(entry.name)
            is_payload = files.has_payload(entry.path) if is_repo else files.has_bytes(entry.path)
        if is_payload or entry.path in unfinished:
            kept.append(entry.path)
        else:
            files.remove(entry.path)
    return kept
