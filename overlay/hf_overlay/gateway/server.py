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

import hmac
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hf_overlay.gateway import routes
from hf_overlay.gateway.hub import Hub, Unavailable
from hf_overlay.gateway.routes import Target
from hf_overlay.hfcache import LinkedRepo

if TYPE_CHECKING:
    import httpx2
    from starlette.requests import Request
    from starlette.responses import Response

DEFAULT_UPSTREAM = "https://huggingface.co"
CONNECT_SECONDS = 3.0
"""An upstream that accepts no connection in this time is unreachable; the client falls back to its cache."""
ANSWER_SECONDS = 60.0
"""The longest pause within an answer; clients give up earlier by themselves."""
STOP_SECONDS = 10.0
"""The longest that answers under way may take when the gateway is stopped. They are short, since large files come from
a CDN; and launchd kills a service that takes 20 seconds to stop, systemd one that takes 90."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OF_A_GATEWAY = re.compile(r"/[0-9a-f]{40}$")
_ENDED = "the overlay that this program was started in has ended; start it again in one that is open (hf-overlay env)"
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class Gateway:
    """A Hub on 127.0.0.1, in a thread of its own between `start` and `stop`."""

    def __init__(self, hub: Hub, upstream: str) -> None:
        self._hub = hub
        self._upstream = upstream.rstrip("/")
        self._prefix = f"/{os.urandom(20).hex()}"
        # Named, or asyncio leaves Nagle's algorithm on: 40 ms for each answer with a body.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._client: httpx2.AsyncClient | None = None
        self._stop = threading.Event()
        self._cut = threading.Event()
        self._server: Any = None
        self._thread = threading.Thread(target=self._serve, name="hub-gateway", daemon=True)

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
        self._stop.set()
        if self._server is not None:
            self._server.should_exit = True
            deadline = time.monotonic() + STOP_SECONDS
            # The server closes the connections that have nothing to answer, and clients that have gone close theirs.
            while self._server.server_state.connections and time.monotonic() < deadline and not self._cut.is_set():
                self._thread.join(timeout=0.02)
            self._server.force_exit = True
            self._thread.join(timeout=5)
        self._socket.close()

    def cut(self) -> None:
        """Let `stop` wait no longer; what is under way is cut. May be called by a signal handler."""
        self._cut.set()

    def _serve(self) -> None:
        # Imported in this thread, since it takes a fifth of a second, in which the program is starting as well.
        import asyncio

        import uvicorn

        config = uvicorn.Config(
            self._app,
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
        self._server = uvicorn.Server(config)
        if not self._stop.is_set():
            asyncio.run(self._live())

    async def _live(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            if self._client is not None:
                await self._client.aclose()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.requests import Request

        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = await self._respond(request)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        import asyncio

        path: str = request.scope["raw_path"].decode("ascii").partition("?")[0]
        prefix, path = path[: len(self._prefix)], path[len(self._prefix) :]
        if not hmac.compare_digest(prefix, self._prefix) or not path.startswith("/"):
            if _OF_A_GATEWAY.match(prefix):  # whose port this one has got
                return routes.error(404, "RepoNotFound", _ENDED)
            return routes.error(404, "EntryNotFound", "no such page")
        # In threads, as all that looks at a disk: one that is slow, or hangs, keeps no other request waiting.
        target, found = await asyncio.to_thread(self._find, path, request.method)
        if target is None or found is None:
            return await self._pass_on(request, path, target)
        if isinstance(found, Unavailable):
            return routes.not_now(target, found.message, has_copy=found.has_copy)

        async def ask(root: str, function: Callable[[], Any]) -> Any:
            return await asyncio.to_thread(self._hub.ask, root, function)

        return await routes.answer(request, target, found.model, found.commit, ask)

    def _find(self, path: str, method: str) -> tuple[Target | None, LinkedRepo | Unavailable | None]:
        """The repo that a request path names, and the user's model that answers for it, or why nobody may."""
        target = routes.parse(path, lambda model_id: self._hub.refresh_and_find(model_id) is not None)
        found = self._hub.refresh_and_find(target.repo_id, target.kind) if target is not None else None
        if found is None and target is not None and target.precedes_download(method):
            found = self._hub.refuse_download(target.repo_id, target.folder)
        return target, found

    async def _pass_on(self, request: Request, path: str, target: Target | None) -> Response:
        import asyncio

        import httpx2

        if self._client is None:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
            timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
            self._client = httpx2.AsyncClient(limits=limits, timeout=timeout, follow_redirects=False)
        query = request.scope["query_string"].decode("ascii")
        headers = [(name, value) for name, value in _end_to_end(request.headers.raw) if name != b"host"]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        # Not `client.build_request`, which would add headers that the program did not send.
        passed = httpx2.Request(
            request.method,
            f"{self._upstream}{path}{'?' + query if query else ''}",
            headers=headers,
            content=request.stream() if has_body else None,
        )
        try:
            answer = await self._client.send(passed, stream=True)
        except httpx2.TransportError as error:
            return routes.error(504, "", f"{self._upstream} cannot be reached ({type(error).__name__})")
        # A client also writes down in its cache which files a repo lacks.
        is_there = answer.status_code < 400 or "x-repo-commit" in answer.headers
        if target is not None and target.precedes_download(request.method) and is_there:
            await asyncio.to_thread(self._hub.expect_download, target.folder)
        return self._relay(answer)

    def _relay(self, answer: httpx2.Response) -> Response:
        from starlette.background import BackgroundTask
        from starlette.responses import StreamingResponse

        async def body() -> AsyncIterator[bytes]:
            async for chunk in answer.aiter_raw():
                yield chunk

        response = StreamingResponse(body(), status_code=answer.status_code, background=BackgroundTask(answer.aclose))
        response.raw_headers = [
            (name, self._led_back(value) if name == b"location" else value)
            for name, value in _end_to_end(answer.headers.raw)
        ]
        return response

    def _led_back(self, location: bytes) -> bytes:
        """Where a redirect should lead: through the gateway again if to the same Hub, else (a CDN) as it is."""
        url = location.decode("latin-1")
        base = urlsplit(self._upstream)
        if url.startswith(f"{self._upstream}/"):
            url = self.endpoint + url[len(self._upstream) :]
        elif url.startswith("/") and not url.startswith("//") and url.startswith(f"{base.path}/"):
            url = self._prefix + url[len(base.path) :]
        return url.encode("latin-1")


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that a proxy passes on, names in small letters (RFC 9110, 7.6.1): not those of one connection, which
    are the ones of old and those that a `Connection` header names."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {each.strip().lower() for name, value in lowered if name == b"connection" for each in value.split(b",")}
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP | named]
