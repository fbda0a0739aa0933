"""Models that have just changed: a scan at short intervals leaves each as it was until it is found unchanged."""

from collections.abc import Iterable, Mapping

from hf_overlay import hfcache
from hf_overlay.models import Code, Model, Reason, Reject, Source

_Key = tuple[str, str]


def settled(found: Iterable[Source], *, before: Iterable[Source], taken: Iterable[Source]) -> tuple[Source, ...]:
    """The sources that a scan has `found`, with each model that changed since the scan `before` as it was `taken` last.

    A model that none has taken yet is left out.
    """
    last, shown = _by_key(before), _by_key(taken)
    return tuple(_settled(source, last, shown) for source in found)


def _settled(source: Source, last: Mapping[_Key, Model], shown: Mapping[_Key, Model]) -> Source:
    moving = [model for model in source.models if last.get(_key(model)) != model]
    if not moving:
        return source
    models = (shown.get(_key(model)) if model in moving else model for model in source.models)
    reason = Reason(Code.INCOMPLETE, "has just changed: still being copied?")
    rejects = (Reject(model.path, model.id, reason, model.root) for model in moving if _key(model) not in shown)
    return source._replace(
        models=tuple(model for model in models if model is not None), rejects=(*source.rejects, *rejects)
    )


def _key(model: Model) -> _Key:
    """What tells models apart: one folder may be mapped to several ids."""
    return hfcache.repo_folder(model.id, model.kind), model.path


def _by_key(sources: Iterable[Source]) -> dict[_Key, Model]:
    return {_key(model): model for source in sources for model in source.models}
