"""Repos in the real cache and in tiers as a plan takes them, remembered while they look the same."""

import os
from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

from hf_overlay import hfcache, tiers
from hf_overlay.abreast import Abreast
from hf_overlay.catalog.memo import Memo, stamps
from hf_overlay.catalog.plan import Entry
from hf_overlay.errors import check_descriptors
from hf_overlay.models import CachedRepo


class Checked(NamedTuple):
    """An entry of the real cache, and whether an overlay can show it."""

    entry: Entry
    problem: str | None
    """Why every scan of a cache that holds it fails; None: none does."""


def examine_all(
    hub: str,
    memo: Memo[Checked],
    held: Mapping[str, str],
    wanted: Collection[str],
    repos_memo: Memo[CachedRepo],
) -> tuple[list[Checked], Memo[Checked], Memo[CachedRepo]]:
    """The entries of a hub folder and those held for it, and the memo of that. Raises OSError.

    Of the repos that are `wanted`, by name, all that is in them; the last is the memo of that.
    """
    found = {**held, **hfcache.entries(hub)}
    examined = list(Abreast().each(partial(_examine, memo=memo), found.items()))
    if wanted:
        examined = [
            each._replace(entry=each.entry._replace(repo=read_repo(each.entry.name, each.entry.path, hub, repos_memo)))
            if each.entry.name in wanted
            else each
            for each in examined
        ]
    return examined, memo, repos_memo


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


def _examine(named: tuple[str, str], memo: Memo[Checked]) -> Checked:
    name, path = named
    if "--" not in name:
        return Checked(Entry(name, path), None)
    examined = memo.recall(path)
    if examined is None:
        looked = stamps(hfcache.watched_by_examine(path))
        commits, problem = hfcache.examine(path)
        examined = Checked(Entry(name, path, commits), problem)
        memo.remember(path, examined, looked)
    return examined
