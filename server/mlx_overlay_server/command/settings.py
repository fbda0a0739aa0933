"""`mlx-omni-server config`: prints the settings in force, each with the flag, variable or line that it comes from."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hf_overlay import UsageError, configfile
from hf_overlay import config as places
from hf_overlay.command import settings as overlay
from hf_overlay.text import printable

from mlx_overlay_server import configuration
from mlx_overlay_server.command import models
from mlx_overlay_server.command.output import print_json, print_table
from mlx_overlay_server.settings import Key, Profile

_OF_THE_OVERLAY = ("model_path", "below", "exclude", "map")


def config(options: argparse.Namespace) -> int:
    """Print the settings that serving with the same options would have. Of keys, only their existence is printed."""
    file = configfile.read(os.environ)
    given = places.in_force(
        options.model_paths, options.exclude, os.environ, file, below=options.below, maps=dict(options.maps)
    )
    folders = overlay.rows(models.settings(options), given, file, os.environ)
    try:
        found = configuration.origins(options, os.environ)
    except ValueError as error:
        raise UsageError(str(error)) from None
    rows = [(row.name, row.value, row.origin) for row in folders]
    rows += [
        (name, _shown(name, each.value), each.origin) for name, each in found.items() if name not in _OF_THE_OVERLAY
    ]
    if options.json:
        return print_json(
            {
                "file": file.path,
                "is_there": file.text is not None,
                "settings": [{"name": name, "value": value, "origin": origin} for name, value, origin in rows],
            }
        )
    if file.path is not None:
        print(printable(f"{file.path}" + (" (there is none)" if file.text is None else "")))
    return print_table(("SETTING", "VALUE", "ORIGIN"), [line for row in rows for line in _lines(*row)])


def _shown(name: str, value: Any) -> Any:
    """Return a setting's value as it may be shown to anybody."""
    if isinstance(value, Key):
        return {"models": list(value.models) or "all", "rate": value.rate or "any"}
    if isinstance(value, Profile):
        return {
            name: each for name, each in asdict(value).items() if each is not None and each is not False and each != {}
        }
    if name == "api_key" and value:
        return "(hidden)"
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _lines(name: str, value: Any, origin: str) -> list[tuple[str, str, str]]:
    """Return the lines of a table for a setting: one for each of its values."""
    if isinstance(value, Mapping):
        value = [f"{key}={each}" for key, each in value.items()]
    values = value if isinstance(value, list) else [value]
    cells = ["-" if each is None else str(each).lower() if isinstance(each, bool) else str(each) for each in values]
    cells = cells or ["-"]
    return [(name if number == 0 else "", cell, origin) for number, cell in enumerate(cells)]
