"""`mlx-omni-server doctor`: finds problems with folders and cache, as `hf-overlay doctor` does, and with serving."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from hf_overlay import Model, OverlayError
from hf_overlay import doctor as overlay
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.doctor import Finding

from mlx_overlay_server.command import folders, models
from mlx_overlay_server.command.client import Client, Refused, running
from mlx_overlay_server.command.output import print_findings, say, size
from mlx_overlay_server.settings import API_KEY_VARIABLE

_SECONDS = 120
"""Seconds that importing MLX may take."""
_ROOM = """
from mlx_overlay_server import memory
from mlx_overlay_server.engine.mlx import machine
print(memory.shares(machine()).weights)
"""
"""A program that prints how many bytes the weights of models may take on this machine."""


def doctor(options: argparse.Namespace) -> int:
    """Print each problem with what to do about it. The exit code is 1 if there is any."""
    catalog = models.catalog(options)
    found = models.listed(catalog)
    findings = [
        *overlay.examine(catalog, os.environ),
        *_folders(catalog, found),
        *_engine(found),
        *_servers(options),
    ]
    if not findings and not options.json:
        say("no problems found")
    return print_findings(findings, as_json=options.json)


def _folders(catalog: Catalog, found: Sequence[Model]) -> Iterator[Finding]:
    """Yield problems of models that generate text, of disks that answer; the overlay's part names the others."""
    for model in found:
        if model.task == "text":
            with suppress(OSError):
                yield from catalog.patience.ask(model.root, partial(folders.examine, model.path))


def _engine(found: Sequence[Model]) -> Iterator[Finding]:
    """Yield problems with MLX, and models that are too large for this machine."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ROOM], capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        said, room = done.stderr.strip().splitlines(), done.stdout.strip()
    except subprocess.TimeoutExpired:
        said, room = [f"it took more than {_SECONDS} s"], ""
    if not room.isdigit():
        yield Finding(
            "mlx",
            sys.executable,
            f"MLX cannot be used: {said[-1] if said else 'it ended without a word'}",
            "Install the server again in this environment: docs/install.md. On a Mac it takes an arm64 Python.",
        )
        return
    for model in found:
        weights = sum(file.size for file in model.files if file.name.endswith(".safetensors"))
        if weights > int(room):
            yield Finding(
                "memory",
                model.path,
                f"{model.id} has {size(weights)} of weights, and there is memory for {size(int(room))}",
                "Take a smaller quantisation of it; docs/memory.md says how a Mac's GPU may use more memory.",
            )


def _servers(options: argparse.Namespace) -> Iterator[Finding]:
    """Yield problems of the running servers."""
    api_key = options.api_key or os.environ.get(API_KEY_VARIABLE) or None
    for url in [options.url] if options.url else running():
        try:
            health = Client(url, api_key).get("/health")
        except Refused as refused:
            health = {"status": "failed", "engine": {"last_failure": str(refused), "waits_for": None}}
        except OverlayError as error:
            yield Finding("server", url, str(error), "Look at its log, and start it again.")
            continue
        engine = health["engine"]
        if health["status"] == "waiting":
            yield Finding("server", url, f"it waits for {engine['waits_for']}", "Check that disk or its server.")
        elif health["status"] == "failed":
            yield Finding("server", url, f"its engine failed: {engine['last_failure']}", "Start the server again.")
