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
"""Paths that need no key: what load balancers ask."""
_PAGES = frozenset({"/", "/docs"})
_PARTS = "/ui/"
"""The server's own pages, which need no key to be read, and what the paths of their parts begin with."""
_OWN = "/manage/"
"""What the paths begin with that, without a key, no page but the server's own may use, whichever others are allowed."""


class Guard:
    """Refuses strangers, foreign web pages and bodies that are too large."""

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
        """Guard an application, which `access` says who may use.

        `host` is the name that the server listens on, `origins` the web pages that may use it, `max_body` the bytes
        that a body may have. `refuse` encodes an error for its client; `count` gets each answer's route and status;
        `turns` are what large bodies wait for; `refresh` brings what `access` goes by up to date.
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
        size = 0
        values = ValueCount()
        is_json = not headers.get("content-type", "").startswith(FORM)
        has_begun = is_refusing = False

        async def bounded() -> Message:
            nonlocal size
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
                await becomes_large(self._turns)  # what the application does first is to decode all of it
            return message

        def is_too_much() -> bool:
            return size > self._max_body or values.is_too_many

        async def sent(message: Message) -> None:
            nonlocal has_begun
            if is_too_much() and not has_begun and not is_refusing:
                return  # what the application makes of a body that was cut off
            if message["type"] == "http.response.start":
                has_begun = True
                route = scope.get("route")  # set by the router: not the path, which anybody makes up
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
        if is_too_much():
            refused = self._too_large()
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
        if self._access.is_open:
            self._check_browser(headers, is_own=scope["path"].startswith(_OWN))
        elif not _needs_no_key(scope["method"], scope["path"]):
            given = headers.get("x-api-key") or headers.get("authorization", "").partition(" ")[2]
            key = self._access.key(given.encode("latin-1"))  # as it was sent: headers are bytes
            CURRENT.set(key)
            if key is not None and key.models and scope["path"].startswith(_OWN):
                raise Forbidden(f"the key {key.name!r} is for some models, and not for managing the server")
            if key is not None and scope["method"] == "POST":
                self._access.count(key)

    def _check_browser(self, headers: Headers, *, is_own: bool) -> None:
        """Without a key, a web page anywhere could use the server through its reader's browser (DNS rebinding).

        `is_own`: whether only the server's own page may ask, also where others may use the server.
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
        if name in self._hosts or name in _host_names():  # which a network may have changed since the start
            return True
        try:
            ipaddress.ip_address(name)  # a page's name cannot be made to look like a plain address
        except ValueError:
            return False
        return True

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than {self._max_body} bytes, or has more than {MAX_VALUES} values")


def _needs_no_key(method: str, path: str) -> bool:
    if method == "OPTIONS":  # browsers ask beforehand without a key
        return True
    return path in _OPEN or (method in ("GET", "HEAD") and (path in _PAGES or path.startswith(_PARTS)))


async def _nothing() -> None:
    """Do nothing."""


def names_of_this_machine(local_name: Callable[[], str] | None = None) -> set[str]:
    """Return the names that this machine has in its network, in lower case.

    `local_name` returns the name that it announces there, which on macOS stays what its owner has chosen, while the
    host name is what the network calls it.
    """
    announced = (local_name or _announced_name)().strip().lower()
    return _host_names() | ({announced, f"{announced}.local"} if announced else set())


def _host_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}


def _announced_name() -> str:
    """Return LocalHostName on macOS; empty where there is none, or it cannot be found out."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/scutil", "--get", "LocalHostName"]
        with suppress(OSError, subprocess.SubprocessError):
            # Without closing descriptors, so that it is spawned and not forked (see `children`).
            return subprocess.run(command, capture_output=True, text=True, timeout=2, close_fds=False).stdout
    return ""


def _split(url: str) -> SplitResult:
    """Split a URL into its parts, which are empty if it is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
