"""Names for sessions that tests lay out by hand."""

from __future__ import annotations

import os
import time


def new_name() -> str:
    """A session's name that no other test uses at the same time.

    Programs are known to use a session by its name, wherever it lies (see hf_overlay.tree.usage): with a name of
    another test's session, that test's open files would keep this one.
    """
    return f"session-{os.getpid()}-{time.time_ns():x}"
