"""Repos in the real cache and in tiers as a plan takes them, remembered while they look the same."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import partial

from hf_overlay import hfcache, tiers
from hf_overlay.abreast import Abreast
from hf_overlay.catalog.memo import Memo, stamps
from hf_overlay.errors import check_descriptors
from hf_overlay.models import CachedRepo


def examine_all(
    hub: str,
    memo: Memo[hfcache.Examined],
    held: Mapping[str, str],
    wanted: Collection[str],
    repos_memo: Memo[CachedRepo],
) -> tuple[
    dict[str, str], dict[str, hfcache.Examined], Memo[hfcache.Examined], dict[str, CachedRepo], Memo[CachedRepo]
]:
    """The entries of a hub folder and those held for it, what is known of each repo, by path, and the memo of that.

    Then, by name, all that is in the repos that are `wanted`, and the memo of that. Raises OSError.
    """
    entries = {**held, **hfcache.entries(hub)}
    paths = [path for name, path in entries.items() if "--" in name]
    examined = dict(zip(paths, Abreast().each(partial(_examine, memo=memo), paths), strict=True))
    repos = {name: read_repo(name, entries[name], hub, repos_memo) for name in wanted if name in entries}
    return entries, examined, memo, repos, repos_memo


def tier_repos(
    root: str, hub_identity: tuple[int, int] | None, memo: Memo[CachedRepo]
) -> tuple[list[CachedRepo], Memo[CachedRepo]]:
    """What a tier holds of repos in cache layout, and the memo of that. Raises OSError.

    `hub_identity` is that of the real cache, which is no tier even where it lies in one.
    """
    place = tiers.place(root)
    status = os.stat(place)
    found = tiers.repos(place) if (status.st_dev, status.st_ino) != hub_identity else {}

    def look(name: str) -> CachedRepo | None:
        try:
            return read_repo(name, found[name], root, memo)
        except OSError as error:  # it hides only itself; the scan of the tier's models says why
            check_descriptors(error)
            return None

    return [repo for repo in Abreast().each(look, found) if repo is not None], memo


def read_repo(name: str, path: str, root: str, memo: Memo[CachedRepo]) -> CachedRepo:
    """All that is in a repo, from the memo where nothing has changed. Raises OSError."""
    repo = memo.recall(path)
    if repo is None:
        looked = stamps(tiers.watched(path))
        repo = tiers.read(name, path, root)
        memo.remember(path, repo, looked)
    return repo


def _examine(repo: str, memo: Memo[hfcache.Examined]) -> hfcache.Examined:
    examined = memo.recall(repo)
    if examined is None:
        looked = stamps(hfcache.watched_by_examine(repo))
        examined = hfcache.examine(repo)
        memo.remember(repo, examined, looked)
    return examined
