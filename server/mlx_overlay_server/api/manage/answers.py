"""The answers of the API behind the page, and how they are made."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Literal

from typing_extensions import TypedDict

from mlx_overlay_server.api.status import State, health_of
from mlx_overlay_server.models.download import Downloader, Progress
from mlx_overlay_server.models.library import Listed
from mlx_overlay_server.models.load import Occupant
from mlx_overlay_server.recent import Outcome, RequestRecord
from mlx_overlay_server.service import Service

Place = Literal["resident", "loading", "downloading", "on disk", "away"]
"""Where a model is: in memory, on its way there, on its way to the disk, on the disk, or on one that is not there."""


class DownloadState(TypedDict):
    """How far a download is, or how it has ended."""

    model: str
    state: Literal["waiting", "downloading", "done", "cancelled", "failed"]
    done: int
    """Bytes that have arrived."""
    total: int
    """Bytes of all its files; 0 while that is not known."""
    message: str
    """Why it failed, and what to do; empty if it did not fail."""


class Downloads(TypedDict):
    """The downloads that run, and the last ones that ended."""

    downloads: list[DownloadState]


class ModelInMemory(TypedDict):
    """A model that is in memory, or is being loaded."""

    id: str
    state: Place
    note: str
    """What its load is waiting for; empty once it is in memory."""
    pinned: bool
    bytes: int
    """Bytes of its weights; 0 while that is not known."""
    read: int
    """Bytes of its weights that have been read, while it is being loaded."""
    users: int
    """Requests that use it or wait for it."""
    idle_seconds: float | None
    """Seconds since a request last used it; null while one does, or while it is being loaded."""


class MemoryUse(TypedDict):
    """One of the uses that share the memory."""

    use: str
    """`weights`, `running` (KV caches of running requests), `kept` (KV caches for later prompts), or `disk` (the same
    on disk).
    """
    bytes: int
    limit: int | None
    """Bytes that it may take; null until the machine is known."""


class Memory(TypedDict):
    """The uses of the memory that MLX may take, and what is kept on the disk."""

    usable: int | None
    """Bytes that MLX may take; null until the machine is known."""
    uses: list[MemoryUse]


class Activity(TypedDict):
    """What the server is doing."""

    tokens_per_second: float
    """Tokens that all requests together have got per second lately."""
    first_token_seconds: float | None
    """Median seconds to the first token of the last requests; null before the first."""
    running: int
    """Sequences that are being read or generated."""
    waiting: int
    """Sequences that wait for room."""
    requests: int
    """Requests that have not ended."""


class ServerStatus(TypedDict):
    """The answer to `GET /manage/v1/status`: what changes from second to second."""

    name: str
    version: str
    uptime_seconds: float
    state: State
    message: str
    """What is wrong with the server; empty if nothing is."""
    offline: bool
    """Whether the server downloads nothing."""
    memory: Memory
    activity: Activity
    models: list[ModelInMemory]
    downloads: list[DownloadState]


class ModelSource(TypedDict):
    """Where a model was found."""

    kind: str
    """`map`, `custom` (a model path), `cache` (the Hugging Face cache) or `tier` (a folder below it)."""
    root: str
    path: str
    """The folder that it is loaded from."""


class ModelEntry(TypedDict):
    """A model, as lists of them show it."""

    id: str
    kind: str
    """What it does: `text`, `embedding`, `reranker`, `transcription` or `speech`."""
    architecture: str | None
    """The `model_type` of its config.json."""
    source: ModelSource
    bytes: int
    """Bytes of all its files; 0 where that is not known."""
    context_length: int | None
    """Tokens that prompt and answer may have together; null where its config.json does not say."""
    usable_context: int | None
    """Those of them that fit in memory and in the server's limits; null where that is not known."""
    images: bool
    """Whether requests may have images. For a model that is not in memory, this is a guess from its config.json."""
    aliases: list[str]
    """The other names that it answers to."""
    default: bool
    """Whether it answers to unknown names."""
    state: Place
    pinned: bool
    """Whether it stays in memory once it is loaded."""


class ModelEntries(TypedDict):
    """The answer to `GET /manage/v1/models`."""

    models: list[ModelEntry]


class Problem(TypedDict):
    """Something that is wrong, and what to do about it."""

    kind: str
    """A word for programs, such as `rejected` (a folder that is left out) or `source` (a model path that is away)."""
    where: str
    what: str
    advice: str


class Problems(TypedDict):
    """The answer to `GET /manage/v1/problems`: what `hf-overlay doctor` finds."""

    problems: list[Problem]


class RequestEntry(TypedDict):
    """One request, without any of its text."""

    id: str
    client: str
    """The program that asked, and its address unless that is this machine."""
    model: str
    started: float
    """Unix seconds."""
    seconds: float
    """Seconds from the request to its end, or until now."""
    tokens_in: int
    """Tokens of its prompts that have been read."""
    tokens_cached: int
    """Those of them whose KV cache was reused."""
    tokens_out: int
    first_token_seconds: float | None
    tokens_per_second: float | None
    outcome: Outcome
    reason: str | None
    """Why the answer ended, or the code of the error; null while the request runs."""
    note: str
    """What the request is waiting for or doing; empty once it has ended."""


