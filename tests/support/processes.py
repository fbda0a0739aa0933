"""Real processes, started as a person's shell starts them and bounded in time."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

BIN = Path(sys.executable).parent
"""Where this installation's commands are: hf-overlay, hf, mlx_lm.generate."""
OVERLAY = str(BIN / "hf-overlay")
PYTHON = sys.executable
SECONDS = 60.0
"""What every wait is bounded by; nothing here takes a fifth of it unless a promise is broken, or the machine is busy.
What must take less than something is bounded by `due`."""

# What os.login_tty does cannot be done between fork and exec of a process with threads; a program of its own can.
_ON_TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"


class Finished(NamedTuple):
    """What a program said, and how it ended."""

    status: int
    out: str
    err: str

    def lines(self) -> list[str]:
        return self.out.splitlines()


def environment(home: Path, **more: str) -> dict[str, str]:
    """What a shell hands to a program: this installation's commands first in PATH, the Hub out of reach."""
    return {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "LC_ALL": "C.UTF-8",  # else Python adds LC_CTYPE for the programs it starts
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    } | more


def finish(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdin: bytes = b"",
    cwd: Path | None = None,
    seconds: float = SECONDS,
) -> Finished:
    """Run a program to its end, with `stdin` piped in."""
    with start(arguments, environ, cwd=cwd) as process:
        out, err = process.communicate(stdin, timeout=seconds)
    return Finished(process.returncode, _text(out), _text(err))


def succeed(arguments: Sequence[str], environ: Mapping[str, str], *, cwd: Path | None = None) -> Finished:
    """Run a program that must exit 0."""
    done = finish(arguments, environ, cwd=cwd)
    assert done.status == 0, f"{' '.join(arguments)} exited {done.status}: {done.err}"
    return done


@contextmanager
def signals_reach_children() -> Iterator[None]:
    """Processes that are started meanwhile do not ignore the signals that this one was started to ignore.

    Under nohup and in the background of a script, SIGHUP and SIGINT are ignored, which programs inherit. A handler is
    not inherited, so one that does nothing leaves this process as it was and gives the others the default.
    """
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda _number, _frame: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def start(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    cwd: Path | None = None,
    stdin: int | IO[Any] = subprocess.PIPE,
    stdout: int | IO[Any] = subprocess.PIPE,
    stderr: int | IO[Any] = subprocess.PIPE,
    terminal: int | None = None,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program in a session of its own; what is left of that session at the end is killed.

    In the foreground of `terminal`, the file descriptor of one, which is then its stdin, stdout and stderr; without
    one it has no terminal. `options` are Popen's.
    """
    if terminal is not None:
        arguments = [PYTHON, "-c", _ON_TERMINAL, *arguments]
        stdin = stdout = stderr = terminal
    with subprocess.Popen(
        arguments,
        env=environ,
        cwd=cwd or environ["HOME"],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=terminal is None,
        bufsize=0,
        **options,
    ) as process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # not yet the leader of its session, or nothing is left of it
    except PermissionError:  # macOS says so of a group in which all are dead already
        pass


def read_line(source: int | IO[bytes] | None) -> str:
    """The next line from a pipe or a terminal, without its end; what there is at the end of the file."""
    assert source is not None
    fd = source if isinstance(source, int) else source.fileno()
    line = b""
    deadline = time.monotonic() + SECONDS
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"nothing more was said after {line!r}"
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return _text(line).rstrip("\r\n")


def answering(script: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a Python script that answers each line with one, for `answer_to`."""
    return subprocess.Popen(
        [sys.executable, "-P", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environ,
    )


def answer_to(process: subprocess.Popen[str], line: str) -> str:
    """Say one line to a program and read the one that it answers; nothing when it ended, or hung and was killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    finally:
        watchdog.cancel()


def eventually(is_true: Callable[[], bool], what: str) -> None:
    """Ask again and again until it is so. For what the kernel does in its own time, after a process has ended."""
    deadline = time.monotonic() + SECONDS
    while not is_true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.02)


def due(seconds: float) -> float:
    """How long something may take now that takes up to `seconds` where nothing else has work.

    On a machine with three times the work that it has processors for, everything takes three times as long and more.
    """
    return seconds * (1 + os.getloadavg()[0] / (os.cpu_count() or 1))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
