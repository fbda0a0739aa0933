"""The routes of the server's own pages. Their files are part of the package, and load nothing from other hosts."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from mlx_overlay_server.api.transport import answer
from mlx_overlay_server.errors import NotFound

FOLDER = "page"
"""The folder in the package that holds the files."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
"""Ending of a file's name -> media type, for all files that are handed out."""
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src 'self' data: blob:",  # blob: for pictures that a chat is about to send
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",  # so that no other site can show the page below buttons of its own
        "require-trusted-types-for 'script'",
        "trusted-types lit-html dompurify",
    ]
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """Return the routes. They need no key: the pages contain no data, and ask for the key themselves."""
    routes = APIRouter(include_in_schema=False)

    # not `async`, so that files are read in a thread
    @routes.get("/")
    @routes.head("/")
    def root(request: Request) -> Response:
        """Return the page to browsers, and the server's name to programs."""
        if "text/html" in request.headers.get("accept", ""):
            response = _file("index.html", request)
        else:
            response = answer({"name": "mlx-omni-server", "docs": "/docs"})
        response.headers["Vary"] = "Accept"
        return response

    @routes.get("/docs")
    @routes.head("/docs")
    def docs(request: Request) -> Response:
        """Return the page that shows `/openapi.json`."""
        return _file("docs.html", request)

    @routes.get("/ui/{name:path}")
    @routes.head("/ui/{name:path}")
    def part(name: str, request: Request) -> Response:
        """Return a script, a style sheet or a picture of the pages."""
        return _file(name, request)

    return routes


def _file(name: str, request: Request) -> Response:
    """Return a file of the pages, or status 304 where the browser has it already. Raises NotFound."""
    media_type = _TYPES.get(name[name.rfind(".") :])
    here = [files("mlx_overlay_server") / FOLDER]
    for part in name.split("/"):  # only names that a listing contains, so that no name leads out of the folder
        here = [each for folder in here if folder.is_dir() for each in folder.iterdir() if each.name == part]
    if media_type is None or not here or not here[0].is_file():
        raise NotFound(f"the server's page has no part {name!r}")
    content = here[0].read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)
