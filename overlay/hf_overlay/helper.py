"""A process that looks at one disk for another process, because a disk that hangs keeps a process from ending.

Some mounts (FUSE) hold a process that waits for them in spite of SIGKILL. So the process that waits is this one, which
nobody else waits for. It ends by itself when its owner has ended and the disk lets go of it.
"""

from __future__ import annotations

import errno
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from hf_overlay.config import CHANGED_VARIABLES

START_SECONDS = 10
"""Seconds after which a process that has not started is given up on."""
_ALIVE, _ANSWER = b".", b"="
_REPORT_SECONDS = 0.1


class Helper:
    """One helper process. It works on one function at a time."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._progress = 0

    def call(self, function: Callable[[], Any], alive: Callable[[], None]) -> Any:
        """Run a function in the process and return its result; both are pickled.

        `alive` is called while the process starts, works on another function, or reports progress. Raises OSError when
        the process ends.
        """
        seen = self._progress
        while not self._busy.acquire(timeout=_REPORT_SECONDS):
            if seen != self._progress:
                seen = self._progress
                alive()
        try:
            return self._call(function, alive)
        finally:
            self._busy.release()

    def _call(self, function: Callable[[], Any], alive: Callable[[], None]) -> Any:
        process = self._started(alive)
        assert process.stdin is not None  # noqa: S101 - asked for when it was started, as the next
        assert process.stdout is not None  # noqa: S101
        try:
            _send(process.stdin.fileno(), function)
            while os.read(process.stdout.fileno(), 1) == _ALIVE:
                self._progress += 1
                alive()
            has_failed, answer = _receive(process.stdout.fileno())
        except (EOFError, BrokenPipeError):
            self._process = None
            raise OSError(errno.EIO, "the process that looks at the disk has ended") from None
        if has_failed:
            raise answer
        return answer

    def _started(self, alive: Callable[[], None]) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        process = subprocess.Popen(
            # -P: the working folder may be on a disk that hangs, too
            [sys.executable, "-P", "-m", "hf_overlay.helper"],
            # The process uses no tree.
            env={name: value for name, value in os.environ.items() if name not in CHANGED_VARIABLES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # no locks, which a stuck thread would still hold when this process ends
        )
        weakref.finalize(self, _end, process).atexit = False  # the process itself notices that
        assert process.stdout is not None  # noqa: S101
        until = time.monotonic() + START_SECONDS
        ready = select.poll()  # select.select does not work for descriptors above 1,023
        ready.register(process.stdout, select.POLLIN)
        while not ready.poll(_REPORT_SECONDS * 1000):
            if time.monotonic() > until:
                raise OSError(errno.ETIMEDOUT, "the process that looks at the disk does not start")
            alive()
        if os.read(process.stdout.fileno(), 1) != _ALIVE:
            raise OSError(errno.EIO, "the process that looks at the disk has ended")
        self._process = process
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the process go, without waiting for it, since it may hang."""
    process.kill()
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        process.returncode = -signal.SIGKILL  # so that nobody tries again
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:  # nobody wants what was still to be written
                pass


def _send(pipe: int, value: object) -> None:
    data = pickle.dumps(value)
    data = len(data).to_bytes(8, "little") + data
    while data:
        data = data[os.write(pipe, data) :]


def _receive(pipe: int) -> Any:
    """Return the next value from the pipe, whose other end is a process of ours. Raises EOFError."""
    return pickle.loads(_read(pipe, int.from_bytes(_read(pipe, 8), "little")))  # noqa: S301


def _read(pipe: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = os.read(pipe, min(size - len(data), 2**20))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def main() -> None:
    """Work on functions until there are no more. This runs in the helper process."""
    from hf_overlay.progress import reporting

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    last = 0.0

    def report() -> None:
        nonlocal last
        if (now := time.monotonic()) >= last + _REPORT_SECONDS:
            last = now
            os.write(1, _ALIVE)

    report()
    while True:
        try:
            function = _receive(0)
        except EOFError:
            return
        try:
            with reporting(report):
                answer = (False, function())
        except Exception as error:  # noqa: BLE001 - raised again by who asked
            answer = (True, error)
        try:
            os.write(1, _ANSWER)
            _send(1, answer)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
