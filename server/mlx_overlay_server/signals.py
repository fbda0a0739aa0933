"""The signals that end the server, which are an exception until the process handles them in another way."""

from __future__ import annotations

import signal
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGINT comes by Ctrl-C, SIGTERM from whoever looks after the process, SIGHUP when its terminal is closed."""


def heeded() -> list[signal.Signals]:
    """Return those of the signals that this process was not started to ignore, as by nohup."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


class Stopped(KeyboardInterrupt):
    """A signal has told this process to end.

    It is a subclass of KeyboardInterrupt for a reason: once a KeyboardInterrupt itself has left `exec` of a string,
    which the making of each dataclass runs, CPython ends the process as if by SIGINT, even if the exception was caught
    (`unhandled_keyboard_interrupt` in Python/pythonrun.c). It does not do so for subclasses.
    """


def raise_stopped() -> None:
    """Make these signals raise Stopped in the main thread from now on."""
    for number in heeded():
        signal.signal(number, _raise)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Stopped
