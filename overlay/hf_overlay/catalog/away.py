"""Which sources have gone away since they were seen, and what they held: a pure function of two scans."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from hf_overlay import hfcache
from hf_overlay.config import Map
from hf_overlay.models import Source


class Away(NamedTuple):
    """A source that is away."""

    device: int | None
    """The device that it was on when it was there; None: unknown."""
    names: frozenset[str]
    """The names of the repos that it held."""


def away_after(
    away: Mapping[str, Away],
    before: Sequence[Source],
    found: Sequence[Source],
    *,
    held: Mapping[str, Collection[str]],
    maps: Sequence[Map],
    is_there: Callable[[str], bool],
) -> dict[str, Away]:
    """What is away, by root, after a scan that `found` what there is; `away` and `before` are those of the scan before.

    `held` are the names of the repos in cache layout that the plan before found, by root. `is_there` says whether the
    folder of a root is there. A map to what is not there is away from the start, since it names what it holds.
    """
    now = dict(away)
    for old, new in zip(before, found, strict=False):
        known = now.get(old.root, Away(old.device, frozenset()))
        in_cache_layout = held.get(old.root, ())
        has_held = bool(old.models or in_cache_layout)
        # The same drive, mounted again, may have another device number.
        is_other = new.device != old.device and not new.models
        if has_held and (new.problem is not None or is_other or not is_there(new.root)):
            names = (hfcache.repo_folder(each.id, each.kind) for each in old.models)
            now[old.root] = Away(old.device, known.names.union(in_cache_layout, names))
        elif old.root in now and (new.models or new.device == known.device):
            del now[old.root]
    for new in found:
        if new.layer == "map" and new.problem is not None:
            mapped = frozenset(hfcache.repo_folder(each.id, each.kind) for each in maps if each.folder == new.root)
            now[new.root] = Away(now[new.root].device if new.root in now else None, mapped)
    return now
