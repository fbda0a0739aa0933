"""Downloads that dead sessions hold back, because the real cache could not take them yet.

A new session shows them, so that nothing is fetched twice. It shares the lock on each session whose repos it shows, and
a session whose lock is shared is not cleared: what is shown stays where it is while somebody may read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from hf_overlay import hfcache
from hf_overlay.patience import NoAnswer, Patience
from hf_overlay.tree import files, lease, store


@contextmanager
def shown(sessions: str, hub_cache: str, patience: Patience) -> Iterator[dict[str, str]]:
    """A context with the repos held back for `hub_cache` that it lacks: name -> path. They stay there while it lasts.

    A cache that does not answer lacks all of them. Raises OSError, or SessionError for a folder of sessions that is not
    to be trusted.
    """
    with ExitStack() as locks:
        found: list[tuple[float, dict[str, str]]] = []
        for path in lease.sessions_in(sessions):
            fd = lease.share(sessions, path)
            if fd is None:
                continue
            owner = lease.read_owner(path)
            is_for_cache = owner is not None and owner.hub_cache == hub_cache
            lacking = _lacking(hub_cache, repos(path), patience) if is_for_cache else {}
            if owner is not None and lacking:
                locks.callback(os.close, fd)
                found.append((owner.started, lacking))
            else:
                os.close(fd)
        yield {name: repo for _, lacking in sorted(found, key=lambda each: each[0]) for name, repo in lacking.items()}


def _lacking(hub_cache: str, repos: dict[str, str], patience: Patience) -> dict[str, str]:
    if not repos:
        return {}
    try:
        return patience.ask(hub_cache, partial(_not_there, hub_cache, repos))
    except NoAnswer:
        return repos


def _not_there(hub_cache: str, repos: dict[str, str]) -> dict[str, str]:
    return {name: repo for name, repo in repos.items() if not os.path.lexists(f"{hub_cache}/{name}")}


def repos(session: str) -> dict[str, str]:
    """The repos in cache layout that clients downloaded into a session, with at least a byte: name -> path.

    They include merged repos, which show what tiers hold beside what was downloaded.
    """
    merged = {
        store.repo_folder(entry.name): entry.path
        for entry in sorted(files.entries(f"{session}/{store.FOLDER}"), key=lambda entry: entry.name)
        if store.is_merged(entry.path) and files.has_payload(entry.path)
    }
    return merged | {
        entry.name: entry.path
        for hub in sorted(files.entries(f"{session}/hubs"), key=lambda entry: entry.name)
        for entry in files.entries(hub.path)
        if hfcache.is_repo(entry.name)
        and entry.is_dir(follow_symlinks=False)
        and os.path.isdir(f"{entry.path}/snapshots")
        and files.has_payload(entry.path)
    }


def payloads(session: str) -> list[str]:
    """The paths of all that clients downloaded into a session: repos of their own, and additions to linked repos."""
    linked = [entry.path for folder in store.FOLDERS for entry in files.entries(f"{session}/{folder}")]
    own = [entry.path for hub in files.entries(f"{session}/hubs") for entry in files.entries(hub.path)]
    return sorted(
        path for path in (*own, *linked) if not os.path.islink(path) and os.path.isdir(path) and files.has_payload(path)
    )
