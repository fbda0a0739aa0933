"""Starts programs without forking the server, and ends them.

The server has many threads, some of which belong to libraries. A fork copies only one of them, and locks that the
others hold stay locked in the copy: OpenBLAS's own fork handler then waits for ever. `posix_spawn` runs no such
handlers. `subprocess.Popen` uses it as long as it need not close descriptors in the child, and Python opens all
descriptors as not inheritable anyway. asyncio and uvloop always fork.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress

TERMINATE_SECONDS = 5.0
"""Seconds that a program has to end by itself before it is killed."""
BEHIND = 5
"""The niceness of programs that nobody waits for as urgently as for an answer. Beside a busy server they get a third of
a processor.
"""
_POLL_SECONDS = 0.01


def start(
    module: str,
    *arguments: str,
    stdin: int,
    stdout: int,
    stderr: int | None = None,
    environ: Mapping[str, str] | None = None,
    inherit: Iterable[int] = (),
    blocked: Iterable[signal.Signals] = (),
) -> subprocess.Popen[bytes]:
    """Start a Python module as a program; the streams are those of subprocess.Popen.

    `inherit`: descriptors that the program holds open as long as it runs; it does not learn their numbers. `blocked`:
    signals that do not reach it.
    """
    copies = [os.dup(each) for each in inherit]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        for each in copies:
            os.set_inheritable(each, True)
        return subprocess.Popen(
            # -P: the working folder may contain a file with the name of a module.
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=None if environ is None else dict(environ),
            bufsize=0,
            close_fds=False,  # so that Popen uses posix_spawn
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for each in copies:
            os.close(each)


def step_behind(process: subprocess.Popen[bytes]) -> None:
    """Lower a program's priority below the server's."""
    with suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, process.pid, BEHIND)


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a program's end, and return its exit status."""
    while (status := process.poll()) is None:
        await asyncio.sleep(_POLL_SECONDS)
    return status


class Child:
    """A running program, as the event loop sees it."""

    def __init__(self, process: subprocess.Popen[bytes], out: asyncio.StreamReader) -> None:
        self._process = process
        self._out = out

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines of the program's output until it closes that."""
        while line := await self._out.readline():
            yield line

    def write(self, data: bytes) -> None:
        """Write a few bytes to the program's input, which has room for them. Do nothing if the program has ended."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(data)

    async def wait(self) -> int:
        """Wait for the program's end, and return its exit status."""
        return await ended(self._process)

    async def end(self) -> None:
        """End the program if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(TERMINATE_SECONDS):
                    await self.wait()
            except TimeoutError:
                self._process.kill()
                await self.wait()


@asynccontextmanager
async def running(
    module: str, *arguments: str, environ: Mapping[str, str], inherit: Iterable[int] = ()
) -> AsyncIterator[Child]:
    """Run a Python module as a program of low priority while this context is open; `inherit` is that of `start`."""
    process = start(module, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, environ=environ, inherit=inherit)
    step_behind(process)
    assert process.stdout is not None  # noqa: S101 - a pipe
    assert process.stdin is not None  # noqa: S101
    out = asyncio.StreamReader()
    transport = None
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(out), process.stdout
        )
        child = Child(process, out)
        try:
            yield child
        finally:
            await child.end()
    finally:
        process.stdin.close()
        (transport or process.stdout).close()
