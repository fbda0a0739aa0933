"""The real Hub, to which the gateway passes on what it does not answer itself."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import truststore
import urllib3
from urllib3.exceptions import HTTPError

from hf_overlay.gateway.exchange import Answer, Headers, Request

CONNECT_SECONDS = 3.0
"""Seconds after which a Hub that accepts no connection is unreachable; the client then falls back to its cache."""
ANSWER_SECONDS = 60.0
"""Seconds of the longest pause within an answer. Clients give up earlier by themselves."""
PIECE_BYTES = 1 << 20
"""The most bytes of a body that are read at once."""
_KEPT_CONNECTIONS = 1000
"""More connections than programs have at once: urllib3 warns of each one that it does not keep. The Hub closes idle
ones.
"""
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_OF_OURS = ("accept-encoding", "user-agent")
"""Headers that urllib3 would add where the program has sent none."""


class Unreachable(Exception):
    """The real Hub did not answer."""


class Upstream:
    """The real Hub at a URL. Several threads may send requests."""

    def __init__(self, url: str, endpoint: str) -> None:
        """`endpoint` is the gateway's URL, through which redirects within the Hub lead. Raises Unreachable."""
        url, self._login = _without_login(url)
        if not re.match(r"https?://(\[[0-9A-Fa-f:.]+\]|[^/:\[\]]+)(:\d+)?(/|$)", url):
            raise Unreachable(f"{url} cannot be reached: HF_ENDPOINT must be a URL such as https://huggingface.co")
        self._url = url
        self._endpoint = endpoint
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=ANSWER_SECONDS)
        kept: dict[str, Any] = {"timeout": timeout, "maxsize": _KEPT_CONNECTIONS, "ssl_context": _trusted()}
        proxy = _proxy(url)
        try:
            self._pool = (
                urllib3.ProxyManager(proxy, proxy_headers=_proxy_login(proxy), **kept)
                if proxy
                else urllib3.PoolManager(**kept)
            )
        except HTTPError as error:  # the error's text may contain the password
            kind = proxy.partition("://")[0] if proxy else ""
            raise Unreachable(f"{url} cannot be reached: the proxy that the environment names is {kind}://…") from error

    def close(self) -> None:
        """Close the connections that are kept for further requests."""
        self._pool.clear()

    def send(self, request: Request, path: str) -> Answer:
        """Send a request to the Hub and return its answer; `path` is what the Hub is asked for. Raises Unreachable."""
        headers = urllib3.HTTPHeaderDict()
        for name, value in _end_to_end(request.headers):
            if name != "host":
                headers.add(name, value)
        if self._login is not None and "authorization" not in headers:
            headers["authorization"] = self._login
        for name in _NOT_OF_OURS:
            if name not in headers:
                headers[name] = urllib3.util.SKIP_HEADER
        has_body = request.header("content-length") is not None or request.header("transfer-encoding") is not None
        url = f"{self._url}{path}{'?' + request.query if request.query else ''}"
        try:
            answer = self._pool.urlopen(
                request.method,
                url,
                redirect=False,
                retries=False,
                body=request.body if has_body else None,
                headers=headers,
                preload_content=False,
                decode_content=False,
            )
        except HTTPError as error:
            raise Unreachable(f"{self._url} cannot be reached ({type(error).__name__})") from error
        if request.method == "HEAD" or answer.status in (204, 304):
            answer.drain_conn()  # there is no body, and the connection is free for the next request
        return Answer(answer.status, self._answer_headers(answer), _pieces(answer), answer.close)

    def _answer_headers(self, answer: urllib3.BaseHTTPResponse) -> Headers:
        headers = list(answer.headers.iteritems())
        return [
            (name, self._led_back(value) if name == "location" else value)
            for name, value in _end_to_end(headers)
            if name != "content-length" or "transfer-encoding" not in answer.headers  # which overrides it
        ]

    def _led_back(self, location: str) -> str:
        """Return where a redirect leads: through the gateway if to the same Hub, else (to a CDN) where it says."""
        base = urlsplit(self._url)
        if location.startswith(f"{self._url}/"):
            return self._endpoint + location[len(self._url) :]
        if location.startswith("/") and not location.startswith("//") and location.startswith(f"{base.path}/"):
            return urlsplit(self._endpoint).path + location[len(base.path) :]
        return location


def _pieces(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Return a body in pieces as they come, still compressed. Raises ConnectionError where it breaks off."""
    try:
        while piece := answer.read1(PIECE_BYTES, decode_content=False):
            yield piece
    except HTTPError as error:
        raise ConnectionError(str(error)) from error


def _end_to_end(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers that a proxy passes on, with names in lower case (RFC 9110, 7.6.1).

    Headers of one connection are left out: the standard ones, and those that a `Connection` header names.
    """
    lowered = [(name.lower(), value) for name, value in headers]
    named = {each.strip().lower() for name, value in lowered if name == "connection" for each in value.split(",")}
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP | named]


# The way to the Hub ------------------------------------------------------------------------------------------------


def _without_login(url: str) -> tuple[str, str | None]:
    """Return a URL without its user name and password, and the header that sends them to the Hub's mirror."""
    match = re.match(r"(https?://)([^/@]*)@(.*)", url)
    if match is None:
        return url, None
    header = urllib3.util.make_headers(basic_auth=unquote(match[2]))["authorization"]
    return match[1] + match[3], header


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment, or macOS's settings, name for a URL; None where it is reached directly."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc) or _is_in(parts.hostname or "", proxies.get("no", "").split(",")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_in(host: str, networks: Iterable[str]) -> bool:
    """Return whether a host, given by its address, is in one of the networks that NO_PROXY lists."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for each in networks:
        try:
            if address in ipaddress.ip_network(each.strip(), strict=False):
                return True
        except ValueError:
            pass  # a name, not an address
    return False


def _proxy_login(proxy: str) -> dict[str, str] | None:
    """Return the header for a proxy whose URL has a user name and a password."""
    login = urllib3.util.parse_url(proxy).auth
    return urllib3.util.make_headers(proxy_basic_auth=unquote(login)) if login else None


def _trusted() -> ssl.SSLContext:
    """Return the trusted certificates: OpenSSL's (SSL_CERT_FILE, SSL_CERT_DIR), or on macOS the system's."""
    paths = ssl.get_default_verify_paths()
    is_told = bool({paths.openssl_cafile_env, paths.openssl_capath_env} & os.environ.keys())
    is_found = paths.cafile or (paths.capath and any(name.endswith(".0") for name in os.listdir(paths.capath)))
    if not is_told and (sys.platform == "darwin" or not is_found):
        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context
