"""The gateway's answers: about a user's model its own, about everything else those of the real Hub.

Apart from `server`, which starts without the libraries that this needs.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hf_overlay import hfcache
from hf_overlay.gateway import routes
from hf_overlay.gateway.hub import Hub, Unavailable
from hf_overlay.gateway.routes import Target
from hf_overlay.hfcache import LinkedRepo

if TYPE_CHECKING:
    import httpx2

CONNECT_SECONDS = 3.0
"""An upstream that accepts no connection in this time is unreachable; the client falls back to its cache."""
ANSWER_SECONDS = 60.0
"""The longest pause within an answer; clients give up earlier by themselves."""

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


class App:
    """The ASGI application of one gateway."""

    def __init__(self, hub: Hub, upstream: str, endpoint: str) -> None:
        """`upstream` is the real Hub's URL, `endpoint` the gateway's own, whose path is a secret."""
        self._hub = hub
        self._upstream = upstream
        self._endpoint = endpoint
        self._prefix = urlsplit(endpoint).path
        self._client: httpx2.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections to the real Hub."""
        if self._client is not None:
            await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        response = await self._respond(request)
        await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
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
        if isinstance(found, LinkedRepo) and target is not None and target.precedes_download(method):
            self._hub.expect_download(hfcache.repo_folder(found.model.id, found.model.kind))
        return target, found

    async def _pass_on(self, request: Request, path: str, target: Target | None) -> Response:
        import httpx2  # not for answers about the user's models

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
            url = self._endpoint + url[len(self._upstream) :]
        elif url.startswith("/") and not url.startswith("//") and url.startswith(f"{base.path}/"):
            url = self._prefix + url[len(base.path) :]
        return url.encode("latin-1")


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers that a proxy passes on, names in small letters (RFC 9110, 7.6.1): not those of one connection, which
    are the ones of old and those that a `Connection` header names."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {each.strip().lower() for name, value in lowered if name == b"connection" for each in value.split(b",")}
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP | named]
