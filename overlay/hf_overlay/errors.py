"""What can go wrong, in one line a person can act on.

OverlayError            expected failure (the command exits 1)
├── UsageError          the call itself is wrong (the command exits 2)
│   └── InvalidModelId  an id that could leave the folder it is looked up in
├── ModelNotFound       no folder and no cached snapshot answers to that id
│   └── SourceAway      the model's folder is on a drive that is not there now
└── SessionError        the tree could not be built or switched
"""


class OverlayError(Exception):
    """Base of every error this package raises on purpose; its text says what, where and what to do."""


class UsageError(OverlayError):
    """The caller asked for something that cannot be meant: a file as model path, an empty path."""


class InvalidModelId(UsageError):
    """An id with an absolute path, `..`, a backslash, NUL or an empty part; refused before any disk access."""


class ModelNotFound(OverlayError):
    """Nothing loadable has this id; the text says what was looked at and why each candidate lost."""


class SourceAway(ModelNotFound):
    """The model was in a user's folder that has since gone away (drive unplugged, share unmounted)."""


class SessionError(OverlayError):
    """A session's tree could not be made: no space, no symlinks on that volume, no permission."""
