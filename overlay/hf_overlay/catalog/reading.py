"""Reading one model: a folder of the user's, or a repo in Hugging Face cache layout."""

import os
import re
import time
from typing import Any, Literal, NamedTuple

from hf_overlay import hfcache, records
from hf_overlay.catalog import speech, tasks, weights
from hf_overlay.catalog.files import Contents, Listing, Unfit, contents, list_folder, read_json
from hf_overlay.catalog.kinds import ModelTypes, may_be_tokenizer
from hf_overlay.catalog.weights import Problems
from hf_overlay.config import Map
from hf_overlay.models import Code, File, Model, Task

SETTLED_SECONDS = 600
"""A model none of whose files was written to for so long is not being copied: its files need no look each time."""

_MARKERS = ("config.json", "model_index.json")
_MARKERS_OF_OTHER_KINDS = ("modules.json", "config_sentence_transformers.json", "adapter_config.json")
_QUANTISATION = r"(?:(?P<stem>.+?)[-._])?(?:UD-)?(?:I?Q[1-8]_\w+|TQ[12]_0|MXFP4\w*|BF16|F16|FP16|F32)"
"""Names of folders in which the Hub's repos keep a quantisation of several files, with the model's name or without."""


class Found(NamedTuple):
    """A model that was read."""

    model: Model
    junk: int
    """Number of AppleDouble files in its folders."""
    watched: tuple[str, ...] | None
    """The paths that look the same as long as the model is the same; None when only reading it again can tell.

    The folders, for what comes and goes, and config.json, which every tool that writes models rewrites. None while
    files are recent, because writing into an existing file changes no folder.
    """


def has_marker(path: str, folder: Listing, types: ModelTypes | None) -> bool:
    """Whether the files in the folder `path` say that it is a model; `types` None takes every kind of model.

    Raises OSError.
    """
    if any(marker in folder.files for marker in _MARKERS):
        return True
    if types is not None:
        return False
    return (
        any(marker in folder.files for marker in _MARKERS_OF_OTHER_KINDS)
        or _is_of_mistral(folder)
        or _holds_gguf(path, folder)
    )


def _is_of_mistral(folder: Listing) -> bool:
    """Whether a folder holds a model in Mistral's own format, which vLLM reads."""
    return "params.json" in folder.files and any(
        name.startswith("consolidated") and name.endswith(".safetensors") for name in folder.files
    )


def _holds_gguf(path: str, folder: Listing) -> bool:
    """Whether GGUF files lie in a folder, or in folders in it that are named after a quantisation."""
    if any(name.endswith(".gguf") for name in folder.files):
        return True
    own = os.path.basename(path).lower()
    for name in folder.folders:
        named = re.fullmatch(_QUANTISATION, name, re.IGNORECASE)
        if named is None or not own.startswith((named["stem"] or "").lower()):
            continue
        if any(each.endswith(".gguf") for each in list_folder(f"{path}/{name}").files):
            return True
    return False


def read_folder(
    path: str, model_id: str, listing: Listing, root: str, types: ModelTypes | None, problems: Problems
) -> Found:
    """The model in a folder of the user's. Raises Unfit or OSError."""
    model, inside = _read(path, model_id, "custom", listing, root, types, None, problems)
    if inside.has_links or not _is_settled(model):
        return Found(model, inside.junk, None)
    watched = [*inside.folders, *(f"{path}/{name}" for name in _MARKERS if name in listing.files)]
    watched += records.local_dir_records(path) if model.commit is not None else ()
    return Found(model, inside.junk, tuple(watched))


def read_users_repo(repo: str, model_id: str, root: str, types: ModelTypes | None, problems: Problems) -> Found:
    """The main revision, else the only one, of a user's repo in cache layout. Raises Unfit, NoSnapshot or OSError."""
    commit = hfcache.main_commit(repo, any_single=True)
    path = hfcache.snapshot(repo, commit)
    model, inside = _read(path, model_id, "custom", list_folder(path), root, types, commit, problems)
    return Found(model, inside.junk, None)


def read_cached_repo(repo: str, model_id: str, root: str, types: ModelTypes | None, problems: Problems) -> Found:
    """The main revision of a repo in the real cache. Raises Unfit, NoSnapshot or OSError."""
    commit = hfcache.main_commit(repo, any_single=False)
    path = hfcache.snapshot(repo, commit)
    model, inside = _read(path, model_id, "cache", list_folder(path), root, types, commit, problems)
    watched = (*hfcache.watched(repo), f"{path}/config.json", *inside.folders) if _is_settled(model) else None
    return Found(model, inside.junk, watched)


