"""Which model answers to which id, and what the tree must hold for that: pure functions of what was found.

The precedence, in one place: the user's model paths in the order given, in one path a plain folder before a repo in
cache layout, then by path; the real cache last.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from overlay import hfcache
from overlay.models import Model, Source


class Choice(NamedTuple):
    """The model an id stands for, and those it stands in front of, best first."""

    winner: Model
    shadows: tuple[Model, ...]


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


def plan(sources: Iterable[Source], cached: Mapping[str, str], *, case_insensitive: bool) -> Plan:
    """The tree for the user's `sources` in front of the real cache's entries (`cached`, name -> path).

    `case_insensitive`: names that differ in case or Unicode form only are one name on the tree's volume.
    """
    entries: dict[str, str | Model] = {}
    left_out: list[tuple[Model, str]] = []
    taken: dict[str, str] = {}
    commits: set[str] = set()
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
        if model.commit in commits:  # two repos with one commit confuse deletions by commit
            model = model._replace(commit=None)
        elif model.commit is not None:
            commits.add(model.commit)
        entries[name] = model
    entries |= {name: path for name, path in cached.items() if (fold(name) if case_insensitive else name) not in taken}
    return Plan(dict(sorted(entries.items())), tuple(left_out))


def fold(name: str) -> str:
    """Equal for names that a case- and normalisation-insensitive volume (APFS by default) takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _models(sources: Iterable[Source]) -> Iterator[Model]:
    for source in sources:
        yield from source.models
