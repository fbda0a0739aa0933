"""Whether the real cache can keep what a program downloads, and if not, why and what to do. Reads only."""

import os
import re
from typing import Literal, NamedTuple

from hf_overlay.errors import OUT_OF_FILES, privacy_advice

_DRIVE = r"/(?:Volumes|media/[^/]+|run/media/[^/]+)/[^/]+"
"""Where systems mount the drives that a person plugs in."""


class Problem(NamedTuple):
    """Why downloads cannot be kept in the real cache."""

    kind: Literal["away", "read-only", "unusable"]
    text: str
    """The end of a sentence that begins with the cache's path."""
    advice: str


def problem(hub: str) -> Problem | None:
    """Return why the real cache `hub` cannot keep a download; None when it can, or does not exist yet.

    Raises OSError when no file descriptor is free.
    """
    drive = re.match(_DRIVE, hub)
    if drive is not None and not os.path.isdir(drive[0]):
        return _away(f"is on {drive[0]}, which is not there")
    folder = hub
    while True:
        try:
            with os.scandir(folder):
                break
        except FileNotFoundError:
            if os.path.islink(folder):
                link = "is" if folder == hub else f"is below {folder},"
                return _away(f"{link} a link to {os.readlink(folder)}, which is not there")
            folder = os.path.dirname(folder)
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                raise
            where = "cannot be read" if folder == hub else f"is not there, and {folder} cannot be read"
            advice = privacy_advice(error) or "correct that, or HF_HUB_CACHE or HF_HOME"
            return Problem("unusable", f"{where}: {error.strerror}", advice)
    if not os.access(folder, os.W_OK | os.X_OK) or os.statvfs(folder).f_flag & os.ST_RDONLY:
        text = "is read-only" if folder == hub else f"is not there, and cannot be made: {folder} is read-only"
        return Problem("read-only", text, "make it writable")
    return None


def _away(text: str) -> Problem:
    return Problem("away", text, "connect that drive, or correct the link, HF_HUB_CACHE or HF_HOME")
