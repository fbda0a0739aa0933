"""One program's connection to the gateway: reads its requests and writes the answers, in a thread of its own.

h11 parses requests and frames answers, and makes sure that no answer ends before its announced length. The bytes of a
body go from socket to socket in pieces of up to a megabyte, which h11 does not copy.
"""

from __future__ import annotations

import http.client
import select
import socket
import struct
from collections.abc import Callable, Iterator

import h11

from hf_overlay.gateway.exchange import Answer, Request, whole

READ_SECONDS = 75
"""Seconds that a program may be silent between two requests, or within one."""
_HEAD_BYTES = 1 << 16
"""The most bytes of a request's head."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Connection:
    """Answers the requests that come in on a socket, one after the other."""

    def __init__(self, program: socket.socket, ending: socket.socket, respond: Callable[[Request], Answer]) -> None:
        """`ending` becomes readable when the gateway is stopped. Raises OSError."""
        program.setblocking(True)
        program.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._program = program
        self._ending = ending
        self._respond = respond
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)

    def serve(self) -> None:
        """Answer requests until the program hangs up; once the gateway is stopped, only those that came before."""
        try:
            while self._is_asked():
                request = self._read_head()
                if request is None:
                    break
                self._answer(request)
                if not self._is_ready_for_another():
                    break
        except h11.RemoteProtocolError as error:
            self._refuse(error)
        except (OSError, h11.LocalProtocolError):
            pass  # the program has hung up, or an answer's body broke off
        finally:
            self._close()

    @property
    def has_left(self) -> bool:
        """Whether the program has hung up. Any thread may ask."""
        try:
            return self._program.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def cut(self) -> None:
        """Hang up, whatever is under way. Any thread may call this."""
        try:
            self._program.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the program has hung up itself

    # Reading ---------------------------------------------------------------------------------------------------

    def _is_asked(self) -> bool:
        """Wait for the next request, and return False when no more comes."""
        if self._http.trailing_data[0]:  # it came together with the previous one
            return True
        return self._program in _readable([self._program, self._ending], READ_SECONDS)

    @property
    def _is_ending(self) -> bool:
        return bool(_readable([self._ending], 0))

    def _next_event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if not _readable([self._program], READ_SECONDS):
                raise TimeoutError("the program sends nothing more")
            self._http.receive_data(self._program.recv(_HEAD_BYTES))
        return event

    def _read_head(self) -> Request | None:
        """Return the next request; None when the program has hung up."""
        event = self._next_event()
        if not isinstance(event, h11.Request):
            return None
        headers = [(name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers]
        return Request(event.method.decode("ascii"), event.target.decode("ascii"), headers, self._read_body())

    def _read_body(self) -> Iterator[bytes]:
        if self._http.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))
        while isinstance(event := self._next_event(), h11.Data):
            yield bytes(event.data)

    # Writing ---------------------------------------------------------------------------------------------------

    def _answer(self, request: Request) -> None:
        answer = self._respond(request)
        try:
            self._write(answer, has_body=request.method != "HEAD" and answer.status not in (204, 304))
        finally:
            answer.close()

    def _write(self, answer: Answer, *, has_body: bool) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
        if self._is_ending:
            headers.append((b"Connection", b"close"))
        reason = http.client.responses.get(answer.status, "").encode("ascii")
        head = h11.Response(status_code=answer.status, headers=headers, reason=reason)
        if isinstance(answer.body, bytes):
            self._send(head, *([h11.Data(data=answer.body)] if has_body else []), h11.EndOfMessage())
            return
        self._send(head)
        for piece in answer.body if has_body else ():
            self._send(h11.Data(data=piece))
        self._send(h11.EndOfMessage())

    def _send(self, *events: h11.Event) -> None:
        pieces = [piece for event in events for piece in self._http.send_with_data_passthrough(event) or () if piece]
        if pieces:
            self._program.sendall(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Answer something that is not HTTP, if that is still possible."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        try:
            self._write(whole(error.error_status_hint, str(error).encode(), "text/plain"), has_body=True)
        except (OSError, h11.LocalProtocolError):
            pass  # the program has hung up

    # Between two answers, and at the end ------------------------------------------------------------------------

    def _is_ready_for_another(self) -> bool:
        """Read the rest of a request, and return whether another one may follow on this connection."""
        if self._http.their_state is h11.SEND_BODY and not self._http.they_are_waiting_for_100_continue:
            while isinstance(self._next_event(), h11.Data):
                pass  # otherwise, closing the connection could discard the answer before the program has read it
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def _close(self) -> None:
        is_in_the_middle = self._http.our_state not in (h11.IDLE, h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        if is_in_the_middle and self._http.their_http_version == b"1.0":
            # the end of the connection is the end of such an answer, and a program could not tell whether it is whole
            self._program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._program.close()


def _readable(sockets: list[socket.socket], seconds: float) -> list[socket.socket]:
    """Return the sockets that have something to read, or have ended; wait for the first one."""
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLIN)
    found = {number for number, _ in poll.poll(1000 * seconds)}
    return [each for each in sockets if each.fileno() in found]
