"""From folders to models: which ones hold a model that can be loaded, and why each other one does not.

A scan reads and never writes. It collects what is broken and goes on, so that one bad folder hides only itself.
A `Scanner` remembers the models it has seen; scanning again costs two `stat` calls for an unchanged one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from hf_overlay import hfcache
from hf_overlay.abreast import Abreast
from hf_overlay.catalog import reading, repos
from hf_overlay.catalog.files import Unfit, list_folder, reason_of
from hf_overlay.catalog.index import Index
from hf_overlay.catalog.kinds import ModelTypes
from hf_overlay.catalog.memo import Memo
from hf_overlay.catalog.plan import fold
from hf_overlay.catalog.walk import Collected, RootScan, Seen
from hf_overlay.catalog.weights import Problems
from hf_overlay.config import Map
from hf_overlay.models import CachedRepo, Code, Layer, Model, Reject, Source
from hf_overlay.patience import Patience
from hf_overlay.progress import alive

_CACHE = ""
"""The real cache among the model paths, of which none is empty. It may be one of them as well."""
_MAP = "\0"
"""Before the path of a mapped folder, which may be a model path as well."""


class Scanner:
    """Scans model paths, again and again, at a cost that follows the changes."""

    def __init__(
        self,
        roots: tuple[str, ...],
        hub_cache: str,
        types: ModelTypes | None,
        patience: Patience | None = None,
        *,
        below: tuple[str, ...] = (),
        maps: tuple[Map, ...] = (),
        index: Index | None = None,
    ) -> None:
        """`types` None takes every kind of model. `hub_cache` found inside a root stays the cache's.

        `below` are the tiers behind the cache. `index` keeps what is found for later processes.
        """
        self._index = index
        self._roots = roots
        self._below = below
        self._maps = maps
        self._hub_identity: tuple[int, int] | None = None
        """Of the real cache, when it was looked at last."""
        self.held: Mapping[str, str] = {}
        """Repos that count as the cache's, where it has none of that name: name -> path."""
        self._hub_cache = hub_cache
        self._types = types
        self._patience = patience or Patience()
        self._repos: dict[str, Memo[CachedRepo]] = {}
        """By tier, the repos in it as they were read last."""
        self._seen: dict[str, Seen] = {}
        """By root, or under `_CACHE`, what its last scan remembers."""

    def scan(self) -> tuple[Source, ...]:
        """Each map, each root and each tier, in order.

        Never raises for what lies on the disk, nor waits for a disk that does not answer. Raises OutOfFiles when no
        file descriptor is free, and remembers what it knew.
        """
        # Asked at once, so that several that do not answer take no longer than one; the scans need the first's answer.
        folders = dict.fromkeys((*(each.folder for each in self._maps), *self._roots, *self._below))
        known = self._patience.ask_each(
            {self._hub_cache: partial(_identity, self._hub_cache)}
            | {folder: partial(_identity, folder) for folder in folders if folder != self._hub_cache}
        )
        identity = known[self._hub_cache]
        hub_identity = None if isinstance(identity, OSError) else identity
        self._hub_identity = hub_identity
        mapped = self._patience.ask_each(
            {
                folder: partial(
                    _scan_mapped, folder, self._mapped_to(folder), self._begun(_MAP + folder, folder, "map")
                )
                for folder in dict.fromkeys(each.folder for each in self._maps)
            }
        )
        layers: dict[str, Layer] = {**dict.fromkeys(self._below, "tier"), **dict.fromkeys(self._roots, "custom")}
        found = self._patience.ask_each(
            {
                root: partial(_scan_root, root, layer, hub_identity, self._types, self._begun(root, root, layer))
                for root, layer in layers.items()
            }
        )
        return (
            *(self._taken(_MAP + folder, folder, answer, "map") for folder, answer in mapped.items()),
            *(self._taken(root, root, found[root], "custom") for root in self._roots),
            *(self._taken(root, root, found[root], "tier") for root in self._below),
        )

    def tier_repos(self) -> list[CachedRepo]:
        """What the tiers hold of repos in cache layout, in order. A tier that does not answer holds none."""
        memos = {root: self._repos.get(root, Memo()).next_round() for root in self._below}
        found = self._patience.ask_each(
            {root: partial(repos.tier_repos, root, self._hub_identity, memo) for root, memo in memos.items()}
        )
        held: list[CachedRepo] = []
        for root in self._below:
            answer = found[root]
            if not isinstance(answer, OSError):
                held += answer[0]
                self._repos[root] = answer[1]
        return held

    def _mapped_to(self, folder: str) -> tuple[Map, ...]:
        return tuple(each for each in self._maps if each.folder == folder)

    def scan_cache(self) -> Source:
        """The real cache's models, as `mlx_lm.load(id)` would find them with the network down."""
        hub = self._hub_cache
        found = self._patience.ask_each(
            {hub: partial(_scan_cache, hub, self._types, self._begun(_CACHE, hub, "cache"), self.held)}
        )
        return self._taken(_CACHE, hub, found[hub], "cache")

    def read(self, path: str, model_id: str, root: str) -> Model | Reject:
        """The model in one folder below a model path, else why there is none; also for folders that scans pass over."""
        problems = self._remembered(root).problems

        try:
            return self._patience.ask(root, partial(_read, path, model_id, root, self._types, problems))
        except OSError as error:
            return Reject(path, model_id, reason_of(error), root)

    def read_cached(self, model_id: str) -> Model | Reject:
        """The model that the real cache holds under an id, else why there is none."""
        hub = self._hub_cache
        name = hfcache.repo_folder(model_id)
        problems = self._remembered(_CACHE).problems

        repo = f"{hub}/{name}"
        look = partial(_read_cached, repo, self.held.get(name), model_id, hub, self._types, problems)
        try:
            return self._patience.ask(hub, look)
        except OSError as error:
            return Reject(repo, model_id, reason_of(error), hub)

    def read_repo(self, repo: str, model_id: str) -> Model | Reject:
        """The main revision of a repo in cache layout at any place, else why there is none."""
        look = partial(
            _read_cached, repo, None, model_id, self._hub_cache, self._types, self._remembered(_CACHE).problems
        )
        try:
            return self._patience.ask(repo, look)
        except OSError as error:
            return Reject(repo, model_id, reason_of(error), self._hub_cache)

    def _remembered(self, key: str) -> Seen:
        """What the last scan remembers, for a round of its own."""
        seen = self._seen.get(key)
        return Seen.first(Memo(), Memo()) if seen is None else seen.next_round()

    def _begun(self, key: str, root: str, layer: Layer) -> Seen:
        """As `_remembered`, for a scan: before the first one of this process, what another one has kept."""
        if self._index is None or key in self._seen:
            return self._remembered(key)
        try:
            found, problems = self._patience.ask(self._index.folder, partial(self._index.load, (layer, root)))
        except OSError:
            found, problems = Memo(), Memo()
        return Seen.first(found, problems)

    def _keep(self, root: str, layer: Layer, seen: Seen) -> None:
        """Keep for later processes what this one's first scan has found."""
        if self._index is None or not (seen.found.has_changed or seen.problems.has_changed):
            return
        try:
            self._patience.ask(self._index.folder, partial(self._index.keep, (layer, root), seen.found, seen.problems))
        except OSError:
            pass

    def _taken(self, key: str, root: str, found: tuple[Source, Seen] | OSError, layer: Layer) -> Source:
        if isinstance(found, OSError):
            return Source(root, reason_of(found), layer=layer)
        source, seen = found
        if key not in self._seen:
            self._keep(root, layer, seen)
        self._seen[key] = seen
        return source


