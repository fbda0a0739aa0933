"""Headers of one connection stay on it: neither what a client nor what the Hub says to the gateway is passed on."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import pytest
from hf_overlay.gateway.server import Gateway

_HOP_BY_HOP = {
    "Keep-Alive": "timeout=5",
    "Proxy-Authenticate": "Basic",
    "Proxy-Authorization": "Basic eDp5",
    "TE": "trailers",
    "Trailer": "X-Checksum",
    "Upgrade": "h2c",
    "X-Next-Hop": "named in Connection",
    "X-Other-Hop": "named in Connection in capitals",
}
_CONNECTION = "keep-alive, x-next-hop,X-OTHER-HOP"
_END_TO_END = {"ETag": '"abc"', "X-Repo-Commit": "a" * 40, "X-Linked-Size": "5", "Link": "<x>; rel=next"}
_BODY = b"hello"


class _Hub(BaseHTTPRequestHandler):
    """Answers with every kind of header; `/chunked` in chunks."""

    protocol_version = "HTTP/1.1"
    seen: dict[str, str]

    def do_GET(self) -> None:
        type(self).seen = {name.lower(): value for name, value in self.headers.items()}
        self.send_response(200)
        for name, value in (*_HOP_BY_HOP.items(), *_END_TO_END.items()):
            self.send_header(name, value)
        is_chunked = self.path.endswith("/chunked")
        self.send_header(*(("Transfer-Encoding", "chunked") if is_chunked else ("Content-Length", str(len(_BODY)))))
        self.send_header("Connection", _CONNECTION)
        self.end_headers()
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(_BODY), _BODY) if is_chunked else _BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _NoModels:
    """A session in which every id is the Hub's to answer."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        session: Any = _NoModels()
        made = Gateway(session, f"http://127.0.0.1:{server.server_address[1]}")
        made.start()
        try:
            yield made
        finally:
            made.stop()
            server.shutdown()


def _ask(gateway: Gateway, path: str) -> tuple[dict[str, str], bytes]:
    """The headers (small letters) and the body that a client is given."""
    url = urlsplit(gateway.endpoint)
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    try:
        headers = {**_HOP_BY_HOP, "Connection": _CONNECTION, "Authorization": "Bearer x", "X-Own": "1"}
        connection.request("GET", url.path + path, headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200
        return {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/api/whoami-v2", "/org/m/resolve/main/config.json", "/org/m/resolve/main/chunked"])
def test_what_the_hub_says_of_its_connection_is_not_said_of_the_client_s(path: str, gateway: Gateway) -> None:
    headers, body = _ask(gateway, path)
    assert body == _BODY, "the body is framed for another connection"
    assert not {name.lower() for name in _HOP_BY_HOP} & headers.keys()
    assert headers.items() >= {name.lower(): value for name, value in _END_TO_END.items()}.items()
    assert headers.get("connection", "keep-alive") == "keep-alive"


def test_what_a_client_says_of_its_connection_is_not_said_to_the_hub(gateway: Gateway) -> None:
    _ask(gateway, "/api/whoami-v2")
    assert not {name.lower() for name in _HOP_BY_HOP} & _Hub.seen.keys()
    assert (_Hub.seen["authorization"], _Hub.seen["x-own"]) == ("Bearer x", "1")
    assert _Hub.seen["host"].startswith("127.0.0.1:"), "the Hub's own name, and none of the gateway's"
    assert gateway.endpoint not in str(_Hub.seen), "the gateway's secret"
