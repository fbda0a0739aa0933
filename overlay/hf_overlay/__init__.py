"""A temporary Hugging Face cache in which your own model folders stand in front of the real cache.

    import subprocess
    import hf_overlay

    with hf_overlay.open_session(["/Volumes/LLMS/models"]) as session:
        for model in session.models:        # every model that can be loaded, one for each id
            print(model.id, model.path)
        session.resolve("org/name")         # the folder to load for an id; raises ModelNotFound
        session.refresh()                   # shows what has changed in the folders since
        subprocess.run(["python", "my_script.py"], env=session.environment, pass_fds=[session.owner_fd])

`open_session` takes the folders and how to treat them, and gives a `Session`. All errors are OverlayErrors, whose text
says in one line what is wrong and what to do. Nothing is ever written to your folders.
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
    """Import sessions on first use. `hf-overlay ls` needs none, and importing them would double its start-up time."""
    if name in __all__:
        from hf_overlay import opening, session

        return opening.open_session if name == "open_session" else getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the API, also those that are imported on first use, for help() and completion."""
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__spec__"]
