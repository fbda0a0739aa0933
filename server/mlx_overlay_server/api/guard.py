"""The checks before any route, as ASGI middleware: API key, host name, web page, and size of the body."""

from __future__ import annotations

import ipaddress
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_overlay_server.access import CURRENT, Access
from mlx_overlay_server.api.values import MAX_VALUES, ValueCount
from mlx_overlay_server.errors import Forbidden, InvalidRequest, ServerError, TooLarge
from mlx_overlay_server.turns import LARGE_BYTES, Turns, becomes_large

FORM = "multipart/form-data"
"""The type of bodies in which files come. They hold no JSON, and are read in small steps."""
_OPEN = frozenset({"/health", "/v1/health"})
"""Paths that need no key, because load balancers ask for them."""
_PAGES = frozenset({"/", "/docs"})
_PARTS = "/ui/"
"""Paths of the server's own pages, which can be read without a key, and the beginnings of the paths of their parts."""
_OWN = "/manage/"
"""The beginnings of paths that, without a key, only the server's own page may use, whatever other pages are allowed."""


class Guard:
    """Refuses requests without a key, of foreign web pages or host names, and with too large a body."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        host: str,
        origins: Iterable[str],
        max_body: int,
        refuse: Callable[[Scope, ServerError], Response],
        count: Callable[[str, int], None],
        turns: Turns | None = None,
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Guard an application.

        `access` says who may use it. `host` is the name that the server listens on, `origins` are the web pages that
        may use it, `max_body` is the largest body in bytes. `refuse` encodes an error for its client; `count` is called
        with each answer's route and status; large bodies wait for `turns`; `refresh` brings the settings behind
        `access` up to date.
        """
        self._app = app
        self._access = access
        self._hosts = {"localhost", host.lower(), *names_of_this_machine()}
        self._origins = frozenset(origins)
        self._max_body = max_body
        self._refuse = refuse
        self._count = count
        self._turns = turns or Turns()
        self._refresh = refresh or _nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "HEAD":  # the answer to GET, of which uvicorn leaves out the body
            scope = {**scope, "method": "GET"}
        size = 0
        values = ValueCount()
        is_json = not headers.get("content-type", "").startswith(FORM)
        has_begun = is_refusing = False
        stopped: ServerError | None = None

        async def bounded() -> Message:
            nonlocal size, stopped
            message = await receive()
            body = message.get("body", b"")
            size += len(body)
            if is_json:
                values.feed(body)
            if is_too_much():
                raise self._too_large()
            if (
                is_json
                and size > LARGE_BYTES
                and message["type"] == "http.request"
                and not message.get("more_body", False)
            ):
                try:
                    await becomes_large(self._turns)  # the application first decodes the whole body
                except ServerError as error:  # which the application would answer as a body that it cannot read
                    stopped = error
                    raise
            return message

        def is_too_much() -> bool:
            return size > self._max_body or values.is_too_many

        async def sent(message: Message) -> None:
            nonlocal has_begun
            if (is_too_much() or stopped is not None) and not has_begun and not is_refusing:
                return  # this would answer a body that was cut off
            if message["type"] == "http.response.start":
                has_begun = True
                route = scope.get("route")  # clients can make up any number of paths
                self._count(route.path if route is not None else "other", message["status"])
            await send(message)

        refused: ServerError | None = None
        try:
            await self._refresh()
            self._check(scope, headers)
            await self._app(scope, bounded, sent)
        except ServerError as error:
            refused = error
        except Exception:  # noqa: BLE001 - answered and logged by now; uvicorn would log it again, and close the connection
            return
        refused = self._too_large() if is_too_much() else stopped or refused
        if refused is not None and not has_begun:
            is_refusing = True
            await self._refuse(scope, refused)(scope, receive, sent)

    def _check(self, scope: Scope, headers: Headers) -> None:
        try:
            size = int(headers.get("content-length") or 0)
        except ValueError:
            size = -1
        if size < 0:
            raise InvalidRequest("the Content-Length header must be a number of bytes")
        if size > self._max_body:
            raise self._too_large()
        if (encoding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise InvalidRequest(f"bodies with Content-Encoding: {encoding} are not read; send it as plain JSON")
        if self._access.is_open:
            self._check_browser(headers, is_own=scope["path"].startswith(_OWN))
        elif not _needs_no_key(scope["method"], scope["path"]):
            given = headers.get("x-api-key") or headers.get("authorization", "").partition(" ")[2]
            key = self._access.key(given.encode("latin-1"))  # headers are bytes: compared as they were sent
            CURRENT.set(key)
            if key is not None and key.models and scope["path"].startswith(_OWN):
                raise Forbidden(f"the key {key.name!r} is for some models, and not for managing the server")
            if key is not None and scope["method"] == "POST":
                self._access.count(key)

    def _check_browser(self, headers: Headers, *, is_own: bool) -> None:
        """Raise Forbidden for a request that a web page may have sent, unless that page may use the server.

        Without a key, any web page could use the server through its reader's browser (DNS rebinding). `is_own`: whether
        only the server's own page may send this request.
        """
        host = headers.get("host", "")
        if not self._is_ours(_split(f"//{host}").hostname):
            raise Forbidden(f"requests for host {host!r} are refused without an API key", code="foreign_host")
        origin = headers.get("origin")
        if origin is None or (not is_own and (origin in self._origins or "*" in self._origins)):
            return
        if _split(origin).netloc != host:
            if is_own:
                raise Forbidden(
                    f"pages of {origin} may not manage the server, which has no API key", code="foreign_origin"
                )
            raise Forbidden(
                f"requests from pages of {origin} are refused; allow them with --cors-allow-origins",
                code="foreign_origin",
            )

    def _is_ours(self, name: str | None) -> bool:
        if name is None:
            return False
        name = name.removesuffix(".")
        if name in self._hosts or name in _host_names():  # the network may have renamed the machine since the start
            return True
        try:
            ipaddress.ip_address(name)  # no page can make its host name look like a plain address
        except ValueError:
            return False
        return True

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._max_body} bytes, or has more than {MAX_VALUES} values")


def _needs_no_key(method: str, path: str) -> bool:
    if method == "OPTIONS":  # browsers ask for permission first, without a key
        return True
    return path in _OPEN or (method in ("GET", "HEAD") and (path in _PAGES or path.startswith(_PARTS)))


async def _nothing() -> None:
    """Do nothing."""


def names_of_this_machine(local_name: Callable[[], str] | None = None) -> set[str]:
    """Return this machine's names in its network, in lower case.

    `local_name` returns the name that the machine announces itself by. On macOS that stays what its owner has chosen,
    while the host name is what the network calls it.
    """
    announced = (local_name or _announced_name)().strip().lower()
    return _host_names() | ({announced, f"{announced}.local"} if announced else set())


def _host_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}


def _announced_name() -> str:
    """Return macOS's LocalHostName; empty on other systems, or where it cannot be found out."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/scutil", "--get", "LocalHostName"]
        with suppress(OSError, subprocess.SubprocessError):
            # close_fds=False makes Popen spawn the program instead of forking (see `children`).
            return subprocess.run(command, capture_output=True, text=True, timeout=2, close_fds=False).stdout
    return ""


def _split(url: str) -> SplitResult:
    """Split a URL into its parts, which are empty for a malformed one."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
