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
    import uvicorn

DEFAULT_UPSTREAM = "https://huggingface.co"
STOP_SECONDS = 10.0
"""The longest that answers under way may take when the gateway is stopped. They are short, since large files come from
a CDN; and launchd kills a service that takes 20 seconds to stop, systemd one that takes 90."""


class Gateway:
    """A Hub on 127.0.0.1, in a thread of its own between `start` and `stop`.

    What answers is imported when the first program connects: it takes longer than all else that a start does, and many
    programs never ask.
    """

    def __init__(self, hub: Hub, upstream: str) -> None:
        self._hub = hub
        self._upstream = upstream.rstrip("/")
        self._prefix = f"/{os.urandom(20).hex()}"
        # Named, or asyncio leaves Nagle's algorithm on: 40 ms for each answer with a body.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._stops, self._stopping = socket.socketpair()
        """The second is closed to end the wait for the first connection."""
        self._cut = threading.Event()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run, name="hub-gateway", daemon=True)

    @property
    def endpoint(self) -> str:
        """The URL for HF_ENDPOINT. The path in it is a secret that keeps other users of the machine out."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}{self._prefix}"

    def start(self) -> None:
        """Listen on a free port; connections wait in its backlog until the thread is ready. Raises OSError."""
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(256)
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, and wait for the answers under way: `STOP_SECONDS` at most, or until `cut`."""
        self._stopping.close()
        deadline = time.monotonic() + STOP_SECONDS
        self._wait_until_ready(deadline)
        if self._server is not None:
            self._server.should_exit = True
            # The server closes the connections that have nothing to answer, and clients that have gone close theirs.
            while self._server.server_state.connections and self._may_wait(deadline):
                self._thread.join(timeout=0.02)
            self._server.force_exit = True
            self._thread.join(timeout=5)
        if not self._thread.is_alive():  # else it closes its sockets itself, as soon as it can
            self._socket.close()

    def cut(self) -> None:
        """Let `stop` wait no longer; what is under way is cut. May be called by a signal handler."""
        self._cut.set()

    def _may_wait(self, deadline: float) -> bool:
        return time.monotonic() < deadline and not self._cut.is_set()

    def _wait_until_ready(self, deadline: float) -> None:
        """Let the server take the first connection, if one has come and what answers it is still being imported."""
        is_late = False
        while self._thread.is_alive() and (self._server is None or not self._server.started):
            if not self._may_wait(deadline):
                return
            is_late = True
            self._thread.join(timeout=0.02)
        if is_late:
            self._thread.join(timeout=0.1)  # it listens, and has not accepted yet

    def _run(self) -> None:
        with self._stops, self._socket:  # closed also when the import fails, or clients would wait for ever
            if self._is_asked():
                self._serve()

    def _is_asked(self) -> bool:
        """Wait for the first connection, which is left in the backlog; False where the gateway is stopped first."""
        events = select.poll()
        for each in (self._socket, self._stops):
            events.register(each, select.POLLIN)
        return self._stops.fileno() not in dict(events.poll())

    def _serve(self) -> None:
        import asyncio

        import uvicorn

        from hf_overlay.gateway.app import App

        if self._cut.is_set():
            return
        app = App(self._hub, self._upstream, self.endpoint)
        config = uvicorn.Config(
            app,
            interface="asgi3",
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            date_header=False,
            access_log=False,  # paths hold the secret
            log_config=None,
            log_level="critical",
            timeout_keep_alive=75,
        )
        server = self._server = uvicorn.Server(config)

        async def serve() -> None:
            try:
                await server.serve(sockets=[self._socket])
            finally:
                await app.close()

        asyncio.run(serve())
