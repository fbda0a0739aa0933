"""Output of commands: results on stdout, everything else on stderr, without control characters of terminals."""

from __future__ import annotations

import sys

from hf_overlay.command.output import print_findings, print_json, print_table, size
from hf_overlay.streams import tell
from hf_overlay.text import printable

from mlx_overlay_server.options import PROGRAM

__all__ = ["is_terminal", "print_findings", "print_json", "print_table", "say", "size"]


def say(text: str) -> None:
    """Print one line for a person on stderr."""
    tell(f"{PROGRAM}: {printable(text)}")


def is_terminal() -> bool:
    """Return whether a person watches stderr on a terminal."""
    return sys.stderr.isatty()
