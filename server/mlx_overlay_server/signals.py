"""Turns SIGINT and SIGTERM into an exception, until the process handles them in another way."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal has told this process to end.

    It is a subclass of KeyboardInterrupt for a reason: once a KeyboardInterrupt itself has left `exec` of a string,
    which the making of each dataclass runs, CPython ends the process as if by SIGINT, even if the exception was caught
    (`unhandled_keyboard_interrupt` in Python/pythonrun.c). It does not do so for subclasses.
    """


def raise_stopped() -> None:
    """Make SIGINT and SIGTERM raise Stopped in the main thread from now on; an ignored SIGINT stays ignored."""
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Stopped
