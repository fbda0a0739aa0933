"""A preparation process as the event loop sees it.

It is started without a fork, does one thing at a time, and can be killed.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any

from mlx_overlay_server import children
from mlx_overlay_server.frames import LENGTH, Result, packed

logger = logging.getLogger("mlx_overlay_server")


class Ended(Exception):
    """The process has ended, by itself or because it was killed."""


class Process:
    """One preparation process."""

    def __init__(self) -> None:
        self.models: set[str] = set()
        """The keys of the models that it knows."""
        self.has_read: str | None = None
        """The key of the model whose tokenizer it read last, and keeps until it gets that model."""
        self.is_killed = False
        self._socket, theirs = socket.socketpair()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        with theirs:
            self._popen = children.start(
                "mlx_overlay_server.preparation.program",
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # A tokenizer's error messages may quote the prompt.
                stderr=None if logger.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
                # Ctrl-C signals all processes of a terminal. These end when the server closes the socket, not before.
                blocked=(signal.SIGINT, signal.SIGTERM),
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    async def ready(self) -> None:
        """Wait until the process has imported all that it needs. Raises Ended."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        await self._answer()

    async def read_tokenizer(self, key: str, arguments: bytes) -> Result:
        """Let the process read a model's tokenizer; `arguments`: those of `tokenizers.sent`, as a pickled tuple.

        Raises Ended.
        """
        result = await self._ask(("tokenizer", key, arguments))
        self.has_read = key
        return result

    async def teach(self, key: str, model: bytes, tokenizer: bytes) -> Result:
        """Give the process a model and its whole tokenizer, both pickled; b"" where the model contains it.

        Raises Ended.
        """
        result = await self._ask(("model", key, model, b"" if self.has_read == key else tokenizer, sys.path))
        if result.unexpected is None:
            self.models.add(key)
        return result

    def forget(self, key: str) -> None:
        """Let the process drop a model."""
        if key in self.models and self._writer is not None:
            self.models.discard(key)
            self._writer.write(packed(("forget", key)))

    async def work(self, name: str, key: str, arguments: bytes) -> Result:
        """Run one of the functions of `work.WORK` on a model; `arguments` is a pickled tuple. Raises Ended."""
        return await self._ask(("work", name, key, arguments))

    def kill(self) -> None:
        """Kill the process, whatever it is doing."""
        self.is_killed = True
        self._popen.kill()

    def end(self) -> None:
        """Kill the process and wait for its end, where no event loop runs."""
        self.kill()
        self._popen.wait()

    async def close(self) -> int:
        """Kill the process, wait for its end, and return its exit status."""
        self.kill()
        if self._writer is not None:
            self._writer.close()
        return await children.ended(self._popen)

    async def _ask(self, question: object) -> Result:
        assert self._writer is not None  # noqa: S101 - it is ready
        try:
            self._writer.write(packed(question))
            await self._writer.drain()
        except OSError:
            raise Ended from None
        result: Result = await self._answer()
        return result

    async def _answer(self) -> Any:
        assert self._reader is not None  # noqa: S101
        try:
            size = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))[0]
            return pickle.loads(await self._reader.readexactly(size))  # noqa: S301 - our own program
        except (OSError, asyncio.IncompleteReadError):
            raise Ended from None
