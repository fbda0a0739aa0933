"""From folders to models: which ones hold a model that can be loaded, and why each other one does not.

A scan reads and never writes. It collects what is broken and goes on, so that one bad folder hides only itself.
A `Scanner` remembers the models it has seen; scanning again costs two `stat` calls for an unchanged one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from hf_overlay import hfcache, tiers
from hf_overlay.catalog import reading, repos, weights
from hf_overlay.catalog.files import Listing, Unfit, holds, is_utf8, list_folder, reason_of
from hf_overlay.catalog.kinds import ModelTypes
from hf_overlay.catalog.memo import Memo, stamps
from hf_overlay.catalog.plan import fold
from hf_overlay.catalog.reading import Found
from hf_overlay.catalog.weights import Problems
from hf_overlay.config import OWNER_FILE, Map
from hf_overlay.models import CachedRepo, Code, Layer, Model, Reason, Reject, Source
from hf_overlay.patience import Patience
from hf_overlay.progress import alive

_CACHE = ""
"""The real cache among the model paths, of which none is empty. It may be one of them as well."""
_LASTING = frozenset({Code.NO_SNAPSHOT, Code.NO_CONFIG, Code.OTHER_KIND, Code.NO_WEIGHTS})
"""Reasons that hold for a repo in cache layout until one of its folders, its main or its config.json changes."""
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
    ) -> None:
        """`types` None takes every kind of model. `hub_cache` found inside a root stays the cache's.

        `below` are the tiers behind the cache.
        """
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
        self._seen: dict[str, _Seen] = {}
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
                folder: partial(_scan_mapped, folder, self._mapped_to(folder), self._remembered(_MAP + folder))
                for folder in dict.fromkeys(each.folder for each in self._maps)
            }
        )
        layers: dict[str, Layer] = {**dict.fromkeys(self._below, "tier"), **dict.fromkeys(self._roots, "custom")}
        found = self._patience.ask_each(
            {
                root: partial(_scan_root, root, layer, hub_identity, self._types, self._remembered(root))
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
            {hub: partial(_scan_cache, hub, self._types, self._remembered(_CACHE), self.held)}
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

    def _remembered(self, key: str) -> _Seen:
        """What the last scan remembers, for a round of its own."""
        seen = self._seen.get(key)
        return _Seen(Memo(), Memo(), Memo()) if seen is None else seen.next_round()

    def _taken(self, key: str, root: str, found: tuple[Source, _Seen] | OSError, layer: Layer) -> Source:
        if isinstance(found, OSError):
            return Source(root, reason_of(found), layer=layer)
        source, self._seen[key] = found
        return source


class _Seen(NamedTuple):
    """What a scan remembers for the next one."""

    found: Memo[Found]
    problems: Problems
    rejects: Memo[Reject | None]
    """Repos in cache layout that were rejected; None for one that only the last scan has rejected."""

    def next_round(self) -> _Seen:
        return _Seen(self.found.next_round(), self.problems.next_round(), self.rejects.next_round())


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
    root: str, layer: Layer, hub_identity: tuple[int, int] | None, types: ModelTypes | None, seen: _Seen
) -> tuple[Source, _Seen]:
    return _RootScan(root, layer, hub_identity, types, seen).source(), seen


def _scan_mapped(folder: str, maps: tuple[Map, ...], seen: _Seen) -> tuple[Source, _Seen]:
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


def _scan_cache(root: str, types: ModelTypes | None, seen: _Seen, held: Mapping[str, str]) -> tuple[Source, _Seen]:
    found = _Collected(root, "cache", seen)
    paths = dict(held)
    device, problem = None, None
    try:
        device = os.stat(root).st_dev
        paths |= {name: f"{root}/{name}" for name in os.listdir(root)}
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = reason_of(error)
    for name, path in sorted(paths.items()):
        alive()
        model_id = hfcache.model_id(name)
        if model_id is not None and not found.recall(path):
            found.read(path, model_id, reading.read_cached_repo, types)
    return found.source(device, problem), seen


class _Collected:
    """What one scan of one root has found so far."""

    def __init__(self, root: str, layer: Layer, seen: _Seen) -> None:
        self._root = root
        self._layer = layer
        self._memo = seen.found
        self._rejected = seen.rejects
        self.problems = seen.problems
        self._models: list[Model] = []
        self._rejects: list[Reject] = []
        self.junk = 0

    def source(self, device: int | None, problem: Reason | None = None) -> Source:
        return Source(
            self._root,
            problem,
            models=tuple(sorted(self._models, key=self._precedence)),
            rejects=tuple(sorted(self._rejects, key=lambda reject: reject.path)),
            junk=self.junk,
            device=device,
            layer=self._layer,
        )

    def _precedence(self, model: Model) -> tuple[str, bool, str]:
        """In one root a plain folder comes before a repo in cache layout, then the path decides."""
        return model.id, model.path != f"{self._root}/{model.id}", model.path

    def recall(self, path: str) -> bool:
        """Take over what the scan before found at `path`, a model or a reject; False if it may have changed."""
        found = self._memo.recall(path)
        if found is not None:
            self._add(found)
            return True
        reject = self._rejected.recall(path)
        if reject is not None:
            self._rejects.append(reject)
            return True
        return False

    def take(self, path: str, found: Found) -> None:
        """Add a model that was read at `path`."""
        if found.model.source != self._layer:
            found = found._replace(model=found.model._replace(source=self._layer))
        if found.watched is not None:
            self._memo.remember(path, found, stamps(found.watched))
        self._add(found)

    def read(
        self,
        repo: str,
        model_id: str,
        read: Callable[[str, str, str, ModelTypes | None, Problems], Found],
        types: ModelTypes | None,
    ) -> None:
        """Add the model in a repo in cache layout, or why there is none."""
        # Looked at only for what was rejected before: it takes as long as reading, and most programs scan once.
        was_rejected = self._rejected.knew(repo)
        looked = stamps(hfcache.watched_by_main(repo)) if was_rejected else ()
        try:
            self.take(repo, read(repo, model_id, self._root, types, self.problems))
        except (Unfit, hfcache.NoSnapshot, OSError) as error:
            reason = reason_of(error)
            self.reject(repo, model_id, reason)
            if reason.code in _LASTING:
                self._rejected.remember(repo, self._rejects[-1] if was_rejected else None, looked)

    def reject(self, path: str, model_id: str | None, reason: Reason) -> None:
        """Add a folder that is left out."""
        self._rejects.append(Reject(path, model_id, reason, self._root))

    def _add(self, found: Found) -> None:
        self._models.append(found.model)
        self.junk += found.junk


class _RootScan:
    """One scan of one of the user's model paths."""

    def __init__(
        self, root: str, layer: Layer, hub_identity: tuple[int, int] | None, types: ModelTypes | None, seen: _Seen
    ) -> None:
        self._given = root
        self._root = tiers.place(root) if layer == "tier" else root
        self._layer = layer
        self._types = types
        self._found = _Collected(root, layer, seen)
        self._hub_identity = hub_identity
        self._real_root = os.path.realpath(root)
        self._linked: set[tuple[int, int]] = set()
        """Folders without a model of their own that a link has led to."""

    def source(self) -> Source:
        try:
            status = os.stat(self._root)
            if not stat.S_ISDIR(status.st_mode):
                return Source(self._given, Reason(Code.NOT_A_FOLDER, "is not a folder"), layer=self._layer)
            top = list_folder(self._root)
        except OSError as error:
            return Source(self._given, reason_of(error), layer=self._layer)
        if "config.json" in top.files and any(name.endswith(".safetensors") for name in top.files):
            text = "is itself a model folder; give the folder above it, or --map an id to it"
            self._found.reject(self._root, None, Reason(Code.IS_A_MODEL, text))
        identity = (status.st_dev, status.st_ino)
        if identity == self._hub_identity:
            text = "is the Hugging Face cache itself, which is always looked at"
            self._found.reject(self._root, None, Reason(Code.IS_THE_CACHE, text))
        else:
            self._walk(top, identity)
        return self._found.source(status.st_dev)

    def _walk(self, top: Listing, identity: tuple[int, int]) -> None:
        """Depth first through the folders that group models; `chain` holds the folders above, to end loops."""
        pending: list[tuple[str, Listing, tuple[tuple[int, int], ...]]] = [("", top, (identity,))]
        while pending:
            group, folder, chain = pending.pop()
            self._found.junk += folder.junk
            for name in filter(is_utf8, folder.broken):
                model_id = f"{group}/{name}" if group else name
                reason = Reason(Code.BROKEN_LINK, "is a link to what is not there")
                self._found.reject(f"{self._root}/{model_id}", model_id, reason)
            for name in sorted(folder.folders, reverse=True):
                model_id = f"{group}/{name}" if group else name
                path = f"{self._root}/{model_id}"
                if self._found.recall(path) or hfcache.is_other_repo(name):
                    continue
                looked = self._look(path, model_id, name)
                if looked is None:
                    continue
                inside, here = looked
                if self._is_group(path, here, chain):
                    pending.append((model_id, inside, (*chain, here)))

    def _look(self, path: str, model_id: str, name: str) -> tuple[Listing, tuple[int, int]] | None:
        """A folder's listing and identity when models may lie inside it; None once it is dealt with."""
        if not is_utf8(name):
            self._found.reject(path, None, Reason(Code.BAD_NAME, "its name is not valid UTF-8; rename it"))
            return None
        if "\\" in name:
            text = "has a backslash in its name, which no id may have; rename it"
            self._found.reject(path, None, Reason(Code.BAD_NAME, text))
            return None
        try:
            status = os.stat(path)
            inside = list_folder(path)
        except OSError as error:
            self._found.reject(path, model_id, reason_of(error))
            return None
        here = (status.st_dev, status.st_ino)
        if here == self._hub_identity or OWNER_FILE in inside.files:
            return None
        cached_id = hfcache.model_id(name)
        if cached_id is not None and "snapshots" in inside.folders:
            read = reading.read_cached_repo if self._layer == "tier" else reading.read_users_repo
            self._found.read(path, cached_id, read, self._types)
            return None
        return None if self._is_model(path, model_id, inside) else (inside, here)

    def _is_model(self, path: str, model_id: str, folder: Listing) -> bool:
        """Take the folder as a model, or reject it as one; False: look for models inside it."""
        is_pipeline = "model_index.json" in folder.files
        has_weights = any(name.endswith(weights.SUFFIXES) for name in folder.files)
        if not is_pipeline and not has_weights and not reading.has_marker(path, folder, self._types):
            return False
        try:
            found = reading.read_folder(path, model_id, folder, self._given, self._types, self._found.problems)
            self._found.take(path, found)
        except (Unfit, OSError) as error:
            self._found.reject(path, model_id, reason_of(error))
            # A stray config.json in a folder of models must not hide them; a model's own subfolders stay its own.
            return is_pipeline or (has_weights and "config.json" in folder.files) or not folder.folders
        return True

    def _is_group(self, path: str, here: tuple[int, int], chain: tuple[tuple[int, int], ...]) -> bool:
        """Whether to look for models inside; links back up, and second links to one folder, are rejected."""
        if here in chain or (os.path.islink(path) and holds(os.path.realpath(path), self._real_root)):
            self._found.reject(path, None, Reason(Code.LINK_TO_PARENT, "is a link back to a folder above it"))
            return False
        if not os.path.islink(path):
            return True
        if here in self._linked:
            text = "links to a folder that another link has shown already"
            self._found.reject(path, None, Reason(Code.LINKED_TWICE, text))
            return False
        self._linked.add(here)
        return True


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
