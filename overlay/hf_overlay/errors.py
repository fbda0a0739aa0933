"""The errors of this package. The text of each is one line that a person can act on.

OverlayError            an expected failure (the command exits with 1)
├── UsageError          the call itself is wrong (the command exits with 2)
│   └── InvalidModelId  an id that could lead out of the folder it is looked up in
├── ModelNotFound       no folder and no cached snapshot has this id
│   ├── SourceAway      the model's folder is on a drive that is not there now
│   └── IncompleteModel the user's folder of this id lacks a part of its weights
└── SessionError        the tree could not be built or switched
"""


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
    """The user's folder of this id lacks a part of its weights, and no other place has the model whole."""

    def __init__(self, text: str, *, problem: str) -> None:
        super().__init__(text)
        self.problem = problem
        """The end of a sentence that begins with the folder's path and says what is wrong with it."""


class SessionError(OverlayError):
    """A session's tree could not be made: no space, no permission, or a volume without symbolic links."""
