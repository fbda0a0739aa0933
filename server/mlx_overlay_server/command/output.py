"""How commands print: data to stdout, everything else to stderr, nothing that could steer a terminal."""

from __future__ import annotations

import sys

from hf_overlay.command.output import print_json, print_table
from hf_overlay.text import printable

from mlx_overlay_server.options import PROGRAM

__all__ = ["is_terminal", "print_json", "print_table", "say", "size"]

_UNITS = ("kB", "MB", "GB", "TB")


def say(text: str) -> None:
    """Tell a person something: one line on stderr."""
    print(f"{PROGRAM}: {printable(text)}", file=sys.stderr)


def size(nbytes: float) -> str:
    """Return a number of bytes in three digits with a unit."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for unit in _UNITS:
        nbytes /= 1000
        if nbytes < 999.5 or unit == _UNITS[-1]:
            return f"{nbytes:.0f} {unit}" if nbytes >= 100 else f"{nbytes:.1f} {unit}"
    raise AssertionError


def is_terminal() -> bool:
    """Return whether a person sees stderr change as it is written."""
    return sys.stderr.isatty()
