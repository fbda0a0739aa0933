"""SIGINT and SIGTERM as an exception, for as long as nothing in the process listens to them in another way."""

from __future__ import annotations

import signal
from types import FrameType


class Stopped(KeyboardInterrupt):
    """A signal has told this process to end.

    Not KeyboardInterrupt itself: once that has left `exec` of a string, as the making of a dataclass runs one, CPython
    ends the process as if by SIGINT, although it was caught meanwhile (`unhandled_keyboard_interrupt` in its
    Python/pythonrun.c). Subclasses are not looked for there.
    """


def raise_stopped() -> None:
    """Let SIGINT and SIGTERM raise Stopped in the main thread from now on; a SIGINT that is ignored stays ignored."""
    signal.signal(signal.SIGTERM, _raise)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise Stopped
