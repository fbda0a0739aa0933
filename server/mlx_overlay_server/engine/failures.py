"""Errors while models are loaded and run, as clients and the log get them. Pure functions.

MLX has no types for errors of the GPU: all are RuntimeErrors. Their texts come from `mlx/backend/metal`, which quotes
Metal after a colon:

    [METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer…ErrorOutOfMemory).
    [METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBuffer…ErrorTimeout).
    [metal::malloc] Resource limit (499000) exceeded.
    [malloc] Unable to allocate 34359738368 bytes.
"""

from __future__ import annotations

import re

from mlx_overlay_server.errors import Failed, ServerError, Unavailable

_LATE = "[METAL]"
_MEMORY = re.compile(r"OutOfMemory|Insufficient Memory|\[metal::malloc\]|\[malloc\] Unable to allocate|out of memory")
# macOS has several names for a step that took too long. What stands before the bracket may be translated.
_TIME = re.compile(r"ErrorTimeout|ErrorHang|ErrorImpactingInteractivity|Internal Error")

_PATH = re.compile(r"(?<![\w/.])~?/[\w.-]+/")
_REASON_CHARACTERS = 400


class Unreadable(Exception):
    """A tokenizer that another process could not read; the text says why."""

    def __init__(self, kind: str, text: str) -> None:
        """`kind` is the name of the error's type there."""
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return self.text


def is_late(error: BaseException) -> bool:
    """Return whether an error of the GPU may come from work that was begun before, even for another model.

    MLX keeps such an error, raises it at the next use of the GPU, whoever's that is, and forgets it. What was being
    computed at that time may hold anything, without any further error.
    """
    return isinstance(error, RuntimeError) and _LATE in str(error)


def gpu_failure(error: BaseException) -> Unavailable | None:
    """Return the error for clients when the GPU failed, or ran out of memory or time; None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if _MEMORY.search(text):
        return Unavailable(
            "the GPU has no memory left: try again later, with a shorter prompt or fewer requests at once",
            code="gpu_out_of_memory",
        )
    if not is_late(error):
        return None
    if _TIME.search(text):
        return Unavailable(
            "a step took more time than the system gives the GPU: try again, with a shorter prompt if it was long",
            code="gpu_timeout",
        )
    return Unavailable("the GPU failed: try again; the server's log says why", code="gpu_failed")


def no_memory() -> Unavailable:
    """Return the error for a sequence that gets no memory because other programs use it."""
    return Unavailable(
        "other programs leave the machine too little memory for this request: try again later, or end some of them",
        code="insufficient_memory",
    )


def failure(error: Exception) -> ServerError:
    """Return the error for the client of a sequence that an error has ended."""
    if isinstance(error, ServerError):
        return error
    return gpu_failure(error) or Failed(f"the engine failed: {type(error).__name__}")


def load_failure(error: BaseException, folder: str) -> ServerError:
    """Return the error for clients that wait for a model which cannot be loaded."""
    if isinstance(error, ServerError):
        return error
    cause = gpu_failure(error)
    reason = load_reason(error, folder) if cause is None else cause.message
    code = "model_load_failed" if cause is None else cause.code
    return Unavailable(f"the model cannot be loaded: {reason}", code=code)


def load_reason(error: BaseException, folder: str) -> str:
    """Return in one line why a model cannot be loaded, without paths of this machine, for clients."""
    text = " ".join(str(error).replace(f"{folder}/", "").replace(folder, "its folder").split())
    if text and not _PATH.search(text) and len(text) <= _REASON_CHARACTERS:
        return text
    kind = error.kind if isinstance(error, Unreadable) else type(error).__name__
    return f"{kind}; the server's log says why"  # the log has paths of other places than the model's folder


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for the log."""
    return str(error).splitlines()[0] if str(error) else ""