def read_mapped(folder: str, mapped: Map, listing: Listing, problems: Problems) -> Model:
    """What a folder that is mapped to an id stands for: a model or dataset of any kind, or a repo in cache layout.

    Raises Unfit, NoSnapshot or OSError.
    """
    path, commit = folder, None
    if "snapshots" in listing.folders and "blobs" in listing.folders:
        commit = hfcache.main_commit(folder, any_single=True)
        path = hfcache.snapshot(folder, commit)
        listing = list_folder(path)
    inside = contents(path, listing)
    if not inside.files:
        raise Unfit(Code.NO_WEIGHTS, "holds no files")
    config: dict[str, Any] = {}
    if mapped.kind == "models":
        config = read_json(f"{path}/config.json") if "config.json" in listing.files else {}
        weights.check(path, inside.files, listing.broken, required=False, problems=problems)
    files, commit = _identified(path, inside.files, commit)
    model_type = config.get("model_type")
    return Model(
        id=mapped.id,
        source="map",
        path=path,
        model_type=model_type if isinstance(model_type, str) else None,
        size_bytes=sum(file.size for file in files),
        files=files,
        root=folder,
        commit=commit,
        kind=mapped.kind,
        task=_task(path, mapped.id, config, files, is_strict=False),
    )


def has_copy(repo: str) -> bool:
    """Whether a cached repo holds its main revision: of a model, with weights. Raises OSError."""
    try:
        snapshot = hfcache.snapshot(repo, hfcache.main_commit(repo, any_single=True))
    except hfcache.NoSnapshot:
        return False
    return hfcache.is_other_repo(os.path.basename(repo)) or any(
        name.endswith(weights.SUFFIXES) and os.path.isfile(f"{inside}/{name}")
        for inside, _, names in os.walk(snapshot)
        for name in names
    )


def _read(
    path: str,
    model_id: str,
    source: Literal["custom", "cache"],
    listing: Listing,
    root: str,
    types: ModelTypes | None,
    commit: str | None,
    problems: Problems,
) -> tuple[Model, Contents]:
    config = _checked_config(path, listing, types)
    inside = contents(path, listing)
    is_of_speech = speech.family(config) is not None
    begins = "" if is_of_speech else "model"
    weights.check(path, inside.files, listing.broken, required=types is not None, problems=problems, begins=begins)
    if types is not None and not is_of_speech:
        _check_tokenizer(inside)
    task = _task(path, model_id, config, inside.files, is_strict=types is not None and types.takes_encoders)
    files = inside.files
    if source == "custom":
        files, commit = _identified(path, files, commit)
    model_type = config.get("model_type")
    model = Model(
        id=model_id,
        source=source,
        path=path,
        model_type=model_type if isinstance(model_type, str) else None,
        size_bytes=sum(file.size for file in files),
        files=files,
        root=root,
        commit=commit,
        task=task,
    )
    return model, inside


def _checked_config(path: str, folder: Listing, types: ModelTypes | None) -> dict[str, Any]:
    """The content of config.json, empty where there is none. Raises Unfit if `types` do not hold the model's."""
    if not has_marker(path, folder, types):
        formats = {name.rsplit(".", 1)[1] for name in folder.files if name.endswith(weights.SUFFIXES)}
        only = f" (only .{', .'.join(sorted(formats))} files)" if formats else ""
        raise Unfit(Code.GGUF if formats == {"gguf"} else Code.NO_CONFIG, f"has no config.json{only}")
    config = read_json(f"{path}/config.json") if "config.json" in folder.files else {}
    if types is not None:
        if "config.json" not in folder.files:
            raise Unfit(Code.OTHER_KIND, "is a diffusers pipeline, which mlx-lm does not load; --kind any takes it")
        if (text := types.why_not(config)) is not None:
            raise Unfit(Code.OTHER_KIND, text)
    return config


def _check_tokenizer(inside: Contents) -> None:
    """Raise Unfit for a model without a tokenizer, without which mlx-lm loads nothing."""
    if any(may_be_tokenizer(file.name) for file in inside.files):
        return
    unusable = next((f"{name} {why}" for name, why in inside.left_out.items() if may_be_tokenizer(name)), None)
    raise Unfit(Code.INCOMPLETE, f"has no tokenizer ({unusable or 'such as tokenizer.json'}): still being copied?")


def _task(path: str, model_id: str, config: dict[str, Any], files: tuple[File, ...], *, is_strict: bool) -> Task:
    return tasks.read(path, model_id, config, {file.name for file in files}, is_strict=is_strict)


def _identified(path: str, files: tuple[File, ...], commit: str | None) -> tuple[tuple[File, ...], str | None]:
    """The files with the Hub's etags, and its commit, where the user's folder proves them."""
    if commit is not None:
        return tuple(file._replace(etag=records.blob_name(f"{path}/{file.name}")) for file in files), commit
    known = records.local_dir_identity(path, {file.name: file.mtime_ns for file in files})
    if known is None:
        return files, None
    return tuple(file._replace(etag=known[1][file.name]) for file in files), known[0]


def _is_settled(model: Model) -> bool:
    return max(file.mtime_ns for file in model.files) < time.time_ns() - SETTLED_SECONDS * 10**9
