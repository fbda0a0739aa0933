"""`hf-overlay run`: a program with the overlay in its environment, as if it had been started alone."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from hf_overlay.config import is_offline
from hf_overlay.session import open_session
from hf_overlay.text import printable

_FROM_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)
_FORWARDED = (
    *_FROM_KEYBOARD,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    signal.SIGWINCH,
)
# Waited for rather than handled, since that tells who sent it.
_WAITED_FOR = {*_FROM_KEYBOARD, signal.SIGCHLD} if hasattr(signal, "sigwaitinfo") else set()


def run(
    command: Sequence[str],
    model_paths: Sequence[str],
    *,
    all_kinds: bool,
    exclude: Sequence[str],
    offline: bool,
    verbosity: int,
) -> int:
    """Run `command` in a session of its own; returns its exit status, 128 + N when signal N ended it.

    As a shell does: 127 when there is no such program, 126 when it cannot be run. Raises OverlayError.
    """
    log_to_stderr(verbosity)
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else dict(os.environ)
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        elif not (number in _FROM_KEYBOARD and _is_in_foreground()):  # else the terminal told the child itself
            child.send_signal(number)

    # What the shell ignores for us (nohup, a script's background job), the program must ignore too.
    forwarded = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in forwarded}
    # Before there are other threads (the gateway's), so that none of them takes what `_wait` waits for.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        with open_session(
            model_paths, all_kinds=all_kinds, exclude=exclude, gateway=not is_offline(environ), environ=environ
        ) as session:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came by now comes here, and the child inherits it
            if stop := [number for number in early if number not in (signal.SIGCONT, signal.SIGWINCH)]:
                return 128 + stop[0]
            os.set_inheritable(session.owner_fd, True)
            try:
                # Descriptors that the shell opened for the program stay open: <(command), a make jobserver.
                child = subprocess.Popen(command, env=session.environment, close_fds=False)
            except OSError as error:
                print(f"hf-overlay: error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
                return 127 if isinstance(error, FileNotFoundError) else 126
            for number in early:  # came after the check above, and before there was a child to tell
                child.send_signal(number)
            status = _wait(child)
            return 128 - status if status < 0 else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child's end. Of key presses the terminal has told it already; a SIGINT that a process sent is
    passed on. Where Python cannot tell the two apart (macOS), the signal handler guesses."""
    if not _WAITED_FOR:
        return child.wait()
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    while (status := child.poll()) is None:
        info = signal.sigwaitinfo(_WAITED_FOR)
        if info.si_signo in _FROM_KEYBOARD and info.si_code <= 0:  # above 0: from the kernel
            child.send_signal(info.si_signo)
    return status


def _is_in_foreground() -> bool:
    """Whether a key press reaches our whole process group, so that the child has had the signal already."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def log_to_stderr(verbosity: int) -> None:
    """Show what sessions say as the command's own lines: -1 errors only, 0 start-up and warnings, 1 everything."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("hf_overlay")
    logger.addHandler(handler)
    logger.setLevel({-1: logging.ERROR, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    logger.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "warning: " if record.levelno == logging.WARNING else ""
        return printable(f"hf-overlay: {level}{record.getMessage()}")
