"""How commands print: data to stdout, everything else to stderr, nothing that could steer a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_overlay.messages import Messages
from hf_overlay.streams import tell
from hf_overlay.text import printable

if TYPE_CHECKING:
    from hf_overlay.doctor import Finding


def print_json(value: Any) -> int:
    """Print a value as JSON; returns the exit code 0."""
    print(json.dumps(value, indent=2))
    return 0


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Print rows below a header, in columns; returns the exit code 0."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    for number, row in enumerate([header, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        print(_bold(line) if number == 0 else line)
    return 0


def _bold(text: str) -> str:
    is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if is_plain else f"\033[1m{text}\033[0m"


def print_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print each problem with what to do about it; returns the exit code, 1 where there is any."""
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(printable(f"{finding.where}: {finding.what}"))
            print(f"    {printable(finding.advice)}")
    return 1 if findings else 0


def size(nbytes: float) -> str:
    """A number of bytes in three digits with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if nbytes >= 100 or unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def say(text: str) -> None:
    """Tell a person something: one line on stderr."""
    tell(f"hf-overlay: {printable(text)}")


class Lines(Messages):
    """Says all that a session tells."""

    def __init__(self, verbosity: int) -> None:
        """`verbosity`: -1 for nothing, 0 for what is going on and for warnings, 1 for details, too."""
        self._verbosity = verbosity

    @property
    def are_detailed(self) -> bool:
        return self._verbosity > 0

    def debug(self, text: str) -> None:
        self._say(text, 1)

    def info(self, text: str) -> None:
        self._say(text, 0)

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}", 0)

    def _say(self, text: str, verbosity: int) -> None:
        if self._verbosity >= verbosity:
            say(text)
