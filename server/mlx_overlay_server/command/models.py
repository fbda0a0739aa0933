"""Finds the models in the folders and caches that a command's options name."""

from __future__ import annotations

import argparse
import os

from hf_overlay import Model, config, configfile
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.config import Settings


def settings(options: argparse.Namespace) -> Settings:
    """Return where models are, as serving with the same options would look for them. Raises UsageError."""
    return config.load(
        options.model_paths,
        os.environ,
        config.working_folder(),
        kind="mlx",
        exclude=options.exclude,
        encoders=True,
        below=options.below,
        maps=dict(options.maps),
        file=configfile.read(os.environ),
    )


def catalog(options: argparse.Namespace) -> Catalog:
    """Look at the folders and the cache. Raises OverlayError."""
    return Catalog(settings(options))


def listed(found: Catalog) -> list[Model]:
    """Return the models that requests can name, one for each id, sorted by id."""
    return [each.winner for each in found.resolutions().values()]
