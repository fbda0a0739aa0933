"""The limit on open files: raised for our own commands, and as it was for the programs that they start.

macOS gives 256 to each program, which a few downloads through the gateway use up. Programs keep the limit that they
were started with, because some of them cannot deal with a file descriptor above 1,023.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

WANTED = 10_240
"""Files that a command may have open. It is the most that macOS grants, whatever its hard limit says."""


def raise_limit() -> int:
    """Raise the soft limit of this process as far as the hard limit and `WANTED` allow; returns the one before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        _set(wanted, hard)
    return soft


@contextmanager
def limit_for_programs(soft: int) -> Iterator[None]:
    """A context in which programs are started with this soft limit, which `raise_limit` has returned.

    It is this process's limit meanwhile: what is open stays open.
    """
    raised, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    _set(soft, hard)
    try:
        yield
    finally:
        _set(raised, hard)


def _set(soft: int, hard: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (OSError, ValueError):  # a sandbox, or a system that grants less: what there is has to do
        return
