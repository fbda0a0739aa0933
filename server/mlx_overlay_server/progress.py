"""Shows the progress of a download: as a bar that changes in place on a terminal, elsewhere as a line now and then."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from hf_overlay.text import printable

WIPE = "\r\x1b[K"
"""Clears the terminal's line in which the cursor is."""
_WIDTH = 30
_BLOCKS = " ▏▎▍▌▋▊▉█"
_STEP = 10
"""Percent of progress between two lines where there is no terminal."""


def is_terminal(file: TextIO) -> bool:
    """Return whether what is written to a file appears on a terminal."""
    return file.isatty() and os.environ.get("TERM") != "dumb"


class Meter:
    """Formats the progress of one download."""

    def __init__(self, name: str) -> None:
        self._name = printable(name)
        self._began = time.monotonic()
        self._first: int | None = None
        """Bytes that were there when the download began."""
        self._step = -1

    def line(self, done: int, total: int) -> str:
        """Return the progress with a bar, for a terminal."""
        self._first = done if self._first is None else self._first
        share = min(1.0, done / max(total, 1))
        seconds = time.monotonic() - self._began
        rate = (done - self._first) / seconds if seconds > 0.5 else 0
        left = f", {_clock((total - done) / rate)} left" if rate > 0 and done < total else ""
        return f"{self._name} {drawn(share)} {share:4.0%} of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s{left}"

    def step(self, done: int, total: int) -> str | None:
        """Return the progress without a bar each time that another tenth is there, else None."""
        percent = done * 100 // max(total, 1) // _STEP * _STEP
        if percent == self._step:
            return None
        self._step = percent
        return f"{self._name}: {percent} % of {total / 1e6:.1f} MB"


class Bar:
    """Shows the progress of one download on stderr. It is a context manager, which ends the line."""

    def __init__(self, name: str, file: TextIO | None = None) -> None:
        self._meter = Meter(name)
        self._file = file or sys.stderr
        self._is_terminal = is_terminal(self._file)
        self._has_begun = False

    def show(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are there."""
        if self._is_terminal:
            self._has_begun = True
            self._file.write(f"{WIPE}{self._meter.line(done, total)}")
            self._file.flush()
        elif (line := self._meter.step(done, total)) is not None:
            print(line, file=self._file, flush=True)

    def __enter__(self) -> Self:
        """Begin to show."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the line."""
        if self._has_begun:
            self._file.write("\n")
            self._file.flush()


def drawn(share: float, width: int = _WIDTH) -> str:
    """Return a bar of `width` characters that is filled for a share from 0 to 1, in eighths of a character."""
    eighths = int(share * width * 8)
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (_BLOCKS[part] if whole < width else "")).ljust(width).join("▕▏")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
