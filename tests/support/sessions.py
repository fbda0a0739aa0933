"""Names for sessions that tests lay out by hand."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping


def new_name() -> str:
    """A session's name that no other test uses at the same time.

    Programs are known to use a session by its name, wherever it lies (see hf_overlay.tree.usage): with a name of
    another test's session, that test's open files would keep this one.
    """
    return f"session-{os.getpid()}-{time.time_ns():x}"


def unannounced() -> Mapping[str, str]:
    """An environment for a session in which programs write without a word: it shares no repos with others."""
    return {**os.environ, "HF_HUB_OFFLINE": "0"}
