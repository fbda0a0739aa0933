"""The Hub as a program in an overlay sees it: answers for the user's own models, everything else passed on.

`mlx_lm.load("org/m")` asks the Hub for the newest commit before it looks at any cache. Only an answer to that question
keeps the user's folder in front with the network up. So programs get `HF_ENDPOINT=http://127.0.0.1:PORT/SECRET`:

- a model the user's folder provides *is* on this Hub, with the one commit the tree holds; no request about it leaves
  the machine;
- one whose drive is away is not downloaded again: the answer names the drive, or sends the client to its cache;
- all else goes to the real Hub and back unchanged, in a stream. Before a client learns that a repo exists, the real
  cache's folder for it is made and linked into the tree, so that the download lands there.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

from hf_overlay.gateway.hub import Hub

if TYPE_CHECKING:
    from hf_overlay.gateway.app import App
    from hf_overlay.gateway.connection import Connection

DEFAULT_UPSTREAM = "https://huggingface.co"
STOP_SECONDS = 10.0
"""Seconds that answers under way may take when the gateway is stopped.

They are short, since large files come from a CDN. launchd kills a service that takes 20 seconds to stop, systemd one
that takes 90.
"""
_CUT_SECONDS = 1.0
"""Seconds to wait for the end of connections that were cut."""


class Gateway:
    """A Hub on 127.0.0.1 between `start` and `stop`: one thread listens, and one more answers each connection.

    The modules that answer are imported when the first program connects. That takes longer than the rest of a start,
    and many programs never ask.
    """

    def __init__(self, hub: Hub, upstream: str) -> None:
        self._hub = hub
        self._upstream = upstream.rstrip("/")
        self._prefix = f"/{os.urandom(20).hex()}"
        self._socket = socket.socket()
        self._ending, self._stopping = socket.socketpair()
        """Closing the second stops the gateway: it makes the first one readable."""
        self._cut = threading.Event()
        self._app: App | None = None
        self._connections: set[Connection] = set()
        self._is_listening = False
        self._thread = threading.Thread(target=self._run, name="hub-gateway", daemon=True)

    @property
    def endpoint(self) -> str:
        """The URL for HF_ENDPOINT. Its path is a secret, which keeps out other users of the machine."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}{self._prefix}"

    def start(self) -> None:
        """Listen on a free port. Connections wait until the thread is ready. Raises OSError."""
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(256)
        self._socket.setblocking(False)  # otherwise, a program that hangs up at once could block the thread in `accept`
        self._is_listening = True
        self._thread.start()

    def stop(self) -> None:
        """Accept no more requests, and wait for answers under way: for `STOP_SECONDS` at most, or until `cut`."""
        self._stopping.close()
        deadline = time.monotonic() + STOP_SECONDS
        while self._is_busy() and time.monotonic() < deadline and not self._cut.is_set():
            if self._is_listening:
                self._thread.join(timeout=0.02)
            else:
                self._cut.wait(0.005)
        for each in list(self._connections):
            each.cut()
        deadline = time.monotonic() + _CUT_SECONDS
        while (self._connections or self._is_listening) and time.monotonic() < deadline:
            time.sleep(0.005)

    def cut(self) -> None:
        """Make `stop` wait no longer, and cut what is under way. A signal handler may call this."""
        self._cut.set()

    def _is_busy(self) -> bool:
        """Return whether a connection waits to be accepted or answered, and its program has not hung up."""
        return self._is_listening or not all(each.has_left for each in list(self._connections))

    def _run(self) -> None:
        try:
            with self._socket:  # closed even if the import fails, or clients would wait for ever
                if self._socket in self._wait():
                    self._serve()
        finally:
            self._is_listening = False
            self._close_what_nobody_uses()

    def _wait(self) -> list[socket.socket]:
        """Wait for a connection, which stays in the backlog, or until the gateway is stopped; return the connection."""
        events = select.poll()
        for each in (self._socket, self._ending):
            events.register(each, select.POLLIN)
        found = dict(events.poll())
        return [each for each in (self._socket, self._ending) if each.fileno() in found]

    def _serve(self) -> None:
        """Accept connections until the gateway is stopped, and then only those that have come by then."""
        from hf_overlay.gateway.app import App

        app = self._app = App(self._hub, self._upstream, self.endpoint)
        while not self._cut.is_set():
            came = self._wait()
            if self._socket in came and self._accept(app):
                continue
            if self._ending in came:
                break

    def _accept(self, app: App) -> bool:
        """Accept a connection and answer it in a thread of its own; return False when that is impossible for now."""
        from hf_overlay.gateway.connection import Connection

        try:
            program, _ = self._socket.accept()
        except OSError:  # no descriptor is free, or the program has hung up
            time.sleep(0.02)
            return False
        try:
            connection = Connection(program, self._ending, app.respond)
        except OSError:  # the program has hung up since
            program.close()
            return True
        thread = threading.Thread(target=self._answer, args=(connection,), name="hub-gateway-answer", daemon=True)
        self._connections.add(connection)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left: the program is refused, and may try again
            self._connections.discard(connection)
            program.close()
        return True

    def _answer(self, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            self._connections.discard(connection)
            self._close_what_nobody_uses()

    def _close_what_nobody_uses(self) -> None:
        """Close the connections to the Hub, and the sockets that tell threads to end, once no connection is left."""
        if not self._connections and not self._is_listening:
            self._ending.close()
            if self._app is not None:
                self._app.close()
