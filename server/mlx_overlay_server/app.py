"""Builds all parts of the server, and joins them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import hf_overlay
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from mlx_overlay_server import logs
from mlx_overlay_server.access import Access
from mlx_overlay_server.api import absent, models_route, page, status
from mlx_overlay_server.api.anthropic import routes as anthropic
from mlx_overlay_server.api.guard import Guard
from mlx_overlay_server.api.late import Late
from mlx_overlay_server.api.openai import embeddings
from mlx_overlay_server.api.openai import routes as openai
from mlx_overlay_server.api.refusals import add_error_handlers, refuse
from mlx_overlay_server.api.rerank import routes as rerank
from mlx_overlay_server.api.responses import routes as responses
from mlx_overlay_server.awake import keep_awake
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.live import Live
from mlx_overlay_server.metrics import Metrics
from mlx_overlay_server.models.download import Downloader
from mlx_overlay_server.models.library import Library
from mlx_overlay_server.models.load import PLAIN, Extras
from mlx_overlay_server.models.loaders import Loaders
from mlx_overlay_server.models.pool import Pool, preload
from mlx_overlay_server.preparation import Preparation
from mlx_overlay_server.preparer import Process
from mlx_overlay_server.recent import Recent
from mlx_overlay_server.service import Service
from mlx_overlay_server.settings import rank
from mlx_overlay_server.speech.processes import Speech

logger = logging.getLogger("mlx_overlay_server")

_COUNTERS = frozenset(
    {"engine_steps", "engine_failures", "kv_disk_written_bytes", "kv_disk_read_tokens", "kv_disk_failures"}
)
"""Metrics that only grow."""


def build(live: Live, session: hf_overlay.Session, process: Process | None = None) -> tuple[ASGIApp, Service]:
    """Return the application and the service in it. `process`: a preparation process that has been started already."""
    settings = live.settings
    downloader = None if session.is_offline else Downloader(session)
    service = _service(live, session, downloader, process)
    first = tuple(live.target(name).id for name in settings.models)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        tasks = [
            asyncio.create_task(preload(service.pool, first, service.engine.warm_up)),
            asyncio.create_task(_log_memory(service.engine, settings.memory_budget)),
            asyncio.create_task(service.pool.sweep()),
            asyncio.create_task(
                keep_awake(lambda: service.has_work or (downloader is not None and downloader.has_work))
            ),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.pool.close()
            if downloader is not None:
                await downloader.close()
            await service.engine.stop()
            await service.stop()

    app = FastAPI(
        title="MLX Omni Server",
        summary="OpenAI- and Anthropic-compatible chat server on mlx-lm.",
        lifespan=lifespan,
        docs_url=None,  # pages of our own, because FastAPI's load scripts from another host
        redoc_url=None,
    )
    for routes in (openai, responses, anthropic, embeddings, rerank, models_route, status, absent):
        app.include_router(routes.router(service))
    app.include_router(page.router())
    add_error_handlers(app)

    def add_manage() -> None:
        from mlx_overlay_server.api.manage import routes as manage

        app.include_router(manage.router(service, downloader))

    def add_audio() -> None:
        from mlx_overlay_server.api.audio import routes as audio

        app.include_router(audio.router(service))

    guarded: Any = Guard(
        Late(
            Late(app, ("/manage/", "/openapi.json"), add_manage), ("/v1/audio/", "/audio/", "/openapi.json"), add_audio
        ),
        access=Access(lambda: live.settings),
        host=settings.host,
        origins=settings.origins,
        max_body=settings.limits.body,
        refuse=refuse,
        count=lambda path, code: service.metrics.requests.labels(path, code).inc(),
        turns=service.turns,
        refresh=live.refresh,
    )
    if settings.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    return guarded, service


async def _log_memory(engine: Engine, budget: int | None) -> None:
    """Log how the memory is divided, and warn of a budget that leaves too little for other uses than weights."""
    try:
        shares = await engine.memory()
    except ServerError:
        return  # the engine has failed, and logged why
    logger.info(
        "memory: %.1f GB for weights, %.1f GB for kept KV caches, of %.1f GB that MLX may use",
        (shares.weights if budget is None else budget) / 1e9,
        shares.prefixes / 1e9,
        shares.usable / 1e9,
    )
    if budget is not None and budget > shares.weights:
        logger.warning(
            "--memory-budget leaves too little memory for running requests; set it to %.1f GB or less",
            shares.weights / 1e9,
        )


def _arrange(pool: Pool, live: Live) -> None:
    """Tell the pool what the settings say of single models."""
    settings = live.settings
    profiles = {live.target(name).id: profile for name, profile in settings.profiles.items()}
    extras = {name: Extras(each.adapter_path, each.draft_model, each.tuning) for name, each in profiles.items()}
    if settings.adapter_path is not None or settings.draft_model is not None:
        first = live.target(settings.models[0]).id
        tuning = extras.get(first, PLAIN).tuning
        extras[first] = Extras(settings.adapter_path, settings.draft_model, tuning)
    pool.arrange(
        extras={name: each for name, each in extras.items() if each != PLAIN},
        pinned=[name for name, each in profiles.items() if each.pin],
        idle_ttls={name: each.idle_ttl for name, each in profiles.items() if each.idle_ttl is not None},
    )


def _service(
    live: Live, session: hf_overlay.Session, downloader: Downloader | None, process: Process | None
) -> Service:
    settings = live.settings
    engine = Engine(settings.engine)
    preparation = Preparation(engine, settings.limits, process)
    if rank(os.environ) is None:  # under mlx.launch, each rank reads the tokenizer itself
        engine.read_tokenizer = preparation.read_tokenizer
    speech = Speech(settings.engine.load_seconds)
    library = Library(session, downloader.fetch if downloader is not None else None, live.source)

    async def weights() -> int:
        return (await engine.memory()).weights

    pool = Pool(
        library,
        Loaders(engine, speech),
        budget=weights if settings.memory_budget is None else settings.memory_budget,
        idle_ttl=settings.idle_ttl,
        pinned=tuple(live.target(name).id for name in settings.models),
    )
    _arrange(pool, live)
    live.followers.append(lambda _: _arrange(pool, live))

    def numbers() -> dict[str, tuple[str, float]]:
        stats = engine.stats
        return {
            "active_sequences": ("Sequences in a batch: the batch size.", stats.active),
            "waiting_sequences": ("Sequences that no batch has room for.", stats.waiting),
            "pending_sequences": ("Sequences that somebody waits for.", engine.pending),
            "kv_cache_bytes": ("KV caches kept for later prompts, in bytes.", stats.cache_bytes),
            "kv_cache_entries": ("KV caches kept for later prompts.", stats.cache_entries),
            "kv_disk_bytes": ("Disk space that kept KV caches take, in bytes.", stats.disk.nbytes),
            "kv_disk_limit_bytes": ("Disk space that they may take, in bytes.", stats.disk.cap),
            "kv_disk_files": ("Files of kept KV caches.", stats.disk.files),
            "kv_disk_written_bytes": ("KV caches written to disk, in bytes.", stats.disk.written),
            "kv_disk_read_tokens": ("Tokens of prompts whose KV caches were read from disk.", stats.disk.restored),
            "kv_disk_failures": ("KV caches that could not be written to disk.", stats.disk.failures),
            "engine_steps": ("Steps of the engine.", stats.steps),
            "engine_failures": ("Batches lost to an error.", stats.failures),
            "models_resident": ("Models in memory.", len(pool.resident)),
            "models_bytes": ("Weights of the models in memory, in bytes.", pool.nbytes),
        }

    return Service(
        library,
        pool,
        engine,
        Metrics(numbers, _COUNTERS),
        settings.limits,
        preparation,
        speech=speech,
        live=live,
        recent=Recent(logs.request_ended),
    )
