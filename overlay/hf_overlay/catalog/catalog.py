"""The user's folders and the real cache seen together: what can be loaded, from where, and why. Reads only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from hf_overlay import config, hfcache, tiers
from hf_overlay.catalog import kinds
from hf_overlay.catalog.away import Away, away_after
from hf_overlay.catalog.index import Index
from hf_overlay.catalog.plan import Plan, Resolution, fold, plan, resolve
from hf_overlay.catalog.realcache import RealCache
from hf_overlay.catalog.scan import Scanner
from hf_overlay.catalog.settling import settled
from hf_overlay.catalog.spelling import Spellings, check_id
from hf_overlay.config import Settings
from hf_overlay.errors import (
    IncompleteModel,
    ModelNotFound,
    SourceAway,
    UsageError,
    check_descriptors,
)
from hf_overlay.hfcache import LinkedRepo
from hf_overlay.models import HELD_BACK, CachedRepo, Code, Layer, Model, Reason, Reject, Source
from hf_overlay.patience import NoAnswer, Patience
from hf_overlay.tiers import MergedRepo

if TYPE_CHECKING:
    from hf_overlay.catalog.explain import Candidate

_NAMES: Mapping[Layer, str] = {"map": "mapped folder", "custom": "model path", "tier": "folder below the cache"}
"""What messages call a source."""


class Catalog:
    """The models of one configuration, as of the last `scan()`."""

    def __init__(self, settings: Settings, *, index: str | None = None) -> None:
        """Scan the user's folders. `index` is the folder in which processes keep for each other what they found.

        Raises UsageError for a model path that is a file, and, here and later, OverlayError where mlx-lm's model types
        are needed and cannot be read.
        """
        self.settings = settings
        self.types = kinds.restriction(settings.kind, trusts_code=settings.trusts_code, encoders=settings.encoders)
        self.patience = Patience()
        """What asks the disks of the model paths and of the real cache."""
        self._scanner = Scanner(
            settings.roots,
            settings.hub_cache,
            self.types,
            self.patience,
            below=settings.below,
            maps=settings.maps,
            index=None if index is None else Index(index, kinds.version(self.types)),
        )
        self._warned: set[str] = set()
        self.real_cache = RealCache(settings.hub_cache, self._scanner, self.patience)
        self._made: dict[str, LinkedRepo | MergedRepo] = {}
        """Repos of the last plan that are made in the tree, by entry name."""
        self._in_tiers: dict[str, frozenset[str]] = {}
        """By tier, the names of the repos that the last plan found in it."""
        self._away: dict[str, Away] = {}
        self._excluded: set[str] = set()
        """The ids to exclude, as the user's folders spell them."""
        self._hidden: Mapping[str, str] = {}
        """Cached repos that share their name with another on the tree's volume: path -> path of that."""
        self._layers: tuple[Source, ...] = ()
        self._scanned: tuple[Source, ...] = ()
        """As `_layers`, but with models that have just changed."""
        self._planned: tuple[tuple[object, ...], Plan] | None = None
        """The last plan, and all that it was made of."""
        self._spellings = self._tier_spellings = Spellings((), self.patience)
        self.scan()
        self._refuse_files()

    def hold(self, repos: Mapping[str, str]) -> None:
        """Count repos as the real cache's from now on, where it has none of that name: name -> path."""
        self._scanner.held = dict(repos)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The maps and model paths, in order of precedence, which stand in front of the real cache."""
        return tuple(source for source in self._layers if source.layer != "tier")

    @property
    def below(self) -> tuple[Source, ...]:
        """The tiers behind the real cache, in order of precedence."""
        return tuple(source for source in self._layers if source.layer == "tier")

    def _refuse_files(self) -> None:
        for source in self._layers:
            if source.problem is not None and source.problem.code is Code.NOT_A_FOLDER:
                raise UsageError(
                    f"{_NAMES[source.layer]} {source.root} is a file; give the folder that holds your models"
                )

    def scan(self, *, only_settled: bool = False) -> None:
        """Look at the user's folders and the tiers again.

        `only_settled` is for scanning at short intervals: a model that changed since the last scan is taken over by
        the next scan that finds it unchanged, so that one that is being copied does not count as new every time.
        """
        scanned = self._scanner.scan()
        if self.settings.exclude:
            spellings = Spellings(scanned, self.patience)
            self._excluded = {spellings.of(each) or each for each in self.settings.exclude}
        found = tuple(map(self._without_excluded, scanned))
        scanned_before, self._scanned = self._scanned, found
        if only_settled and found != scanned_before:
            found = settled(found, before=scanned_before, taken=self._layers)
        before, self._layers = self._layers, found
        away = away_after(
            self._away,
            before,
            found,
            held=self._in_tiers,
            maps=self.settings.maps,
            is_there=lambda root: self.is_folder(root, root),
        )
        if found != before:
            self._spellings = Spellings([source for source in found if source.layer != "tier"], self.patience)
            self._tier_spellings = Spellings([source for source in found if source.layer == "tier"], self.patience)
        self._away = away  # replaced as a whole: other threads read it

    def _without_excluded(self, source: Source) -> Source:
        if not self._excluded:
            return source
        out = [
            model
            for model in source.models
            if hfcache.full_id(hfcache.repo_folder(model.id, model.kind)) in self._excluded
        ]
        if not out:
            return source
        reason = Reason(Code.EXCLUDED, "is left out by --exclude")
        rejects = [Reject(model.path, model.id, reason, model.root) for model in out]
        models = tuple(model for model in source.models if model not in out)
        return source._replace(models=models, rejects=(*source.rejects, *rejects))

    def away(self, repo_id: str, kind: str = "models") -> str | None:
        """The map, model path or tier that held a repo and has gone away since; None when there is none.

        A tier counts only where nothing else holds the repo. Case does not matter: nobody can see whether it did on
        that volume, and it does not on the Hub.
        """
        name = hfcache.repo_folder(repo_id, kind)
        roots = [root for root, each in self._away.items() if fold(name) in map(fold, each.names)]
        in_front = next((root for root in roots if root not in self.settings.below), None)
        if in_front is not None or not roots or name in self._made:
            return in_front
        hub = self.settings.hub_cache
        is_cached = self.real_cache.has(repo_id) if kind == "models" else self.is_folder(f"{hub}/{name}", hub)
        return None if is_cached else roots[0]

    @property
    def models_away(self) -> dict[str, str]:
        """The ids of the models that maps, model paths and tiers held which have gone away since: id -> folder."""
        found: dict[str, str] = {}
        for root, each in self._away.items():
            for name in each.names:
                kind, repo_id = config.kind_and_id(hfcache.full_id(name))
                if kind == "models":
                    found.setdefault(repo_id, root)
        return found

    def incomplete(self, model_id: str) -> Reject | None:
        """The user's folder of this id that cannot be loaded for now (HELD_BACK); None when there is none."""
        if model_id in self._excluded:
            return None
        rejects = (reject for source in self.sources for reject in source.rejects if reject.id == model_id)
        return next((reject for reject in rejects if reject.reason.code in HELD_BACK), None)

    def is_folder(self, path: str, root: str) -> bool:
        """Whether there is a folder at `path`, which is in the model path or cache `root`; False without an answer."""
        try:
            return self.patience.ask(root, partial(os.path.isdir, path))
        except NoAnswer:
            return False

    def answers(self, root: str) -> bool:
        """Whether the disk of a model path, or of the cache, answers, be it that nothing is there."""
        try:
            self.patience.ask(root, partial(os.path.isdir, root))
        except NoAnswer:
            return False
        return True

    def resolutions(self) -> dict[str, Resolution]:
        """For each id there is, sorted, the model that answers to it. The real cache is scanned now."""
        cache = self.real_cache.models()
        return resolve([*self.sources, cache._replace(models=tuple(map(self._as_spelled, cache.models))), *self.below])

    def _as_spelled(self, model: Model) -> Model:
        """A cached model under its id as the user's folders spell it."""
        spelled = self._spellings.of(model.id)
        return model if spelled in (None, model.id) else model._replace(id=spelled)

    def plan(self, *, case_insensitive: bool) -> Plan:
        """The tree that shows all layers. The real cache's entries, and the repos in tiers, are listed now.

        The same object again while nothing has changed.
        """
        behind = self._behind()
        names = {each.name for each in behind if isinstance(each, CachedRepo)}
        sources, cached = self.sources, self.real_cache.entries(names)
        given = (sources, cached, behind, case_insensitive)
        if self._planned is not None and self._planned[0] == given:
            return self._planned[1]
        made = plan(sources, cached, behind=behind, case_insensitive=case_insensitive, earlier=self._made)
        self._planned = given, made
        self._made = made.made
        self._hidden = made.hidden
        return made

    def tier_repos(self) -> list[CachedRepo]:
        """What the tiers hold of repos of any kind, as it is now: in order of precedence."""
        found = self._scanner.tier_repos()
        self._in_tiers |= {
            root: frozenset(repo.name for repo in found if repo.root == root) for root in {repo.root for repo in found}
        }
        return [repo for repo in found if hfcache.full_id(repo.name) not in self.settings.exclude]

    def _behind(self) -> list[CachedRepo | Model]:
        """What the tiers hold, as `plan` takes it: in each tier, repos in cache layout before folders."""
        repos = self.tier_repos()
        places = {repo.path for repo in repos}
        behind: list[CachedRepo | Model] = []
        for source in self.below:
            behind += [repo for repo in repos if repo.root == source.root]
            folders = (model for model in source.models if os.path.dirname(os.path.dirname(model.path)) not in places)
            behind += [tiers.of_model(model) or model for model in folders]
        return behind

    def find(self, model_id: str) -> Model:
        """The model that answers to an id, which may be any string.

        Raises InvalidModelId, SourceAway, IncompleteModel or ModelNotFound; the text of each says what to do.
        """
        model_id = self.spelled(model_id)
        found = [*_of_id(self.sources, model_id)]
        for model in found:
            if self.is_folder(model.path, model.root):
                return model
        cached = self._scanner.read_cached(model_id)
        if isinstance(cached, Model):
            return cached
        for model in (behind := [*_of_id(self.below, model_id)]):
            if self.is_folder(model.path, model.root):
                return model
        found += behind
        unplugged = next((model.root for model in found if not self.is_folder(model.root, model.root)), None)
        if away := unplugged or self.away(model_id):
            state = "does not answer" if self.patience.is_waiting_for(away) else "is not there now"
            raise SourceAway(f"{model_id} is in {away}, which {state}; connect that drive and try again")
        if (reject := self.incomplete(model_id)) is not None:
            raise IncompleteModel(incomplete_text(reject), problem=reject.reason.text)
        raise self._not_found(model_id)

    def read_made(self, model_id: str, path: str) -> Model | None:
        """The model in the merged repo at `path`; None where there is none that can be loaded, or none was made."""
        made = self._made.get(hfcache.repo_folder(model_id))
        if not isinstance(made, MergedRepo) or not all(self.is_folder(each, root) for each, root in made.sources):
            return None
        found = self._scanner.read_repo(path, model_id)
        return found if isinstance(found, Model) else None

    def explain(self, model_id: str) -> list[Candidate]:
        """Every place looked at for an id, the winner first; when none answers, no candidate has Code.WINS.

        Ids of other kinds of repo have the kind in front: `datasets/org/name`. Raises InvalidModelId.
        """
        model_id = self.spelled(model_id)
        kind, repo_id = config.kind_and_id(model_id)
        if kind != "models":
            return self._explain_repo(kind, repo_id)
        from hf_overlay.catalog import explain  # for people, which most commands do not print

        cached = self._scanner.read_cached(model_id)
        return explain.model(
            model_id,
            self._about(kind, model_id, self.sources),
            cached,
            self.below,
            look=lambda root: self._scanner.read(f"{root}/{model_id}", model_id, root),
        )

    def _explain_repo(self, kind: str, repo_id: str) -> list[Candidate]:
        name, hub = hfcache.repo_folder(repo_id, kind), self.settings.hub_cache
        is_cached = self.is_folder(f"{hub}/{name}/snapshots", hub)
        in_tiers = [repo.path for repo in self.tier_repos() if repo.name == name]
        layers = self._about(kind, repo_id, self._layers)
        from hf_overlay.catalog import explain

        return explain.other_repo(kind, repo_id, layers, f"{hub}/{name}", in_tiers, is_cached=is_cached)

    def _about(self, kind: str, repo_id: str, sources: Iterable[Source]) -> list[Source]:
        """Those of some sources that may say something of an id: not the maps of others."""
        others = {each.folder for each in self.settings.maps if (each.kind, each.id) != (kind, repo_id)}
        others -= {each.folder for each in self.settings.maps if (each.kind, each.id) == (kind, repo_id)}
        return [source for source in sources if source.layer != "map" or source.root not in others]

    def warnings(self, downloads: str | None = None) -> list[str]:
        """Warnings about paths and folders that cannot be used, without those that the call before has returned.

        `downloads` says what becomes of downloads while the real cache keeps none; None where there will be none.
        """
        now: dict[str, None] = {}
        for source in self._layers:
            if source.problem is not None:
                rest = (
                    "the other model paths and the Hugging Face cache"
                    if len(self.sources) > 1
                    else "the Hugging Face cache"
                )
                end = f"going on with {rest}" if source.layer == "custom" else "going on without it"
                now[f"{_NAMES[source.layer]} {source.root} {source.problem.text}; {end}"] = None
            for reject in source.rejects:
                if reject.id is None or reject.reason.code in (Code.NO_PERMISSION, Code.UNREADABLE):
                    now[f"{reject.path} {reject.reason.text}; it is left out"] = None
        for reject, path in self._substituted():
            now[f"{reject.path} is incomplete; until it is whole, {reject.id} comes from {path}"] = None
        now |= dict.fromkeys(self.real_cache.warnings(downloads))
        for path, other in self._hidden.items():
            now[f"{path} differs from {other} in case only, one name on the overlay's volume; it is left out"] = None
        for root in self._away:
            if any(source.root == root and source.problem is None for source in self._layers):
                layer: Layer = "tier" if root in self.settings.below else "custom"
                now[f"{_NAMES[layer]} {root} is empty and on another volume than before; going on without it"] = None
        fresh = [warning for warning in now if warning not in self._warned]
        self._warned = set(now)
        return fresh

    def _substituted(self) -> Iterator[tuple[Reject, str]]:
        """The user's folders that lack a part of their weights, each with the folder that answers to its id instead."""
        broken = {
            reject.id: reject
            for source in reversed(self.sources)
            for reject in reversed(source.rejects)
            if reject.reason.code is Code.INCOMPLETE and reject.id is not None
        }
        if not broken:
            return
        order = {source.root: number for number, source in enumerate(self.sources)}
        winners = {model_id: resolution.winner for model_id, resolution in resolve(self.sources).items()}
        for model_id, reject in broken.items():
            winner = winners.get(model_id) or self._scanner.read_cached(model_id)
            if isinstance(winner, Model) and order[reject.root] <= order.get(winner.root, len(order)):
                yield reject, winner.path

    def spelled(self, model_id: str) -> str:
        """The id as the user's folders spell it, where one of them answers to this spelling; else as it is given.

        Raises InvalidModelId.
        """
        check_id(model_id)
        if (in_front := self._spellings.of(model_id)) is not None:
            return in_front
        behind, hub = self._tier_spellings.of(model_id), self.settings.hub_cache
        if behind is None or self.is_folder(f"{hub}/{hfcache.repo_folder(model_id)}", hub):
            return model_id
        return behind

    def _not_found(self, model_id: str) -> ModelNotFound:
        try:
            import difflib  # only for this message, as what explains

            lost = [f"{candidate.path} {candidate.reason.text}" for candidate in self.explain(model_id)]
        except OSError as error:  # an import needs a file descriptor
            check_descriptors(error)
            raise
        near = next(iter(difflib.get_close_matches(model_id, self.resolutions(), n=1, cutoff=0.8)), None)
        hint = f"; did you mean {near}?" if near else ""
        return ModelNotFound(f"no model {model_id}: {'; '.join(lost)}{hint}", near=near)


def _of_id(sources: Iterable[Source], model_id: str) -> Iterator[Model]:
    for source in sources:
        yield from (model for model in source.models if model.id == model_id and model.kind == "models")


def incomplete_text(reject: Reject) -> str:
    """The sentence for a person whose folder lacks a part of its weights, or cannot be read."""
    what = f"{reject.reason.text}; correct that"
    if reject.reason.code is Code.INCOMPLETE:
        what = f"is incomplete ({reject.reason.text}); copy it again"
    return f"{reject.id} in {reject.path} {what}, or --exclude {reject.id} lets the Hub answer"
