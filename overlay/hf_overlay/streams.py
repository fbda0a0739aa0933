"""The standard streams of a command, which may be closed, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def prepare() -> None:
    """Make this process's standard streams safe to use; a command calls it first.

    A closed one leads to the null device: else a file that is opened later gets its number, and what is printed goes
    into that file. Programs that are started later have it closed. Characters that an encoding lacks become escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free, which is the stream's
            setattr(sys, name, open(null, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process lives
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def tell(line: str) -> None:
    """Print a line for a person on stderr. It is lost where stderr cannot be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(2)


def flush() -> None:
    """Write what was printed so far. Raises OSError where stdout cannot be written; what stderr cannot take is lost."""
    try:
        sys.stderr.flush()
    except OSError:
        discard(2)
    sys.stdout.flush()


def discard(number: int) -> None:
    """Let what a standard stream still has to write go nowhere. Else Python tries to write it again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
