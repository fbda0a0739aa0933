"""A temporary Hugging Face cache in which your own model folders stand in front of the real cache.

import hf_overlay

with hf_overlay.open_session(["/Volumes/LLMS/models"]) as session:
    session.environment            # the environment for a program to start
    session.models                 # every model that can be loaded
    session.resolve("org/name")    # the folder to load for an id
    session.refresh()              # call it after folders changed
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_overlay.errors import (
    IncompleteModel,
    InvalidModelId,
    ModelNotFound,
    OutOfFiles,
    OverlayError,
    SessionError,
    SourceAway,
    UsageError,
)
from hf_overlay.models import File, Model, Task

if TYPE_CHECKING:
    from hf_overlay.opening import open_session
    from hf_overlay.session import Changes, Session

__all__ = [
    "Changes",
    "File",
    "IncompleteModel",
    "InvalidModelId",
    "Model",
    "ModelNotFound",
    "OutOfFiles",
    "OverlayError",
    "Session",
    "SessionError",
    "SourceAway",
    "Task",
    "UsageError",
    "open_session",
]


def __getattr__(name: str) -> Any:
    """Import sessions on first use: `hf-overlay ls` needs none, and importing them takes half of its start-up time."""
    if name in __all__:
        from hf_overlay import opening, session

        return opening.open_session if name == "open_session" else getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