def _read(path: str, model_id: str, root: str, types: ModelTypes | None, problems: Problems) -> Model | Reject:
    try:
        return reading.read_folder(path, model_id, list_folder(path), root, types, problems).model
    except (Unfit, OSError) as error:
        return Reject(path, model_id, reason_of(error), root)


def _read_cached(
    repo: str, held: str | None, model_id: str, hub: str, types: ModelTypes | None, problems: Problems
) -> Model | Reject:
    """The model in a cached repo, or, where there is none, in the one that a dead session holds for the cache."""
    try:
        if held is not None and not os.path.isdir(repo):
            repo = held
        os.stat(repo)
        if os.path.dirname(repo) == hub:
            name = _spelled(hub, os.path.basename(repo))
            if name != os.path.basename(repo):
                repo, model_id = f"{hub}/{name}", hfcache.model_id(name) or model_id
        return reading.read_cached_repo(repo, model_id, hub, types, problems).model
    except (Unfit, hfcache.NoSnapshot, OSError) as error:
        return Reject(repo, model_id, reason_of(error), hub)


def _scan_root(
    root: str, layer: Layer, hub_identity: tuple[int, int] | None, types: ModelTypes | None, seen: Seen
) -> tuple[Source, Seen]:
    return RootScan(root, layer, hub_identity, types, seen).source(), seen


def _scan_mapped(folder: str, maps: tuple[Map, ...], seen: Seen) -> tuple[Source, Seen]:
    """The models, and repos of other kinds, that a mapped folder stands for."""
    models: list[Model] = []
    rejects: list[Reject] = []
    device, problem = None, None
    try:
        device = os.stat(folder).st_dev
        listing = list_folder(folder)
        for each in maps:
            try:
                models.append(reading.read_mapped(folder, each, listing, seen.problems))
            except (Unfit, hfcache.NoSnapshot) as error:
                rejects.append(Reject(folder, each.id, reason_of(error), folder))
    except OSError as error:
        problem = reason_of(error)
    if not models:
        # A mount point without its drive, above all. It is away, so that nothing is downloaded in its place.
        unusable = [each for each in rejects if each.reason.code is not Code.INCOMPLETE]
        problem = problem or next((each.reason for each in unusable), None)
        rejects = [each for each in rejects if each not in unusable]
    return Source(folder, problem, tuple(models), tuple(rejects), device=device, layer="map"), seen


def _scan_cache(root: str, types: ModelTypes | None, seen: Seen, held: Mapping[str, str]) -> tuple[Source, Seen]:
    found = Collected(root, "cache", seen)
    paths = dict(held)
    device, problem = None, None
    try:
        device = os.stat(root).st_dev
        paths |= {name: f"{root}/{name}" for name in os.listdir(root)}
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = reason_of(error)

    def look(repo: tuple[str, str]) -> None:
        path, model_id = repo
        if not found.recall(path):
            found.read(path, model_id, reading.read_cached_repo, types)

    ids = ((path, hfcache.model_id(name)) for name, path in sorted(paths.items()))
    for _ in Abreast().each(look, [(path, model_id) for path, model_id in ids if model_id is not None]):
        alive()
    return found.source(device, problem), seen


def _spelled(hub: str, name: str) -> str:
    """The name of an entry of the cache as the disk spells it: the volume may ignore case."""
    names = os.listdir(hub)
    return name if name in names else next((each for each in names if fold(each) == fold(name)), name)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
