"""Which model answers to which id, and what the tree must hold for that: pure functions of what was found.

The precedence, in one place: maps; the user's model paths in the order given, in one path a plain folder before a repo
in cache layout, then by path; the real cache; the tiers behind it in the order given. Up to the real cache, one model
hides all others of its id. What the real cache and tiers hold of one repo is shown together, each revision beside the
others. A folder in a tier that does not prove which revision it is stands in where the layers before it have nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hf_overlay import hfcache, tiers
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.models import CachedRepo, Code, Model, Reason, Source
from hf_overlay.tiers import MergedRepo


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
    repo: CachedRepo | None = None
    """All that it holds; read only where a tier holds some of the same repo."""


class LeftOut(NamedTuple):
    """A model that can be loaded by path only."""

    model: Model
    reason: Reason


class Plan(NamedTuple):
    """The content of the overlay's hub folder, down to each link. Equal plans make equal trees."""

    entries: Mapping[str, str | LinkedRepo | MergedRepo]
    """By name, sorted: the path in the real cache that a link leads to, the linked repo of a user's model, or the
    merged repo of what the real cache and tiers hold."""
    left_out: tuple[LeftOut, ...]
    hidden: Mapping[str, str]
    """Entries of the real cache that share their one name on the tree's volume with another: path -> path of that."""

    @property
    def linked_repos(self) -> dict[str, LinkedRepo]:
        """The linked repos alone, by the name of their entry."""
        return {name: entry for name, entry in self.entries.items() if isinstance(entry, LinkedRepo)}

    @property
    def made(self) -> dict[str, LinkedRepo | MergedRepo]:
        """The repos that are made in the tree, by the name of their entry."""
        return {name: entry for name, entry in self.entries.items() if not isinstance(entry, str)}


def resolve(sources: Iterable[Source]) -> dict[str, Resolution]:
    """For each id, sorted, the model that answers to it. `sources` come in order of precedence."""
    found: dict[str, list[Model]] = {}
    for model in _models(sources):
        found.setdefault(model.id, []).append(model)
    return {model_id: Resolution(models[0], tuple(models[1:])) for model_id, models in sorted(found.items())}


def plan(
    sources: Iterable[Source],
    cached: Iterable[Entry],
    *,
    behind: Iterable[CachedRepo | Model] = (),
    case_insensitive: bool,
    earlier: Mapping[str, LinkedRepo | MergedRepo] | None = None,
) -> Plan:
    """The tree for the user's `sources` in front of what is `cached`, the real cache's entries, and of the tiers.

    `behind` are the repos in the tiers, and their folders that do not prove a revision, in order of precedence.
    `case_insensitive`: names that differ in case or Unicode form only are one name on the tree's volume.
    `earlier` holds repos of a plan made before; those of which nothing changed are not worked out again.
    """
    sources = tuple(sources)
    earlier = earlier or {}
    key = fold if case_insensitive else str
    models: dict[str, Model] = {}
    left_out: list[LeftOut] = []
    taken: dict[str, str] = {}

    def claim(model: Model) -> None:
        """Give a model the name of its entry, unless another one has it or it can have none."""
        name = hfcache.repo_folder(model.id, model.kind)
        if (why := hfcache.why_not_linkable(model.id)) is not None:
            left_out.append(LeftOut(model, Reason(Code.NOT_LINKABLE, f"its id {why}")))
            return
        other = taken.setdefault(key(name), model.id)
        if other != model.id:
            text = f"its id differs from {other} in case only, which is one name on this volume"
            left_out.append(LeftOut(model, Reason(Code.NOT_LINKABLE, text)))
            return
        models[name] = model

    for resolution in resolve(sources).values():
        claim(resolution.winner)
    for model in _models(sources, other_kinds=True):
        claim(model)
    own: dict[str, Entry] = {}
    hidden: dict[str, str] = {}
    for each in sorted(cached, key=lambda entry: (not entry.commits, entry.name)):  # what holds a revision comes first
        if key(each.name) not in taken and (first := own.setdefault(key(each.name), each)) is not each:
            hidden[each.path] = first.path
    entries: dict[str, str | LinkedRepo | MergedRepo] = {each.name: each.path for each in own.values()}
    commits = {commit for each in own.values() for commit in each.commits}
    for name, holders in _by_name(behind).items():
        other = own.get(key(name))
        if key(name) in taken or (other is not None and other.name != name):
            continue
        if other is None and isinstance(holders[0], Model):
            claim(holders[0])
        elif repo := _merged_repo(other, holders, earlier.get(name)):
            entries[name] = repo
            taken[key(name)] = name
            commits.update(revision.commit for holder in repo.holders for revision in holder.revisions)
    for name, model in models.items():
        entries[name] = _linked_repo(model, commits, earlier.get(name))
    return Plan(dict(sorted(entries.items())), tuple(left_out), hidden)


def _by_name(behind: Iterable[CachedRepo | Model]) -> dict[str, list[CachedRepo | Model]]:
    """What tiers hold, by the name of its entry; in each, in order of precedence."""
    found: dict[str, list[CachedRepo | Model]] = {}
    for each in behind:
        name = hfcache.repo_folder(each.id) if isinstance(each, Model) else each.name
        found.setdefault(name, []).append(each)
    return found


def _merged_repo(
    own: Entry | None, holders: Iterable[CachedRepo | Model], earlier: LinkedRepo | MergedRepo | None
) -> MergedRepo | None:
    """The merged repo of the real cache's entry and what tiers hold; None where the entry itself has all of it."""
    held = [each for each in holders if isinstance(each, CachedRepo)]
    if own is not None:
        if own.repo is None or tiers.holds_all(own.repo, held):
            return None
        held = [own.repo, *held]
    if isinstance(earlier, MergedRepo) and earlier.holders == tuple(held):
        return earlier
    return tiers.merged_repo(held)


def _linked_repo(model: Model, commits: set[str], earlier: LinkedRepo | MergedRepo | None) -> LinkedRepo:
    """The linked repo of a model, whose commit is added to `commits`, those of all other repos.

    Clients delete by commit, in whichever repo they meet it first, so no two may share one: a model whose own commit
    is taken gets its fingerprint for a commit.
    """
    if model.commit in commits:
        model = model._replace(commit=None, fingerprint="")
    repo = earlier if isinstance(earlier, LinkedRepo) and earlier.model == model else hfcache.linked_repo(model)
    commits.add(repo.commit)
    return repo


def fold(name: str) -> str:
    """A form that is equal for names which a case- and normalisation-insensitive volume (APFS) takes for one."""
    return composed(name).casefold()


def composed(name: str) -> str:
    """A form that is equal for names which a normalisation-insensitive volume takes for one."""
    if name.isascii():
        return name
    import unicodedata  # for the few names that need it

    return unicodedata.normalize("NFC", name)


def _models(sources: Iterable[Source], *, other_kinds: bool = False) -> Iterator[Model]:
    """The models of the sources, or with `other_kinds` the folders that are mapped to datasets, spaces and kernels."""
    for source in sources:
        yield from (model for model in source.models if (model.kind != "models") is other_kinds)
