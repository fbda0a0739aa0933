"""`mlx-omni-server ps` and `stop`: the models in the running server's memory."""

from __future__ import annotations

import argparse

from mlx_overlay_server.command.client import client
from mlx_overlay_server.command.output import print_json, print_table, say


def ps(options: argparse.Namespace) -> int:
    """List the models that are in memory or on their way there."""
    server = client(options)
    health = server.get("/health")
    rows = [(id_, "loaded") for id_ in health["loaded"]] + [(id_, "loading") for id_ in health["loading"]]
    if options.json:
        return print_json([{"id": id_, "state": state} for id_, state in rows])
    if not rows:
        say(f"no model is in the memory of {server.url}")
    return print_table(("ID", "STATE"), rows)
