"""How what looks at a disk reports that the disk answers, to whoever would otherwise give up on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_report: ContextVar[Callable[[], None]] = ContextVar("report", default=lambda: None)
"""Reports progress of the question that this thread works on."""


def alive() -> None:
    """Report that the disk has just answered a part of the question. Outside of a question it does nothing."""
    _report.get()()


def reporter() -> Callable[[], None]:
    """What `alive` calls in this thread, for a loop that would call it thousands of times."""
    return _report.get()


@contextmanager
def reporting(report: Callable[[], None]) -> Iterator[None]:
    """Have `alive` call `report` in this thread."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)
