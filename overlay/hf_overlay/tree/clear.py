"""Removing a session's tree without losing a download."""

from __future__ import annotations

import os
from collections.abc import Collection

from hf_overlay import hfcache
from hf_overlay.config import OWNER_FILE
from hf_overlay.tree import announced, files, store


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
        if entry.is_symlink() or entry.name in (hfcache.LOCKS, hfcache.CACHEDIR_TAG) or _is_litter(entry.name):
            is_payload = False  # of ours, or put by clients beside what they download
        else:
            is_repo = hfcache.is_repo(entry.name)
            is_payload = files.has_payload(entry.path) if is_repo else files.has_bytes(entry.path)
        if is_payload or entry.path in unfinished:
            kept.append(entry.path)
        else:
            files.remove(entry.path)
    return kept
