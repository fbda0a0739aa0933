"""`mlx-omni-server ps` and `stop`: list and unload models in the running server's memory."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_overlay_server.command.client import client
from mlx_overlay_server.command.output import print_json, print_table, say, size
from mlx_overlay_server.names import resolved


def ps(options: argparse.Namespace) -> int:
    """List the models that are in memory or being loaded."""
    server = client(options)
    models = server.get("/manage/v1/status")["models"]
    if options.json:
        return print_json(models)
    if not models:
        say(f"no model is in the memory of {server.url}; requests load what they name")
        return 0
    return print_table(("ID", "STATE", "SIZE", "REQUESTS", "IDLE"), [_row(each) for each in models])


def stop(options: argparse.Namespace) -> int:
    """Unload a model."""
    server = client(options)
    ids = [each["id"] for each in server.get("/manage/v1/status")["models"]]
    model = resolved(options.model, ids, where=f"in the memory of {server.url}")
    server.post("/manage/v1/models/unload", {"model": model, "force": options.force})
    if options.json:
        return print_json({"id": model})
    say(f"unloaded {model}")
    return 0


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    state = f"{model['state']}, pinned" if model["pinned"] else model["state"]
    idle = model["idle_seconds"]
    return (
        model["id"],
        state,
        size(model["bytes"]) if model["bytes"] else "-",
        str(model["users"]),
        "-" if idle is None else f"{idle:.0f} s",
    )
