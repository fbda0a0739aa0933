"""Why each place answers to an id, or does not: pure functions of what was found there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from hf_overlay.catalog.plan import resolve
from hf_overlay.models import Code, Layer, Model, Reason, Reject, Source


class Candidate(NamedTuple):
    """One place that was looked at for an id."""

    path: str
    source: str
    """`map`, `custom`, `cache` or `tier`."""
    reason: Reason
    """Code.WINS for the model that answers to the id, else why this place does not."""


def model(
    model_id: str,
    in_front: Sequence[Source],
    cached: Model | Reject,
    behind: Sequence[Source],
    *,
    look: Callable[[str], Model | Reject],
) -> list[Candidate]:
    """Every place for a model's id, the winner first; when none answers, no candidate has Code.WINS.

    `in_front` are the maps and model paths, `cached` is what the real cache has of the id, `behind` are the tiers.
    `look` reads the folder of the id below a root, where the scan found nothing of that id.
    """
    in_cache = Source("", None, (cached,) if isinstance(cached, Model) else ())
    resolution = resolve([*in_front, in_cache, *behind]).get(model_id)
    candidates: list[Candidate] = []
    found: list[Model] = []
    if resolution is not None:
        winner = resolution.winner
        found = [winner, *resolution.shadows]
        candidates.append(Candidate(winner.path, winner.source, Reason(Code.WINS, "wins")))
        candidates += [Candidate(each.path, each.source, _shadowed(each, winner)) for each in resolution.shadows]
    roots = {each.root for each in found}
    candidates += _not_found_in(in_front, model_id, roots, look)
    if isinstance(cached, Reject):
        candidates.append(Candidate(cached.path, "cache", cached.reason))
    return candidates + _not_found_in(behind, model_id, roots, look)


def other_repo(
    kind: str,
    repo_id: str,
    layers: Sequence[Source],
    cached: str,
    in_tiers: Sequence[str],
    *,
    is_cached: bool,
) -> list[Candidate]:
    """As `model`, for a dataset, space or kernel: only maps and caches hold any.

    `layers` are all sources, `cached` is the repo's folder in the real cache, `in_tiers` are its folders in tiers.
    """
    maps = (source for source in layers if source.layer == "map")
    places: list[tuple[str, Layer]] = [
        (each.path, "map") for source in maps for each in source.models if (each.kind, each.id) == (kind, repo_id)
    ]
    places += [(cached, "cache")] if is_cached else []
    places += [(path, "tier") for path in in_tiers]
    candidates = []
    for path, layer in places:
        first, first_layer = places[0]
        reason = Reason(Code.SHADOWED, f"stands behind {first}")
        if path == first:
            reason = Reason(Code.WINS, "wins")
        elif first_layer != "map":
            reason = Reason(Code.SHADOWED, f"is shown together with {first}")
        candidates.append(Candidate(path, layer, reason))
    if not is_cached:
        candidates.append(Candidate(cached, "cache", Reason(Code.MISSING, "does not exist")))
    for source in layers:
        if source.layer != "custom" and source.problem is not None:
            candidates.append(Candidate(source.root, source.layer, source.problem))
        elif source.layer == "tier" and not any(path.startswith(f"{source.root}/") for path in in_tiers):
            candidates.append(Candidate(source.root, "tier", Reason(Code.MISSING, f"holds no {kind}/{repo_id}")))
    return candidates


def _not_found_in(
    sources: Iterable[Source], model_id: str, roots: set[str], look: Callable[[str], Model | Reject]
) -> list[Candidate]:
    """Why each source does not answer to an id, but those, by their `roots`, in which a model of it was found."""
    candidates: list[Candidate] = []
    for source in sources:
        if source.problem is not None:
            candidates.append(Candidate(source.root, source.layer, source.problem))
            continue
        rejects = [reject for reject in source.rejects if reject.id == model_id]
        if not rejects and source.layer != "map" and source.root not in roots:
            looked_at = look(source.root)
            rejects = [looked_at] if isinstance(looked_at, Reject) else []
        candidates += [Candidate(reject.path, source.layer, reject.reason) for reject in rejects]
    return candidates


def _shadowed(loser: Model, winner: Model) -> Reason:
    """Why a model does not answer to its id, although nothing is wrong with it."""
    text = f"stands behind {winner.path}"
    if loser.source == "tier" and loser.commit is not None and winner.source in ("cache", "tier"):
        text += f"; its revision {loser.commit[:12]} is shown beside that one"
    return Reason(Code.SHADOWED, text)


def origin(model: Model) -> str:
    """The layer that a model comes from, as messages call it."""
    names: Mapping[Layer, str] = {
        "map": f"map to {model.root}",
        "custom": f"model path {model.root}",
        "cache": "Hugging Face cache",
        "tier": f"folder {model.root} below the cache",
    }
    return names[model.source]
