"""The values that the other modules share: what a scan finds, and why it left something out."""

from enum import StrEnum
from typing import Literal, NamedTuple


class Code(StrEnum):
    """Why a place answers to an id, or why it does not. `hf-overlay why --json` prints these; their text may change."""

    WINS = "wins"
    SHADOWED = "shadowed"
    """Another model of the same id comes first."""
    EXCLUDED = "excluded"
    MISSING = "missing"
    NO_PERMISSION = "no-permission"
    UNREADABLE = "unreadable"
    NO_ANSWER = "no-answer"
    """A disk that does not answer, such as a network mount whose server is gone."""
    NOT_A_FOLDER = "not-a-folder"
    IS_A_MODEL = "is-a-model"
    """A model path that is itself a model's folder."""
    IS_THE_CACHE = "is-the-cache"
    BAD_NAME = "bad-name"
    """A name that no model id can have."""
    LINK_TO_PARENT = "link-to-parent"
    LINKED_TWICE = "linked-twice"
    TOO_DEEP = "too-deep"
    NO_CONFIG = "no-config"
    GGUF = "gguf"
    """Weights for llama.cpp only, without a config.json."""
    BAD_CONFIG = "bad-config"
    """A JSON file that cannot be read or does not hold what it should."""
    OTHER_KIND = "other-kind"
    """A model that mlx-lm does not load."""
    NO_WEIGHTS = "no-weights"
    BROKEN_LINK = "broken-link"
    INCOMPLETE = "incomplete"
    """Files are missing, empty or still changing, as while a model is being copied."""
    NO_SNAPSHOT = "no-snapshot"
    """A cached repo without a revision that `main` stands for."""
    NOT_LINKABLE = "not-linkable"
    """An id that cannot stand in a cache; the model can be loaded by path."""


HELD_BACK = frozenset({Code.INCOMPLETE, Code.NO_PERMISSION, Code.UNREADABLE, Code.BAD_CONFIG, Code.BROKEN_LINK})
"""Why a folder that is there for an id cannot be loaded for now: nothing is downloaded in its place."""


class Reason(NamedTuple):
    """A code for programs, with a text for people."""

    code: Code
    text: str
    """The end of a sentence that begins with a path."""


Layer = Literal["map", "custom", "cache", "tier"]
"""Where something was found, most important first: a map, a model path, the real cache, a tier below it."""


Task = Literal["text", "embedding", "reranker", "transcription", "speech"]
"""What a model does: it generates text, embeds it as a vector, or ranks it by a query; it transcribes recordings, or
speaks texts."""


class File(NamedTuple):
    """One file of a model. A link is followed, so size and time are those of its target."""

    name: str
    """The path relative to the model's folder, with `/`."""
    size: int
    """Its size in bytes."""
    mtime_ns: int
    """The time of its last change, in nanoseconds since 1970."""
    etag: str | None = None
    """The Hub's etag, where the folder proves it."""


class Model(NamedTuple):
    """A folder that can be loaded, and the id that it answers to.

    `source` says where it was found, and `root` which map, model path, cache or tier that is. `path` is the folder to
    load, `files` are all files in it, and `size_bytes` is their size. `model_type` is that of its config.json, `task`
    what it does with text, `commit` the Hub's commit where the folder proves it.
    """

    id: str
    """Such as `org/name`."""
    source: Layer
    """Where it was found: `map`, `custom` (a model path), `cache` or `tier`."""
    path: str
    """The folder to load: the user's own, or a snapshot in a Hugging Face cache."""
    model_type: str | None
    """That of config.json; None where there is none, which only `kind="any"` allows."""
    size_bytes: int
    """Bytes of all its files."""
    files: tuple[File, ...]
    """All files in it, without hidden ones and unfinished downloads, sorted by name."""
    root: str
    """The map, model path, cache or tier in which it was found."""
    commit: str | None = None
    """The Hub's commit, where the folder proves it: as a snapshot, or by the notes of `hf download --local-dir`."""
    kind: str = "models"
    """`models`, or for a folder that is mapped to another kind of repo: `datasets`, `spaces` or `kernels`."""
    task: Task = "text"
    fingerprint: str = ""
    """The result of `hfcache.fingerprint`; empty until something needs it."""


class Reject(NamedTuple):
    """A folder that looks like a model and is left out."""

    path: str
    id: str | None
    """The id it would have; None when it cannot have one."""
    reason: Reason
    root: str
    """The model path, or the cache, it was found in."""


class Source(NamedTuple):
    """The models, and the folders left out, that one scan found in a model path, map or tier, or in the real cache."""

    root: str
    problem: Reason | None
    """Why the whole root could not be used; None when it could."""
    models: tuple[Model, ...] = ()
    rejects: tuple[Reject, ...] = ()
    junk: int = 0
    """Number of AppleDouble files (`._name`) that were left out."""
    device: int | None = None
    """st_dev of the root: another one under the same path means that the drive was taken away."""
    layer: Layer = "custom"
    """What the root is."""


class Revision(NamedTuple):
    """One snapshot in a cache."""

    commit: str
    path: str
    """Its folder."""
    files: tuple[File, ...]
    """Those that are there; links that lead nowhere are left out."""


class CachedRepo(NamedTuple):
    """What a Hugging Face cache holds of one repo of any kind."""

    name: str
    """The name of its folder, as in `models--org--name`."""
    path: str
    root: str
    """The cache or tier it is in, for who asks whether it is still there."""
    revisions: tuple[Revision, ...]
    refs: tuple[tuple[str, str], ...] = ()
    """(name, commit) of branches, tags and pull requests."""
    trees: tuple[tuple[str, bytes], ...] = ()
    """(commit, content) of the listings of all files that the Hub has in a revision."""
    absent: tuple[str, ...] = ()
    """`<commit>/<name>` of files that the Hub was asked for and has not."""
