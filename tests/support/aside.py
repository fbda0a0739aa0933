"""Packages that are no part of the development environment, for tests that run them where they are there.

`make kinds` sets up what loads models (some GB), `make test` the small ones, in folders beside the environment's own.
A package that is installed in the environment is found as well.
"""

from __future__ import annotations

import shutil
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

KINDS = Path(sys.prefix, "kinds")
"""Python packages that load models."""
CLIENTS = Path(sys.prefix, "hub-clients")
"""Clients of the Hub for other languages: Python packages, and `node_modules`."""

START = f"import sys; sys.path += {[str(KINDS), str(CLIENTS)]}\n"
"""The beginning of a program that uses them. The environment's own packages come first."""


def need(*packages: str) -> None:
    """Skip the test unless these Python packages are there."""
    missing = [name for name in packages if not _is_here(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not there: make kinds")


def need_node(package: str) -> Path:
    """The folder of a package from npm; skips the test where it, or node, is not there."""
    folder = CLIENTS / "node_modules" / package
    if shutil.which("node") is None or not folder.is_dir():
        pytest.skip(f"node or {package} is not there: make hub-clients")
    return folder


@cache
def _is_here(package: str) -> bool:
    return PathFinder.find_spec(package, [*sys.path, str(KINDS), str(CLIENTS)]) is not None
