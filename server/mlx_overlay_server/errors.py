"""What a request can meet, in one line its sender can act on. Each dialect gives it its own shape.

ServerError
├── InvalidRequest      400  a field asks for something wrong, or for something this server or model cannot do
│   └── PromptTooLong   400  more tokens than the model, or the server's limit, takes
├── Unauthorized        401
├── Forbidden           403  a foreign web page, or a name that is not ours
├── NotFound            404
│   └── UnknownModel    404
├── MethodNotAllowed    405
├── TooLarge            413
├── Overloaded          429  the queue is full
├── Failed              500  the engine failed; other requests were not harmed
└── Unavailable         503  not now: a drive that is away, memory, a shutdown
"""

from __future__ import annotations


class ServerError(Exception):
    """An expected failure; `param` names the request's field, where one is to blame."""

    status = 500
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        message = _bounded(message, 1000)
        super().__init__(message)
        self.message = message
        self.param = None if param is None else _bounded(param, 200)
        if code is not None:
            self.code = code


class InvalidRequest(ServerError):
    status = 400


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(ServerError):
    status = 401
    code = "invalid_api_key"


class Forbidden(ServerError):
    status = 403


class NotFound(ServerError):
    status = 404


class UnknownModel(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ServerError):
    status = 405


class TooLarge(ServerError):
    status = 413
    code = "request_too_large"


class Overloaded(ServerError):
    status = 429
    code = "rate_limit_exceeded"


class Failed(ServerError):
    status = 500
    code = "engine_failed"


class Unavailable(ServerError):
    status = 503


def _bounded(text: str, size: int) -> str:
    """What a client sent is quoted, and may be megabytes."""
    return text if len(text) <= size else f"{text[: size - 1]}…"
