"""A session: a private, temporary Hugging Face cache in which the user's folders stand in front of the real one.

settings -> catalog (what is there) -> plan (what the tree must hold) -> tree (made, switched, removed)
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from overlay import config, lease, tree
from overlay.catalog import Catalog
from overlay.config import Settings
from overlay.errors import SessionError
from overlay.lease import Lease
from overlay.models import Model
from overlay.plan import choose
from overlay.tree import Tree

logger = logging.getLogger("overlay")

_OLDER_CACHE_VARIABLES = ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE")


class Changes(NamedTuple):
    """What a refresh found: ids of users' models."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]


class Cleared(NamedTuple):
    """A dead session that was cleared."""

    path: str
    kept: tuple[str, ...]
    """What clients had downloaded into it; it stays there, untouched."""


class Session:
    """An open overlay. Made by `open_session`; safe to use from several threads."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], owner: Lease) -> None:
        self._environ = dict(environ)
        self._owner = owner
        self._catalog = Catalog(settings)
        self._lock = threading.Lock()
        self._tree = Tree(owner.path, settings.hf_home)
        self._publish()

    @property
    def path(self) -> Path:
        """The session's own folder (0700)."""
        return Path(self._owner.path)

    @property
    def hub_cache(self) -> Path:
        """The overlay as a Hugging Face cache: what programs should take for HF_HUB_CACHE."""
        return Path(self._tree.hub)

    @property
    def home(self) -> Path:
        """The overlay as an HF_HOME, for programs that know no other variable."""
        return Path(self._tree.home)

    @property
    def settings(self) -> Settings:
        """The model paths and the real cache this session was opened on."""
        return self._catalog.settings

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment for a program that should see the overlay.

        The user's HF_HOME stays where it is, so that the login, the Xet cache and datasets are the real ones; only
        the hub cache is ours. Programs read these variables once, when they import huggingface_hub.
        """
        environment = {name: value for name, value in self._environ.items() if name not in _OLDER_CACHE_VARIABLES}
        environment["HF_HOME"] = self.settings.hf_home
        environment["HF_HUB_CACHE"] = environment["HUGGINGFACE_HUB_CACHE"] = self._tree.hub
        # Paths in the shared blob store are computed lexically, which links break (see hfcache.entries).
        environment["HF_HUB_DISABLE_SHARED_BLOBS"] = "1"
        return environment

    @property
    def owner_fd(self) -> int:
        """Hand it to a child (`pass_fds`) that must keep the overlay even if this process is killed."""
        return self._owner.fd

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model that can be loaded, one an id, sorted by id; the real cache is looked at now."""
        return tuple(choice.winner for choice in self._catalog.choices().values())

    def resolve(self, model_id: str) -> Path:
        """The folder to load for an id: the user's own, else the real cache's snapshot.

        Raises InvalidModelId, ModelNotFound, or SourceAway when the drive it was on is gone.
        """
        model = self._catalog.find(model_id)
        logger.debug("%s comes from the %s: %s", model_id, _origin(model), model.path)
        return Path(model.path)

    def refresh(self) -> Changes:
        """Make the tree show what is in the folders and the cache now.

        Loads that have begun go on in the tree they began in. Raises SessionError, the tree as it was.
        """
        with self._lock:
            before = _custom(self._catalog)
            self._catalog.scan()
            self._publish()
            after = _custom(self._catalog)
        return Changes(
            added=tuple(sorted(after.keys() - before.keys())),
            changed=tuple(sorted(name for name in after.keys() & before.keys() if after[name] != before[name])),
            removed=tuple(sorted(before.keys() - after.keys())),
        )

    def _publish(self) -> None:
        plan = self._catalog.plan(case_insensitive=self._tree.is_case_insensitive)
        for warning in self._catalog.warnings():
            logger.warning("%s", warning)
        try:
            self._tree.publish(plan)
        except OSError as error:
            raise _session_error(self._owner.path, error) from error


@contextmanager
def open_session(
    model_paths: Sequence[str | os.PathLike[str]] = (),
    *,
    all_kinds: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """Open an overlay; it is removed when the context ends.

    `model_paths` come first to last; without any, MLX_OMNI_MODEL_PATH of `environ` (default: this process's) counts.
    Raises UsageError for a model path that is a file, SessionError when the tree cannot be made.

        with overlay.open_session(["/Volumes/LLMS/models"]) as session:
            subprocess.run(["mlx_lm.generate", "--model", "org/name"], env=session.environment)
    """
    environ = os.environ if environ is None else environ
    settings = config.load([os.fspath(path) for path in model_paths], environ, os.getcwd(), all_kinds=all_kinds)
    if settings.roots:
        logger.info("model paths: %s", ", ".join(settings.roots))
    else:
        logger.info("using HuggingFace cache only")
    sessions = lease.sessions_folder(environ)
    clear_dead(sessions)
    try:
        owner = Lease.acquire(sessions, settings.roots)
    except OSError as error:
        raise _session_error(sessions, error) from error
    try:
        try:
            session = Session(settings, environ, owner)
        except OSError as error:
            raise _session_error(owner.path, error) from error
        yield session
    finally:
        owner.release()
        if clear(sessions, owner.path) is None:
            logger.info("a program still uses the overlay at %s; it is cleared at a later start", owner.path)


def clear_dead(sessions: str) -> list[Cleared]:
    """Clear every session whose owner is proven dead."""
    return [cleared for path in lease.sessions_in(sessions) if (cleared := clear(sessions, path)) is not None]


def clear(sessions: str, path: str) -> Cleared | None:
    """Clear one session; None when nothing proves that its owner is dead, or it cannot be removed."""
    with lease.dead(sessions, path) as is_dead:
        if not is_dead:
            return None
        try:
            kept = tree.remove(path)
            if kept:
                logger.warning("downloads are kept in the overlay's folder: %s", ", ".join(kept))
            else:
                lease.remove(path)
        except OSError as error:
            logger.warning("cannot clear the session at %s: %s; remove it by hand", path, error.strerror)
            return None
    return Cleared(path, tuple(kept))


def _custom(catalog: Catalog) -> dict[str, Model]:
    return {model_id: choice.winner for model_id, choice in choose(catalog.sources).items()}


def _origin(model: Model) -> str:
    return f"model path {model.root}" if model.source == "custom" else "Hugging Face cache"


def _session_error(path: str, error: OSError) -> SessionError:
    return SessionError(
        f"cannot build the overlay in {path}: {error.strerror or error}; free some space there, or set "
        f"{lease.DIRECTORY_VARIABLE} to a folder on a volume that takes symbolic links"
    )