class RequestEntries(TypedDict):
    """The answer to `GET /manage/v1/requests`, newest first."""

    running: list[RequestEntry]
    ended: list[RequestEntry]


class Done(TypedDict):
    """The answer to a request that had the server do something."""

    done: Literal[True]


def status_of(service: Service, downloader: Downloader | None, started: float) -> ServerStatus:
    """Return what the server does now; `started` is when it began, in monotonic seconds."""
    health = health_of(service)
    stats, recent = service.engine.stats, service.recent
    return {
        "name": "mlx-omni-server",
        "version": version("mlx-overlay-server"),
        "uptime_seconds": time.monotonic() - started,
        "state": health["status"],
        "message": _trouble(service),
        "offline": downloader is None,
        "memory": _memory(service),
        "activity": {
            "tokens_per_second": recent.rate.per_second,
            "first_token_seconds": recent.first_token_seconds,
            "running": stats.active,
            "waiting": stats.waiting,
            "requests": service.open,
        },
        "models": [_in_memory(each, service) for each in service.pool.occupants],
        "downloads": [download_of(each) for each in downloader.shown] if downloader is not None else [],
    }


def _trouble(service: Service) -> str:
    if service.engine.failure is not None:
        return f"The engine has failed: {service.engine.failure}. Start the server again."
    if (held := service.engine.held) is not None:
        return f"The disk of {held.path} does not answer; no model can, until it does. Check the drive or its server."
    return ""


def _memory(service: Service) -> Memory:
    stats, pool = service.engine.stats, service.pool
    shares = stats.memory
    weights = pool.budget or (shares.weights if shares is not None else None)
    uses: list[MemoryUse] = [
        {"use": "weights", "bytes": pool.nbytes, "limit": weights},
        {"use": "running", "bytes": stats.running_bytes, "limit": shares.running if shares is not None else None},
        {"use": "kept", "bytes": stats.cache_bytes, "limit": shares.prefixes if shares is not None else None},
    ]
    if stats.disk.cap:
        uses.append({"use": "disk", "bytes": stats.disk.nbytes, "limit": stats.disk.cap})
    return {"usable": shares.usable if shares is not None else None, "uses": uses}


def _in_memory(occupant: Occupant, service: Service) -> ModelInMemory:
    download = service.library.progress.get(occupant.id)
    note = "waiting for room in memory" if occupant.is_waiting else download or f"loading {occupant.id}"
    return {
        "id": occupant.id,
        "state": "resident" if occupant.is_resident else "loading" if download is None else "downloading",
        "note": "" if occupant.is_resident else note,
        "pinned": occupant.id in service.pool.pinned,
        "bytes": occupant.nbytes,
        "read": occupant.read,
        "users": occupant.users,
        "idle_seconds": occupant.idle_seconds,
    }


def models_of(service: Service, listed: Iterable[Listed]) -> ModelEntries:
    """Return every model, including those that are away, sorted by id."""
    states: Mapping[str, Place] = {each.id: _in_memory(each, service)["state"] for each in service.pool.occupants}
    known = {each.id: each for each in listed}
    for name in states.keys() - known.keys():  # profiles that are loaded in a way of their own
        if (source := known.get(service.live.source(name))) is not None:
            known[name] = source._replace(id=name)
    found = [_entry(each, service, states.get(each.id, "on disk")) for each in known.values()]
    away = [
        _entry(Listed(model_id, 0, layer="custom", root=root), service, "away")
        for model_id, root in service.library.away.items()
        if model_id not in known
    ]
    return {"models": sorted([*found, *away], key=lambda each: each["id"])}


def _entry(listed: Listed, service: Service, state: Place) -> ModelEntry:
    model = service.pool.model(listed.id)
    return {
        "id": listed.id,
        "kind": listed.kind,
        "architecture": listed.architecture,
        "source": {"kind": listed.layer, "root": listed.root, "path": listed.path},
        "bytes": listed.size,
        "context_length": listed.context,
        "usable_context": listed.usable,
        "images": model.sees if model is not None else listed.sees,
        "aliases": service.live.names(listed.id),
        "default": service.is_default(listed.id),
        "state": state,
        "pinned": listed.id in service.pool.pinned,
    }


def download_of(progress: Progress) -> DownloadState:
    """Return how far a download is."""
    return {
        "model": progress.id,
        "state": progress.state,
        "done": progress.done,
        "total": progress.total,
        "message": progress.message,
    }


def requests_of(service: Service) -> RequestEntries:
    """Return the requests that run, and the last ones that ended."""
    return {
        "running": [_request(record, note) for record, note in service.recent.running],
        "ended": [_request(record) for record in service.recent.ended],
    }


def _request(record: RequestRecord, note: str = "") -> RequestEntry:
    return {
        "id": record.id,
        "client": record.client,
        "model": record.model,
        "started": record.started,
        "seconds": time.time() - record.started if record.outcome == "running" else record.seconds,
        "tokens_in": record.tokens_in,
        "tokens_cached": record.tokens_cached,
        "tokens_out": record.tokens_out,
        "first_token_seconds": record.first_token_seconds,
        "tokens_per_second": record.tokens_per_second,
        "outcome": record.outcome,
        "reason": record.reason,
        "note": note,
    }
