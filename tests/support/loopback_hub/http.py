"""HTTP on two ports of this machine: reads requests, sends answers, counts what goes out."""

from __future__ import annotations

import gzip
import hashlib
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.loopback_hub.answers import Answer, Request
from tests.support.loopback_hub.files import BLOCK
from tests.support.processes import SECONDS

if TYPE_CHECKING:
    from tests.support.loopback_hub.hub import LoopbackHub


Host = Literal["hub", "cdn"]
_BODY_KEPT = 64 << 20


def reserved(port: int) -> socket.socket:
    """A socket that has a port of 127.0.0.1, and refuses connections until it listens."""
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound


class Listener(ThreadingHTTPServer):
    """Serves one port until it is stopped."""

    request_queue_size = 1024

    def __init__(self, hub: LoopbackHub, host: Host, bound: socket.socket) -> None:
        # Not HTTPServer's own binding, which asks a name server for the name of the address.
        socketserver.BaseServer.__init__(self, bound.getsockname(), _Handler)
        self.socket = bound
        self.hub = hub
        self.host = host
        self._lock = threading.Lock()
        self._serving: dict[threading.Thread, socket.socket] = {}
        self.server_activate()
        self._accepting = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._accepting.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
        with self._lock:
            self._serving[thread] = request
        thread.start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._serving[threading.current_thread()]

    def stop(self) -> None:
        """Listen no more, and drop all connections."""
        self.shutdown()
        self.server_close()
        self._accepting.join(SECONDS)
        with self._lock:
            serving = list(self._serving.items())
        for thread, connection in serving:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # its client was faster
            thread.join(SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # Clients that leave in the middle are what some tests are about.
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.broke(error)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, sends answers, counts what goes out."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def do_GET(self) -> None:
        hub = self.server.hub
        request = self._request()
        self._counting = hub.record(request)
        try:
            self._read_body(request)
            seconds = hub.faults.amount("hang", request)
            if seconds is not None:
                hub.faults.pause("hang", seconds)
            with self._counting:
                answer = hub.answer(request)
                request.status = answer.status
            self._send(request, answer)
        finally:
            with self._counting:
                request.over = True

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _request(self) -> Request:
        url = urlsplit(self.path)
        host: Literal["hub", "cdn", "outside"] = self.server.host
        path = url.path
        if host == "hub":
            prefix = self.server.hub.prefix
            host, path = ("hub", path.removeprefix(prefix)) if path.startswith(f"{prefix}/") else ("outside", path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(url.query, keep_blank_values=True)
        return Request(self.command, host, path, query, unquote(f"{path}?{url.query}"), headers, time.monotonic())

    def _read_body(self, request: Request) -> None:
        digest = hashlib.sha256()
        kept: list[bytes] = []
        size = 0
        for chunk in self._body_chunks():
            digest.update(chunk)
            size += len(chunk)
            if size <= _BODY_KEPT:
                kept.append(chunk)
        with self._counting:
            request.body_size, request.body_sha256 = size, digest.hexdigest()
            request.body = b"".join(kept) if size <= _BODY_KEPT else b""

    def _body_chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self._read(length)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            chunk = self._read(min(left, BLOCK))
            left -= len(chunk)
            yield chunk

    def _read(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the client left in the middle of its request")
        return data

    def _send(self, request: Request, answer: Answer) -> None:
        hub = self.server.hub
        headers = {"Date": self.date_time_string(), "X-Request-Id": f"Root={request.at}", **answer.headers}
        length, chunks = answer.length, answer.chunks()
        if hub.compress and self._may_compress(answer):
            chunks = _chunked(gzip.compress(b"".join(chunks)))
            length = sum(map(len, chunks))
            headers |= {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked", "Vary": "Accept-Encoding"}
        else:
            headers["Content-Length"] = str(length)
        head = _head(answer.status, headers)
        if request.method == "HEAD":
            self._transmit(request, head, memoryview(b""))
        else:
            self._send_body(request, answer, head, chunks, length)

    def _send_body(
        self, request: Request, answer: Answer, head: bytes, chunks: Iterable[memoryview], length: int
    ) -> None:
        file = answer.file
        cut = None if file is None else self.server.hub.faults.take_cut(request, length)
        finishes = file is not None and answer.stop == file.size and cut is None
        left = length if cut is None else cut
        for piece in chunks if file is None else self._pieces(request, chunks):
            sent = piece[:left]
            left -= len(sent)
            self._transmit(request, head, sent, finishing=finishes and not left)
            head = b""
            if not left:
                break
        if head:
            self._transmit(request, head, memoryview(b""), finishing=finishes)
        self.close_connection |= cut is not None

    def _may_compress(self, answer: Answer) -> bool:
        accepted = "gzip" in self.headers.get("Accept-Encoding", "")
        return accepted and answer.compressible and answer.status == 200 and self.command == "GET"

    def _pieces(self, request: Request, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        """The chunks, in pieces small enough to go out at the speed that is set while they do."""
        faults = self.server.hub.faults
        for chunk in chunks:
            while chunk:
                rate = faults.amount("slow", request)
                size = BLOCK if rate is None else max(1, int(rate / 20))
                yield chunk[:size]
                if rate is not None:
                    faults.pause("slow", size / rate)
                chunk = chunk[size:]

    def _transmit(self, request: Request, head: bytes, body: memoryview, *, finishing: bool = False) -> None:
        """Send, and count what of the body went out.

        Counted under the request's lock and without waiting there: whoever asks after a client has got the last byte
        is told of it.
        """
        data = memoryview(head + body.tobytes()) if head else body
        uncounted = len(head)
        while True:
            with self._counting:
                try:
                    sent = self.connection.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                data = data[sent:]
                request.sent += max(0, sent - uncounted)
                uncounted = max(0, uncounted - sent)
                request.finished |= finishing and not data
            if not data:
                return
            writable = select.poll()
            writable.register(self.connection, select.POLLOUT)
            if not writable.poll(SECONDS * 1000):
                raise ConnectionError("the client does not read")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _chunked(data: bytes) -> list[memoryview]:
    half = len(data) // 2 or len(data)
    parts = [part for part in (data[:half], data[half:]) if part]
    return [memoryview(b"%x\r\n%b\r\n" % (len(part), part)) for part in parts] + [memoryview(b"0\r\n\r\n")]


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
    lines = [f"HTTP/1.1 {status} {phrase}"]
    # Names of files and revisions get into some: what a header cannot hold is replaced.
    lines += [f"{name}: {' '.join(value.splitlines())}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
