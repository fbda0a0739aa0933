"""Routes that are added to an application when they are first asked for, because making them would delay the start."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send


class Late:
    """An application some of whose routes are added before the first request that may be for them."""

    def __init__(self, app: ASGIApp, paths: tuple[str, ...], complete: Callable[[], None]) -> None:
        """`complete` adds the routes.

        It is called once, before the first request whose path begins with one of `paths`.
        """
        self._app = app
        self._paths = paths
        self._complete: Callable[[], None] | None = complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve as an ASGI application."""
        if self._complete is not None and scope["type"] == "http" and scope["path"].startswith(self._paths):
            complete, self._complete = self._complete, None
            complete()
        await self._app(scope, receive, send)
