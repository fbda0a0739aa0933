"""The requests of commands to a running server, over HTTP."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from hf_overlay import OverlayError, UsageError

from mlx_overlay_server import address
from mlx_overlay_server.settings import API_KEY_VARIABLE, Settings

DEFAULT_URL = f"http://{Settings().host}:{Settings().port}"
_SECONDS = 30.0
_NO_KEY = 401
"""The status of an answer to a request with a missing or a wrong key."""


class Refused(OverlayError):
    """The server refused a request. The message is the server's own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A running server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        # Never through a proxy: the server is on this machine, or was named by its address.
        self._opener = build_opener(ProxyHandler({}))

    def get(self, path: str) -> Any:
        """Return the JSON at a path. Raises Refused, and OverlayError where nothing answers."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that answers a JSON body. Raises as `get`."""
        return self._ask("POST", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = Request(f"{self.url}{path}", body, headers, method=method)  # noqa: S310 - `client` admits http alone
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                return json.loads(answer.read() or b"null")
        except HTTPError as error:
            if error.code == _NO_KEY:
                how = "did not take this API key; set another" if self.api_key else "needs an API key; set it"
                message = f"the server at {self.url} {how} in {API_KEY_VARIABLE}, or give it with --api-key"
            else:
                message = _message(error.read(), error.code)
            raise Refused(message, error.code) from None
        except (URLError, OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise OverlayError(
                f"no server answers at {self.url} ({reason}); start one, or name another with --url"
            ) from None


def client(options: argparse.Namespace) -> Client:
    """Return the server that a command is about. Raises OverlayError where none runs, or where several do."""
    api_key = options.api_key or os.environ.get(API_KEY_VARIABLE) or None
    if options.url is not None:
        try:
            parts = urlsplit(options.url if "//" in options.url else f"http://{options.url}")
            is_address = parts.scheme in ("http", "https") and bool(parts.netloc) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise UsageError(f"{options.url!r} is not the address of a server; give it as {DEFAULT_URL}")
        return Client(f"{parts.scheme}://{parts.netloc}", api_key)
    urls = running()
    if not urls:
        raise OverlayError("no server runs here; start one (mlx-omni-server), or name one with --url")
    if len(urls) > 1 and DEFAULT_URL not in urls:
        raise UsageError(f"several servers run here: {', '.join(urls)}; name one with --url")
    return Client(DEFAULT_URL if len(urls) > 1 else urls[0], api_key)


def running() -> list[str]:
    """Return the URLs of this user's running servers."""
    found: list[str] = []
    # A folder of sessions that cannot be trusted has no server of this user's in it.
    with suppress(OSError, OverlayError):
        found = [each.url for each in address.running(os.environ)]
    return found


def _message(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {status}"
