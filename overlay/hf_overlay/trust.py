"""Whether what is in a folder can only have been written by this user."""

from __future__ import annotations

import os
import stat


def why_untrusted(path: str) -> str | None:
    """Why others may have written what is in a folder; None when only this user can have, or when it is gone.

    The sticky bit does not help: it keeps others from removing entries, not from adding some.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if status.st_uid != os.geteuid():
        return f"belongs to another user (uid {status.st_uid})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        import shlex  # only for this message

        return f"can be written to by other users (to end that: chmod go-w {shlex.quote(path)})"
    return None
