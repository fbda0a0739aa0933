"""Which model answers to which id, and what the tree must hold for that: pure functions of what was found.

The precedence, in one place: the user's model paths in the order given, in one path a plain folder before a repo in
cache layout, then by path; the real cache last.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hf_overlay import hfcache
from hf_overlay.models import Model, Source


class Choice(NamedTuple):
    """The model an id stands for, and those it stands in front of, best first."""

    winner: Model
    shadows: tuple[Model, ...]


class Entry(NamedTuple):
    """Something in the real cache's hub folder."""

    name: str
    path: str
    commits: tuple[str, ...] = ()
    """The revisions it holds, when it is a repo."""


class Plan(NamedTuple):
    """The content of the overlay's hub folder. Equal plans make equal trees."""

    entries: Mapping[str, str | Model]
    """By name, sorted: the path a link leads to (the real cache's own), or the user's model that stands there."""
    left_out: tuple[tuple[Model, str], ...]
    """Models that can be loaded by path only, and why."""


def choose(sources: Iterable[Source]) -> dict[str, Choice]:
    """For each id, sorted, who wins. `sources` come in order of precedence, the real cache last."""
    found: dict[str, list[Model]] = {}
    for model in _models(sources):
        found.setdefault(model.id, []).append(model)
    return {model_id: Choice(models[0], tuple(models[1:])) for model_id, models in sorted(found.items())}


def plan(sources: Iterable[Source], cached: Iterable[Entry], *, case_insensitive: bool) -> Plan:
    """The tree for the user's `sources` in front of what is `cached`, the real cache's entries.

    `case_insensitive`: names that differ in case or Unicode form only are one name on the tree's volume.
    """
    entries: dict[str, str | Model] = {}
    left_out: list[tuple[Model, str]] = []
    taken: dict[str, str] = {}
    for choice in choose(sources).values():
        model = choice.winner
        name = hfcache.repo_folder(model.id)
        if (reason := hfcache.why_not_linkable(model.id)) is not None:
            left_out.append((model, f"its id {reason}"))
            continue
        other = taken.setdefault(fold(name) if case_insensitive else name, model.id)
        if other != model.id:
            left_out.append((model, f"its id differs from {other} in case only, which is one name on this volume"))
            continue
        entries[name] = model
    shown = [each for each in cached if (fold(each.name) if case_insensitive else each.name) not in taken]
    # Clients delete by commit, in whichever repo they meet it first: no two may share one.
    commits = {commit for each in shown for commit in each.commits}
    for name, entry in entries.items():
        if isinstance(entry, Model) and entry.commit is not None:
            if entry.commit in commits:
                entries[name] = entry._replace(commit=None)
            commits.add(entry.commit)
    entries |= {each.name: each.path for each in shown}
    return Plan(dict(sorted(entries.items())), tuple(left_out))


def fold(name: str) -> str:
    """Equal for names that a case- and normalisation-insensitive volume (APFS by default) takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _models(sources: Iterable[Source]) -> Iterator[Model]:
    for source in sources:
        yield from source.models
