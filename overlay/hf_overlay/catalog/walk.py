"""The walk through one root: each folder in it is a model, a group of folders, or rejected with a reason."""

import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hf_overlay import hfcache, tiers
from hf_overlay.abreast import Abreast
from hf_overlay.catalog import reading, weights
from hf_overlay.catalog.files import Listing, Unfit, holds, is_utf8, list_folder, reason_of
from hf_overlay.catalog.kinds import ModelTypes
from hf_overlay.catalog.memo import Memo, stamps
from hf_overlay.catalog.reading import Found
from hf_overlay.catalog.weights import Problems
from hf_overlay.config import OWNER_FILE
from hf_overlay.models import Code, Layer, Model, Reason, Reject, Source

_LASTING = frozenset({Code.NO_SNAPSHOT, Code.NO_CONFIG, Code.OTHER_KIND, Code.NO_WEIGHTS})
"""Reasons that hold for a repo in cache layout until one of its folders, its main or its config.json changes."""


class Seen(NamedTuple):
    """What a scan remembers for the next one."""

    found: Memo[Found]
    problems: Problems
    rejects: Memo[Reject | None]
    """Repos in cache layout that were rejected; None for one that only the last scan has rejected."""
    made: Memo[tuple[object, Source]]
    """By root, all that a scan found, and the source that it made of that."""

    @classmethod
    def first(cls, found: Memo[Found], problems: Problems) -> "Seen":
        """What a first scan of this process begins with."""
        return cls(found, problems, Memo(), Memo())

    def next_round(self) -> "Seen":
        found, problems, rejects, made = self
        return Seen(found.next_round(), problems.next_round(), rejects.next_round(), made.next_round())


class Collected:
    """What one scan of one root has found so far. Several threads may add to it."""

    def __init__(self, root: str, layer: Layer, seen: Seen) -> None:
        self._root = root
        self._layer = layer
        self._memo = seen.found
        self._rejected = seen.rejects
        self._made = seen.made
        self.problems = seen.problems
        self._models: list[Model] = []
        self._rejects: list[Reject] = []
        self.junk: list[int] = []
        """Numbers of AppleDouble files, to be added up: several threads may have found some."""

    def source(self, device: int | None, problem: Reason | None = None) -> Source:
        """All that was found: the same object as the scan before returned, where that found the same."""
        found = self._models, self._rejects, sum(self.junk), device, problem
        before = self._made.recall(self._root)
        if before is None or before[0] != found:
            before = found, self._sorted(device, problem)
        self._made.remember(self._root, before, ())
        return before[1]

    def _sorted(self, device: int | None, problem: Reason | None) -> Source:
        return Source(
            self._root,
            problem,
            models=tuple(sorted(self._models, key=self._precedence)),
            rejects=tuple(sorted(self._rejects, key=lambda reject: reject.path)),
            junk=sum(self.junk),
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
        if (watched := found.watched) is not None:
            # Worked out once, for later processes, too: what works out hashes takes long to import.
            found = found._replace(model=found.model._replace(fingerprint=hfcache.fingerprint(found.model)))
            self._memo.remember(path, found, stamps(watched))
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
        self.junk.append(found.junk)


class _Group(NamedTuple):
    """A folder in which models may lie."""

    name: str
    """Relative to the root; empty for the root itself."""
    listing: Listing
    above: tuple[tuple[int, int], ...]
    """The identities of this folder and of those above it."""


class _Place(NamedTuple):
    """A folder in a group."""

    model_id: str
    """The id that a model in it has: its path, relative to the root."""
    name: str
    above: tuple[tuple[int, int], ...]
    """As of its group."""


class RootScan:
    """One scan of one of the user's model paths."""

    def __init__(
        self, root: str, layer: Layer, hub_identity: tuple[int, int] | None, types: ModelTypes | None, seen: Seen
    ) -> None:
        self._given = root
        self._root = tiers.place(root) if layer == "tier" else root
        self._layer = layer
        self._types = types
        self._found = Collected(root, layer, seen)
        self._hub_identity = hub_identity
        self._real_root = os.path.realpath(root)
        self._abreast = Abreast()
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
        """Level by level through the folders that group models; `above` holds the folders above, to end loops."""
        level = [_Group("", top, (identity,))]
        while level:
            places = [place for group in level for place in self._places(group)]
            level = []
            for place, looked in zip(places, self._abreast.each(self._look, places), strict=True):
                if looked is not None and self._is_group(self._path(place), looked[1], place.above):
                    level.append(_Group(place.model_id, looked[0], (*place.above, looked[1])))

    def _places(self, group: _Group) -> Iterator[_Place]:
        """The folders in a group; what else is in it is noted."""
        self._found.junk.append(group.listing.junk)
        prefix = f"{group.name}/" if group.name else ""
        for name in filter(is_utf8, group.listing.broken):
            reason = Reason(Code.BROKEN_LINK, "is a link to what is not there")
            self._found.reject(f"{self._root}/{prefix}{name}", f"{prefix}{name}", reason)
        for name in sorted(group.listing.folders, reverse=True):
            if not hfcache.is_other_repo(name):
                yield _Place(f"{prefix}{name}", name, group.above)

    def _path(self, place: _Place) -> str:
        return f"{self._root}/{place.model_id}"

    def _look(self, place: _Place) -> tuple[Listing, tuple[int, int]] | None:
        """A folder's listing and identity when models may lie inside it; None once it is dealt with."""
        path, model_id, name = self._path(place), place.model_id, place.name
        if self._found.recall(path):
            return None
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

    def _is_group(self, path: str, here: tuple[int, int], above: tuple[tuple[int, int], ...]) -> bool:
        """Whether to look for models inside; links back up, and second links to one folder, are rejected."""
        is_link = os.path.islink(path)
        if here in above or (is_link and holds(os.path.realpath(path), self._real_root)):
            self._found.reject(path, None, Reason(Code.LINK_TO_PARENT, "is a link back to a folder above it"))
            return False
        if not is_link:
            return True
        if here in self._linked:
            text = "links to a folder that another link has shown already"
            self._found.reject(path, None, Reason(Code.LINKED_TWICE, text))
            return False
        self._linked.add(here)
        return True
