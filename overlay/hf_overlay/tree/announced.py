"""Folders made in the real cache for downloads that a client is about to begin.

Some downloads that are announced never come. So each folder is noted in the session before it is made, and at the
session's end those that are still empty are removed.
"""

from __future__ import annotations

import json
import os

from hf_overlay.tree import files

_RECORD = "made"
"""File in a session's folder: the folders that were made, each an absolute path as a line of JSON."""


def make(session: str, folder: str) -> None:
    """Make a folder and those above it, noting each first. Raises OSError."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for path in reversed(missing):
        with open(f"{session}/{_RECORD}", "a", encoding="ascii") as record:
            record.write(f"{json.dumps(path)}\n")
        os.makedirs(path, exist_ok=True)


def folders(session: str) -> list[str]:
    """The folders that were made, parents first. What cannot be read in the record is left out."""
    try:
        lines = files.read(f"{session}/{_RECORD}").decode("utf-8", "surrogateescape").splitlines()
    except OSError:
        return []
    return [path for path in map(_path, lines) if os.path.isabs(path) and "\0" not in path]


def remove_unused(session: str) -> None:
    """Remove the folders that are still empty, and the record of them. Raises OSError."""
    for path in reversed(folders(session)):
        files.remove_if_empty(path)
    if os.path.lexists(f"{session}/{_RECORD}"):
        files.remove(f"{session}/{_RECORD}")


def _path(line: str) -> str:
    try:
        path = json.loads(line)
    except ValueError:
        return line  # as earlier versions wrote it
    return path if isinstance(path, str) else ""
