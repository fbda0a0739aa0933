"""Routes that an application gets when they are first asked for, since making them takes a start more time."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send


class Late:
    """An application that is completed by the first request which may be for the part that is missing."""

    def __init__(self, app: ASGIApp, paths: tuple[str, ...], complete: Callable[[], None]) -> None:
        """`complete` is called once, before the first request whose path begins with one of `paths`."""
        self._app = app
        self._paths = paths
        self._complete: Callable[[], None] | None = complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        if self._complete is not None and scope["type"] == "http" and scope["path"].startswith(self._paths):
            complete, self._complete = self._complete, None
            complete()
        await self._app(scope, receive, send)
