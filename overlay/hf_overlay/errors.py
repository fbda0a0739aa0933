"""The errors of this package. The text of each is one line that a person can act on.

OverlayError            an expected failure (the command exits with 1)
├── UsageError          the call itself is wrong (the command exits with 2)
│   └── InvalidModelId  an id that could lead out of the folder it is looked up in
├── ModelNotFound       no folder and no cached snapshot has this id
│   ├── SourceAway      the model's folder is on a drive that is not there now
│   └── IncompleteModel the user's folder of this id lacks a part of its weights, or cannot be read
└── SessionError        the tree could not be built or switched
    └── OutOfFiles      no file descriptor is free, so nothing could be looked at
"""

from __future__ import annotations

import errno
import sys

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
"""Error numbers that say something of this process or of the whole system, and nothing of the path to be opened."""


class OverlayError(Exception):
    """Base of all errors of this package; the text says what is wrong, where, and what to do."""


class UsageError(OverlayError):
    """An argument that makes no sense, such as a file as model path or an empty path."""


class InvalidModelId(UsageError):
    """A model id that is an absolute path or has `..`, a backslash, NUL or an empty part in it.

    Raised before anything on the disk is looked at.
    """


class ModelNotFound(OverlayError):
    """No model that can be loaded has this id; the text names each place that was looked at, and why it has none."""

    def __init__(self, text: str, *, near: str | None = None) -> None:
        super().__init__(text)
        self.near = near
        """The id that is spelled most like it, where one is close."""


class SourceAway(ModelNotFound):
    """The model was in a user's folder that has gone away since, as with a drive that was unplugged."""


class IncompleteModel(ModelNotFound):
    """The user's folder of this id lacks a part, or cannot be read, and no other place has the model whole."""

    def __init__(self, text: str, *, problem: str) -> None:
        super().__init__(text)
        self.problem = problem
        """The end of a sentence that begins with the folder's path and says what is wrong with it."""


class SessionError(OverlayError):
    """A session's tree could not be made: no space, no permission, or a volume without symbolic links."""


class OutOfFiles(SessionError):
    """No file descriptor is free. What was known before stays known, because nothing was found out."""


def check_descriptors(error: OSError) -> None:
    """Raise OutOfFiles if an error means that no file descriptor is free; return if it means something else.

    Call it wherever an error is taken for an answer of the disk.
    """
    if error.errno == errno.EMFILE:
        text = (
            "too many open files: this program may open no more; raise its limit (ulimit -n 10240) and start it again"
        )
        raise OutOfFiles(text) from error
    if error.errno == errno.ENFILE:
        raise OutOfFiles("too many open files on this machine; end programs that keep many open") from error


def privacy_advice(error: OSError) -> str | None:
    """Return what to allow, and where, if macOS's privacy settings caused an error; None for any other.

    The text ends a sentence. Privacy settings refuse with EPERM, permissions of files with EACCES.
    """
    advice = (
        "allow it for your terminal, or the program that started this one, under System Settings > "
        "Privacy & Security > Files and Folders, or Full Disk Access"
    )
    return advice if sys.platform == "darwin" and error.errno == errno.EPERM else None
