"""Which model answers to which id, and what the tree must hold for that: pure functions of what was found.

The precedence, in one place: the user's model paths in the order given, in one path a plain folder before a repo in
cache layout, then by path; the real cache last.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hf_overlay import hfcache
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.models import Code, Model, Reason, Source


class Resolution(NamedTuple):
    """The model that answers to an id, and the models of the same id that it shadows, best first."""

    winner: Model
    shadows: tuple[Model, ...]


class Entry(NamedTuple):
    """Something in the real cache's hub folder."""

    name: str
    path: str
    commits: tuple[str, ...] = ()
    """The revisions it holds, when it is a repo."""


class LeftOut(NamedTuple):
    """A model that can be loaded by path only."""

    model: Model
    reason: Reason


class Plan(NamedTuple):
    """The content of the overlay's hub folder, down to each link. Equal plans make equal trees."""

    entries: Mapping[str, str | LinkedRepo]
    """By name, sorted: the path in the real cache that a link leads to, or the linked repo of a user's model."""
    left_out: tuple[LeftOut, ...]
    hidden: Mapping[str, str]
    """Entries of the real cache that share their one name on the tree's volume with another: path -> path of that."""

    @property
    def linked_repos(self) -> dict[str, LinkedRepo]:
        """The linked repos alone, by the name of their entry."""
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, LinkedRepo)}


def resolve(sources: Iterable[Source]) -> dict[str, Resolution]:
    """For each id, sorted, the model that answers to it. `sources` come in order of precedence, the real cache last."""
    found: dict[str, list[Model]] = {}
    for model in _models(sources):
        found.setdefault(model.id, []).append(model)
    return {model_id: Resolution(models[0], tuple(models[1:])) for model_id, models in sorted(found.items())}


def plan(
    sources: Iterable[Source],
    cached: Iterable[Entry],
    *,
    case_insensitive: bool,
    earlier: Mapping[str, LinkedRepo] | None = None,
) -> Plan:
    """The tree for the user's `sources` in front of what is `cached`, the real cache's entries.

    `case_insensitive`: names that differ in case or Unicode form only are one name on the tree's volume.
    `earlier` holds linked repos of a plan made before; those of unchanged models are not worked out again.
    """
    models: dict[str, Model] = {}
    left_out: list[LeftOut] = []
    taken: dict[str, str] = {}
    for resolution in resolve(sources).values():
        model = resolution.winner
        name = hfcache.repo_folder(model.id)
        if (why := hfcache.why_not_linkable(model.id)) is not None:
            left_out.append(LeftOut(model, Reason(Code.NOT_LINKABLE, f"its id {why}")))
            continue
        other = taken.setdefault(fold(name) if case_insensitive else name, model.id)
        if other != model.id:
            text = f"its id differs from {other} in case only, which is one name on this volume"
            left_out.append(LeftOut(model, Reason(Code.NOT_LINKABLE, text)))
            continue
        models[name] = model
    shown: dict[str, Entry] = {}
    hidden: dict[str, str] = {}
    for each in sorted(cached, key=lambda entry: (not entry.commits, entry.name)):  # what holds a revision comes first
        name = fold(each.name) if case_insensitive else each.name
        if name not in taken and (first := shown.setdefault(name, each)) is not each:
            hidden[each.path] = first.path
    entries: dict[str, str | LinkedRepo] = {each.name: each.path for each in shown.values()}
    commits = {commit for each in shown.values() for commit in each.commits}
    for name, model in models.items():
        entries[name] = _linked_repo(model, commits, (earlier or {}).get(name))
    return Plan(dict(sorted(entries.items())), tuple(left_out), hidden)


def _linked_repo(model: Model, commits: set[str], earlier: LinkedRepo | None) -> LinkedRepo:
    """The linked repo of a model, whose commit is added to `commits`, those of all other repos.

    Clients delete by commit, in whichever repo they meet it first, so no two may share one: a model whose own commit
    is taken gets its fingerprint for a commit.
    """
    if model.commit in commits:
        model = model._replace(commit=None)
    repo = earlier if earlier is not None and earlier.model == model else hfcache.linked_repo(model)
    commits.add(repo.commit)
    return repo


def fold(name: str) -> str:
    """A form that is equal for names which a case- and normalisation-insensitive volume (APFS) takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _models(sources: Iterable[Source]) -> Iterator[Model]:
    for source in sources:
        yield from source.models
