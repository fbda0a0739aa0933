"""The errors a request can end in, each with one line that its sender can act on.

They know nothing of dialects: an error from a layer that all dialects share names a field of the shared request
(`field`), and each dialect has a table of its own names for those. What a dialect finds wrong itself, it names as the
client wrote it (`param`).

ServerError
├── InvalidRequest      400  a field asks for something wrong, or for something this server or model cannot do
│   └── PromptTooLong   400  more tokens than the model, or the server's limit, takes
├── Unauthorized        401
├── Forbidden           403  a foreign web page, or a name that is not ours
├── NotFound            404
│   └── UnknownModel    404
├── MethodNotAllowed    405
├── Conflict            409  a model that is busy is to be unloaded
├── Stopped             410  whoever looks after the server has stopped the request
├── TooLarge            413
├── Overloaded          429  the queue is full
├── Failed              500  the engine failed; other requests were not harmed
└── Unavailable         503  not now: a drive that is away, memory, a shutdown
"""

from __future__ import annotations

import re
from typing import Literal

Field = Literal[
    "model",
    "messages",
    "prompts",
    "tools",
    "format",
    "effort",
    "template_kwargs",
    "logit_bias",
    "texts",
    "prompt",
    "query",
    "documents",
    "instruction",
]
"""Fields of `chat.requests` and `encoding.requests` that shared layers complain about."""


_FIELD = re.compile(r"^[a-z_]{1,40}\b", re.IGNORECASE)


class ServerError(Exception):
    """An expected failure of a request."""

    status = 500
    """The HTTP status of the answer."""
    code: str | None = None
    """A stable name for programs, where there is one."""
    is_recorded = False
    """Whether the record of its request says it, and with that the log."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        field: Field | None = None,
        key: str | None = None,
        code: str | None = None,
    ) -> None:
        """Blame a field: one as the client wrote it (`param`), or one of the shared request (`field`).

        `key` is the entry in that field which is wrong, where it is a mapping.
        """
        message = _bounded(message, 1000)
        super().__init__(message)
        self.message = message
        self.param = None if param is None else _bounded(param, 200)
        self.field = field
        self.key = None if key is None else _bounded(key, 200)
        if code is not None:
            self.code = code

    @property
    def reason(self) -> str:
        """Its code, or its status and the field that it blames: for logs, which never quote what clients send."""
        if self.code is not None:
            return self.code
        field = self.field or "".join(_FIELD.findall(self.param or ""))
        return f"{self.status}, {field}" if field else str(self.status)


class InvalidRequest(ServerError):
    """The request asks for something wrong, or for something that this server or model cannot do."""

    status = 400


class PromptTooLong(InvalidRequest):
    """The prompt has more tokens than the model, or the server's limit, takes."""

    code = "context_length_exceeded"


class Unauthorized(ServerError):
    """The request has no key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ServerError):
    """The request comes from a foreign web page or for a foreign host name, or the model is gated."""

    status = 403


class NotFound(ServerError):
    """There is nothing at this address."""

    status = 404


class UnknownModel(NotFound):
    """No model has the requested id."""

    code = "model_not_found"


class MethodNotAllowed(ServerError):
    """The address is known, but not with this HTTP method."""

    status = 405


class Conflict(ServerError):
    """What is asked for does not go together with what goes on."""

    status = 409


class Stopped(ServerError):
    """Whoever looks after the server has stopped the request. Clients do not try again after this status."""

    status = 410
    code = "request_stopped"


class TooLarge(ServerError):
    """The request's body is larger than the server takes."""

    status = 413
    code = "request_too_large"


class Overloaded(ServerError):
    """The queue of requests is full."""

    status = 429
    code = "rate_limit_exceeded"


class Failed(ServerError):
    """The engine or the server itself failed; other requests were not harmed."""

    status = 500
    code = "engine_failed"


class Unavailable(ServerError):
    """Not now: a drive is away, memory is short, or the server is shutting down."""

    status = 503


def _bounded(text: str, size: int) -> str:
    """`text`, cut to `size` characters: messages quote what clients send, which may be megabytes."""
    return text if len(text) <= size else f"{text[: size - 1]}…"
