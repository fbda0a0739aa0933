"""How commands print: data to stdout, everything else to stderr, nothing that could steer a terminal."""

from __future__ import annotations

import sys

from hf_overlay.command.output import print_findings, print_json, print_table, size
from hf_overlay.text import printable

from mlx_overlay_server.options import PROGRAM

__all__ = ["is_terminal", "print_findings", "print_json", "print_table", "say", "size"]


def say(text: str) -> None:
    """Tell a person something: one line on stderr."""
    print(f"{PROGRAM}: {printable(text)}", file=sys.stderr)


def is_terminal() -> bool:
    """Return whether a person sees stderr change as it is written."""
    return sys.stderr.isatty()
