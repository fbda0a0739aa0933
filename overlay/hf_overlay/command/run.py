"""`hf-overlay run`: a program with the overlay in its environment, as if it had been started alone."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from hf_overlay import descriptors
from hf_overlay.command.output import say
from hf_overlay.config import Kind, is_offline
from hf_overlay.messages import Messages
from hf_overlay.opening import open_session
from hf_overlay.session import Session

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
_HARMLESS = (signal.SIGCONT, signal.SIGWINCH)
"""Signals that ask nobody to end."""
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""Ignored in every Python process, but not in the shell that a program expects to be started from."""
REPEAT_SECONDS = 2.0
"""Where nothing tells who sent a SIGINT: a second one within so many seconds reaches the program, whoever sent it."""
# Waited for rather than handled, since that tells who sent it.
_WAITED_FOR = {*_FROM_KEYBOARD, signal.SIGCHLD} if hasattr(signal, "sigwaitinfo") else set()


def run(
    command: Sequence[str],
    model_paths: Sequence[str],
    *,
    below: Sequence[str],
    maps: Mapping[str, str],
    kind: Kind | None,
    exclude: Sequence[str],
    offline: bool,
    hold_downloads: bool,
    messages: Messages,
) -> int:
    """Run `command` in a session of its own; returns its exit status, 128 + N when signal N ended it.

    As a shell does: 127 when there is no such program, 126 when it cannot be run. Raises OverlayError.
    """
    open_files = descriptors.raise_limit()
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else dict(os.environ)
    child: int | None = None
    ended: Session | None = None
    """The session, once its program has ended."""
    early: list[int] = []
    kept: dict[int, float] = dict.fromkeys(_FROM_KEYBOARD, -REPEAT_SECONDS)
    """Signals that were taken for key presses -> when the last one came, in monotonic seconds."""

    def is_from_keyboard(number: int) -> bool:
        """Whether the terminal has sent this signal to the child itself: a guess, where a second one corrects it."""
        if number not in kept or not _is_in_foreground():
            return False
        before, kept[number] = kept[number], time.monotonic()
        return kept[number] - before > REPEAT_SECONDS

    def forward(number: int, _frame: FrameType | None) -> None:
        if ended is not None:  # what the program left running may be getting an answer from the gateway
            if number not in _HARMLESS:
                ended.cut()
        elif child is None:
            early.append(number)
        elif not is_from_keyboard(number):
            _send(child, number)

    # What the shell ignores for us (nohup, a script's background job), the program must ignore too.
    forwarded = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in forwarded}
    # Blocked from here to the end, so that each one waits for `_wait`, which learns who sent it. Before there are other
    # threads (the gateway's): they inherit this and take none of them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        with open_session(
            model_paths,
            below=below,
            maps=maps,
            kind=kind,
            exclude=exclude,
            gateway=not is_offline(environ),
            hold_downloads=hold_downloads,
            environ=environ,
            messages=messages,
        ) as session:
            gc.enable()  # the gateway may answer for days
            os.set_inheritable(session.owner_fd, True)
            # A key press between this and the next call is lost: nothing tells it from one that the child has had, too.
            if stop := [
                *_taken(set(_FROM_KEYBOARD) & set(forwarded)),
                *(each for each in early if each not in _HARMLESS),
            ]:
                return 128 + stop[0]
            try:
                # Not subprocess.Popen, whose child would inherit the blocked signals. Descriptors that the shell
                # opened for the program stay open: <(command), a make jobserver.
                with descriptors.limit_for_programs(open_files):
                    child = os.posix_spawnp(
                        command[0], list(command), session.environment, setsigmask=mask, setsigdef=_IGNORED_BY_PYTHON
                    )
            except OSError as error:
                say(f"error: cannot run {command[0]}: {error.strerror}")
                return 127 if isinstance(error, FileNotFoundError) else 126
            for number in early:  # came after the check above, and before there was a child to send it to
                _send(child, number)
            status = _wait(child)
            _taken(set(_FROM_KEYBOARD))  # the program has had these, too
            ended = session
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return 128 - status if status < 0 else status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait(child: int) -> int:
    """Wait for the child's end; returns its exit status, -N when signal N ended it.

    The terminal sends a key press (Ctrl-C) to the child as well; a SIGINT that a process sent is passed on. Where
    Python cannot tell the two apart (macOS), the signal handler takes the first of two in a row for a key press.
    """
    if not _WAITED_FOR:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        info = signal.sigwaitinfo(_WAITED_FOR)
        if info.si_signo in _FROM_KEYBOARD and info.si_code <= 0:  # above 0: from the kernel
            _send(child, info.si_signo)


def _taken(numbers: set[signal.Signals]) -> list[int]:
    """The blocked signals of these that have come by now; they are taken, so that none is handled later."""
    taken = []
    while _WAITED_FOR and (info := signal.sigtimedwait(numbers, 0)) is not None:
        taken.append(info.si_signo)
    return taken


def _send(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:  # it has just ended
        pass


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
