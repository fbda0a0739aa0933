"""A program of the server's own as the event loop sees it: started without fork, spoken to by frames, and killed."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

from mlx_overlay_server import children, signals
from mlx_overlay_server.frames import LENGTH, Result, packed

logger = logging.getLogger("mlx_overlay_server")


class Ended(Exception):
    """The process has ended, by itself or because it was killed."""


class Peer:
    """One process of such a program. It says None once it is ready, and then answers one question after the other."""

    def __init__(self, module: str, environ: Mapping[str, str] | None = None) -> None:
        self.is_killed = False
        self._socket, theirs = socket.socketpair()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        with theirs:
            self._popen = children.start(
                module,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # What a library in trouble writes may hold the prompt.
                stderr=None if logger.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
                environ=environ,
                # Ctrl-C reaches all processes of a terminal. These end when the server closes the socket, not before.
                blocked=signals.ENDING,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended; only of one that has been ready, and owes no answer."""
        return self._reader is not None and self._reader.at_eof()

    async def ready(self) -> None:
        """Wait until it has imported all that it needs. Raises Ended."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        await self._received()

    def kill(self) -> None:
        """End it now, whatever it does."""
        self.is_killed = True
        self._popen.kill()

    def end(self) -> None:
        """End it, wait until it has ended, and block meanwhile: for where no event loop runs."""
        self.kill()
        self._popen.wait()

    async def close(self) -> int:
        """End it, wait until it has ended and return its exit status."""
        self.kill()
        if self._writer is not None:
            self._writer.close()
        return await children.ended(self._popen)

    def post(self, message: object) -> None:
        """Send what has no answer and takes little room, if the process is ready."""
        if self._writer is not None:
            self._writer.write(packed(message))

    async def send(self, message: object) -> None:
        """Send a message, and wait while the process is slow to take it. Raises Ended."""
        assert self._writer is not None  # noqa: S101 - it is ready
        try:
            self._writer.write(packed(message))
            await self._writer.drain()
        except OSError:
            raise Ended from None

    async def answer(self) -> Result:
        """Wait for the next answer. Raises Ended."""
        result: Result = await self._received()
        return result

    async def ask(self, question: object) -> Result:
        """Send a message and wait for its answer. Raises Ended."""
        await self.send(question)
        return await self.answer()

    async def _received(self) -> Any:
        assert self._reader is not None  # noqa: S101
        try:
            size = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))[0]
            return pickle.loads(await self._reader.readexactly(size))  # noqa: S301 - our own program
        except (OSError, asyncio.IncompleteReadError):
            raise Ended from None
