"""Folders made in the real cache for downloads that a client is about to begin.

Some downloads that are announced never come. So each folder is noted in the session before it is made, and at the
session's end those that are still empty are removed.
"""

from __future__ import annotations

import os

from hf_overlay.tree import files

_RECORD = "made"
"""File in a session's folder: the folders that were made, a path a line."""


def make(session: str, folder: str) -> None:
    """Make a folder and those above it, noting each first. Raises OSError."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with open(f"{session}/{_RECORD}", "a", encoding="utf-8", errors="surrogateescape") as record:
            record.write(f"{path}\n")
        os.makedirs(path, exist_ok=True)


def remove_unused(session: str) -> None:
    """Remove the folders that are still empty, and the record of them. Raises OSError."""
    try:
        with open(f"{session}/{_RECORD}", encoding="utf-8", errors="surrogateescape") as record:
            paths = record.read().splitlines()
    except FileNotFoundError:
        return
    for path in reversed(paths):
        files.remove_if_empty(path)
    os.unlink(f"{session}/{_RECORD}")
