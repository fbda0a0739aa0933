"""How the user's folders spell an id: their volume may take several spellings for one name.

macOS ignores case by default. It may also store either Unicode form of a name, while people type the composed one.
"""

import os
from collections.abc import Iterable
from functools import cached_property, partial
from typing import NamedTuple

from hf_overlay import hfcache
from hf_overlay.catalog.plan import composed, fold
from hf_overlay.models import HELD_BACK, Source
from hf_overlay.patience import Patience


class _Place(NamedTuple):
    """A folder that answers to an id, or lacks a part of its weights."""

    id: str
    path: str
    root: str


class Spellings:
    """The ids of one scan, by what ignores case in them."""

    def __init__(self, sources: Iterable[Source], patience: Patience) -> None:
        """`patience` asks the disks of the sources."""
        self._patience = patience
        self._sources = tuple(sources)

    @cached_property
    def _places(self) -> dict[str, list[_Place]]:
        places: dict[str, list[_Place]] = {}
        for source in self._sources:
            incomplete = (reject for reject in source.rejects if reject.reason.code in HELD_BACK)
            models = (each for each in source.models if each.kind == "models")
            found = [(each.id, each.path) for each in models] + [(each.id, each.path) for each in incomplete]
            for model_id, path in found:
                if model_id is not None:
                    places.setdefault(fold(model_id), []).append(_Place(model_id, path, source.root))
        return places

    def of(self, model_id: str) -> str | None:
        """The spelling of an id in the user's folders; None when none of them answers to the id as it is given."""
        alike = self._places.get(fold(model_id), [])
        if any(place.id == model_id for place in alike):
            return model_id
        for place in alike:
            if composed(place.id) == composed(model_id) or self._leads_to(place, model_id):
                return place.id
        return None

    def _leads_to(self, place: _Place, model_id: str) -> bool:
        """Whether the volume of a folder takes the path of another spelling for the same folder."""
        path = place.path
        for own, other in (place.id, model_id), (hfcache.repo_folder(place.id), hfcache.repo_folder(model_id)):
            before, found, after = path.rpartition(f"/{own}")
            if found and after[:1] in ("", "/"):
                try:
                    return self._patience.ask(place.root, partial(_is_same, f"{before}/{other}{after}", path))
                except OSError:
                    return False
        return False


def _is_same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except FileNotFoundError:
        return False
