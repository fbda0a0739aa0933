"""`mlx-omni-server ls`: lists the models that requests can name."""

from __future__ import annotations

import argparse

from hf_overlay import Model

from mlx_overlay_server.command import models
from mlx_overlay_server.command.output import print_json, print_table, say, size
from mlx_overlay_server.models import configs

EXAMPLE = "mlx-community/Qwen3-4B-4bit"
"""A small model that answers well."""


def ls(options: argparse.Namespace) -> int:
    """List the models, one for each id."""
    catalog = models.catalog(options)
    found = models.listed(catalog)
    for warning in catalog.warnings():
        say(f"warning: {warning}")
    if options.json:
        return print_json(
            [
                {
                    "id": each.id,
                    "source": each.source,
                    "path": each.path,
                    "kind": each.task,
                    "images": _sees(each),
                    "model_type": each.model_type,
                    "size_bytes": each.size_bytes,
                }
                for each in found
            ]
        )
    if not found:
        looked = ", ".join([*catalog.settings.roots, catalog.settings.hub_cache, *catalog.settings.below])
        say(
            f"no models in {looked}; name a folder with --model-path, or get one: mlx-omni-server pull {EXAMPLE} "
            "(`mlx-omni-server doctor` says what was left out there, and why)"
        )
        return 0
    return print_table(
        ("ID", "KIND", "SOURCE", "SIZE", "TYPE", "PATH"),
        [
            (each.id, _kind(each), each.source, size(each.size_bytes), each.model_type or "-", each.path)
            for each in found
        ],
    )


def _kind(model: Model) -> str:
    """Return what a model does, and whether it may be shown images."""
    return f"{model.task}, images" if _sees(model) else model.task


def _sees(model: Model) -> bool:
    return configs.sees(model.task, configs.read(model.path))
