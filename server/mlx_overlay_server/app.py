"""The composition root: what the server is made of, and how its parts are joined."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import hf_overlay
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from mlx_overlay_server.api import absent, models_route, status
from mlx_overlay_server.api.anthropic import routes as anthropic
from mlx_overlay_server.api.guard import Guard
from mlx_overlay_server.api.openai import routes as openai
from mlx_overlay_server.api.refusals import add_error_handlers, refuse
from mlx_overlay_server.api.responses import routes as responses
from mlx_overlay_server.awake import keep_awake
from mlx_overlay_server.engine.handle import Engine
from mlx_overlay_server.errors import ServerError
from mlx_overlay_server.metrics import Metrics
from mlx_overlay_server.models.download import Downloader
from mlx_overlay_server.models.library import Library
from mlx_overlay_server.models.pool import Extras, Pool, preload
from mlx_overlay_server.preparation import Preparation
from mlx_overlay_server.preparation.process import Process
from mlx_overlay_server.service import Service
from mlx_overlay_server.settings import Settings

logger = logging.getLogger("mlx_overlay_server")


def build(settings: Settings, session: hf_overlay.Session, process: Process | None = None) -> tuple[ASGIApp, Service]:
    """The application, and the service in it; `process` is a preparation process that was started already."""
    downloader = None if session.is_offline else Downloader(session)
    service = _service(settings, session, downloader, process)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        tasks = [
            asyncio.create_task(preload(service.pool, settings.models, service.engine.warm_up)),
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
    )
    for routes in (openai, responses, anthropic, models_route, status, absent):
        app.include_router(routes.router(service))
    add_error_handlers(app)
    guarded: Any = Guard(
        app,
        api_key=settings.api_key,
        host=settings.host,
        origins=settings.origins,
        max_body=settings.limits.body,
        refuse=refuse,
        count=lambda path, code: service.metrics.requests.labels(path, code).inc(),
        turns=service.turns,
    )
    if settings.origins:
        guarded = CORSMiddleware(
            guarded, allow_origins=list(settings.origins), allow_methods=["*"], allow_headers=["*"], max_age=600
        )
    return guarded, service


async def _log_memory(engine: Engine, budget: int | None) -> None:
    """Log how the memory is divided, and warn of a budget that leaves too little for everything but weights."""
    try:
        shares = await engine.memory()
    except ServerError:
        return  # the engine has failed, and has logged why
    logger.info(
        "memory: %.1f GB for weights, %.1f GB for kept KV caches, of %.1f GB that MLX may use",
        (shares.weights if budget is None else budget) / 1e9,
        shares.prefixes / 1e9,
        shares.usable / 1e9,
    )
    if budget is not None and budget > shares.weights:
        logger.warning(
            "--memory-budget leaves too little memory for running requests: %.1f GB or less would not",
            shares.weights / 1e9,
        )


def _service(
    settings: Settings, session: hf_overlay.Session, downloader: Downloader | None, process: Process | None
) -> Service:
    engine = Engine(settings.engine)
    library = Library(session, downloader.fetch if downloader is not None else None)
    first = settings.models[:1]

    async def weights() -> int:
        return (await engine.memory()).weights

    pool = Pool(
        library,
        engine,
        budget=weights if settings.memory_budget is None else settings.memory_budget,
        idle_ttl=settings.idle_ttl,
        pinned=settings.models,
        extras={name: Extras(settings.adapter_path, settings.draft_model) for name in first},
    )

    def numbers() -> dict[str, tuple[str, float]]:
        stats = engine.stats
        return {
            "active_sequences": ("Sequences in a batch: the batch size.", stats.active),
            "waiting_sequences": ("Sequences that no batch has room for.", stats.waiting),
            "pending_sequences": ("Sequences that somebody waits for.", engine.pending),
            "kv_cache_bytes": ("KV caches kept for later prompts, in bytes.", stats.cache_bytes),
            "kv_cache_entries": ("KV caches kept for later prompts.", stats.cache_entries),
            "engine_steps": ("Steps of the engine.", stats.steps),
            "engine_failures": ("Batches lost to an error.", stats.failures),
            "models_resident": ("Models in memory.", len(pool.resident)),
            "models_bytes": ("Weights of the models in memory, in bytes.", pool.nbytes),
        }

    return Service(
        library,
        pool,
        engine,
        Metrics(numbers, frozenset({"engine_steps", "engine_failures"})),
        settings.limits,
        Preparation(engine, settings.limits, process),
        aliases=settings.aliases,
        default_model=settings.default_model,
    )
