"""The user's model folders in front of the real Hugging Face cache, for programs that know only the latter.

import overlay

with overlay.open_session(["/Volumes/LLMS/models"]) as session:
    session.environment            # for a program to start
    session.models                 # what can be loaded
    session.resolve("org/name")    # the folder to load
    session.refresh()              # after folders changed
"""

from overlay.errors import InvalidModelId, ModelNotFound, OverlayError, SessionError, SourceAway, UsageError
from overlay.models import File, Model
from overlay.session import Changes, Session, open_session

__all__ = [
    "Changes",
    "File",
    "InvalidModelId",
    "Model",
    "ModelNotFound",
    "OverlayError",
    "Session",
    "SessionError",
    "SourceAway",
    "UsageError",
    "open_session",
]
