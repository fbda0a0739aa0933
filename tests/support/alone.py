"""What a real cache must be at any time: good for programs that know of nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import scan_cache_dir

from tests.support.hfcache import listing

Contents = dict[str, tuple[str, int, str]]
"""Name -> kind, mode, and bytes or target."""


def contents(root: Path) -> Contents:
    """All that a cache is but for its times; nothing where there is none."""
    if not root.exists():
        return {}
    return {name: (kind, mode, detail) for name, (kind, mode, _, _, detail) in listing(root).items()}


def check_stands_alone(cache: Path, *, is_in_progress: bool = False) -> None:
    """P4: every link in it leads to something in it, and scans have nothing to say.

    In progress, a repo may have a folder and no revision yet, as when a plain client is killed at its start.
    """
    inside = os.path.realpath(cache) + os.sep
    for folder, folders, names in os.walk(cache):
        for path in (os.path.join(folder, name) for name in (*folders, *names)):
            if os.path.islink(path):
                assert os.path.exists(path), f"P4 is broken: {path} leads nowhere"
                assert os.path.realpath(path).startswith(inside), f"P4 is broken: {path} leads out of the cache"
    said = [str(warning) for warning in scan_cache_dir(cache).warnings] if cache.is_dir() else []
    warnings = [warning for warning in said if not (is_in_progress and "Snapshots dir doesn't exist" in warning)]
    assert warnings == [], f"P4 is broken: a scan warns of {warnings}"
