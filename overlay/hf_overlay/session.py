"""A session: a private, temporary Hugging Face cache in which the user's folders stand in front of the real one.

settings -> catalog (what is there) -> plan (what the tree must hold) -> tree (made, switched, removed)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hf_overlay import config, hfcache
from hf_overlay.catalog.catalog import Catalog, check_id
from hf_overlay.catalog.plan import choose
from hf_overlay.config import Settings
from hf_overlay.errors import InvalidModelId, SessionError, UsageError
from hf_overlay.gateway.server import DEFAULT_UPSTREAM, Gateway, Unavailable
from hf_overlay.models import Model
from hf_overlay.tree import lease, writeback
from hf_overlay.tree import publish as tree
from hf_overlay.tree.lease import Lease
from hf_overlay.tree.publish import Shadowed, Tree

logger = logging.getLogger("hf_overlay")

SETTLE_SECONDS = 5
"""Longer than any client takes from opening its cache to asking the Hub."""
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
    """What clients had downloaded into it and could not be brought home: it stays there."""


class Session:
    """An open overlay. Made by `open_session`; safe to use from several threads."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], owner: Lease) -> None:
        self._environ = dict(environ)
        self._owner = owner
        self._catalog = Catalog(settings)
        self._lock = threading.Lock()
        self._changed: dict[str, float] = {}
        self._gateway: Gateway | None = None
        self._tree = Tree(owner.path, settings.hf_home)
        self._publish()
        self._published = _custom(self._catalog)

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
    def variables(self) -> dict[str, str | None]:
        """What the overlay changes in a program's environment: name -> value, None to take it out.

        The user's HF_HOME stays where it is, so that the login, the Xet cache and datasets are the real ones; only
        the hub cache is ours. Programs read these variables once, when they import huggingface_hub.
        """
        variables: dict[str, str | None] = dict.fromkeys(_OLDER_CACHE_VARIABLES)
        variables["HF_HOME"] = self.settings.hf_home
        variables["HF_HUB_CACHE"] = variables["HUGGINGFACE_HUB_CACHE"] = self._tree.hub
        # Paths in the shared blob store are computed lexically, which links break (see hfcache.entries).
        variables["HF_HUB_DISABLE_SHARED_BLOBS"] = "1"
        if self._gateway is not None:
            variables["HF_ENDPOINT"] = self._gateway.endpoint
        if self.is_offline:  # also for programs started elsewhere, which nothing keeps from the Hub
            variables["HF_HUB_OFFLINE"] = "1"
        return variables

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment for a program that should see the overlay."""
        return config.applied(self.variables, self._environ)

    @property
    def is_offline(self) -> bool:
        """Whether programs in `environment` will not use the network."""
        return config.is_offline(self._environ)

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
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s comes from the %s: %s", model_id, _origin(model), model.path)
            for candidate in self._catalog.explain(model_id)[1:]:
                logger.debug("%s: %s %s", model_id, candidate.path, candidate.verdict)
        return Path(model.path)

    def refresh(self, *, only_settled: bool = False) -> Changes:
        """Make the tree show what is in the folders and the cache now.

        `only_settled` is for calling it all the time: what changed since the last call is shown by the next one that
        finds it unchanged, so that a model being copied is not shown, and counted as changed, at every turn.

        Loads that have begun go on in the tree they began in. Raises SessionError, the tree as it was.
        """
        with self._lock:
            before = self._published
            self._catalog.scan(only_settled=only_settled)
            after = _custom(self._catalog)
            changes = Changes(
                added=tuple(sorted(after.keys() - before.keys())),
                changed=tuple(sorted(name for name in after.keys() & before.keys() if after[name] != before[name])),
                removed=tuple(sorted(before.keys() - after.keys())),
            )
            now = time.monotonic()
            self._changed |= {model_id: now for ids in changes for model_id in ids}
            self._publish()
            self._published = after
        return changes

    def start_gateway(self) -> None:
        """Answer for the Hub from now on, on loopback; programs started later find it in `environment`.

        The environment's own HF_ENDPOINT is where other requests go. Raises SessionError.
        """
        gateway = Gateway(self, self._environ.get("HF_ENDPOINT") or DEFAULT_UPSTREAM)
        try:
            gateway.start()
        except OSError as error:
            raise SessionError(f"cannot listen on 127.0.0.1: {error.strerror}; run with --offline") from error
        self._gateway = gateway

    def offer(self) -> None:
        """Let other programs of this user find the session (`hf-overlay env`)."""
        self._owner.record(self.settings, self.variables)

    def stop(self) -> None:
        """Stop what the session runs. Its tree is cleared apart, since other programs may still be in it."""
        if self._gateway is not None:
            self._gateway.stop()

    def shadowed(self, model_id: str) -> Shadowed | Unavailable | None:
        """What the gateway answers from: the user's model at an id (untrusted), or why it must not be fetched."""
        try:
            check_id(model_id)
        except InvalidModelId:
            return None
        found = self._tree.shadowed(model_id)
        roots = self.settings.roots if model_id not in self.settings.exclude else ()
        in_folder = any(os.path.isdir(f"{root}/{model_id}") for root in roots)
        if (found is None and in_folder) or (found is not None and not os.path.isdir(found.model.path)):
            try:
                self.refresh()
            except SessionError as error:
                logger.warning("%s", error)
            found = self._tree.shadowed(model_id)
        if time.monotonic() - self._changed.get(model_id, -SETTLE_SECONDS) < SETTLE_SECONDS and found is not None:
            # A load that began before the switch sees the model as it was, one that begins now as it is: neither
            # must be told of the other's commit, which it would download. Sent to its cache, each finds its own.
            return Unavailable(f"{model_id} has just changed on disk; try again in {SETTLE_SECONDS} seconds", True)
        if found is not None:
            return found
        root = self._catalog.away(model_id)
        if root is None:
            return None
        message = f"{model_id} is in {root}, which is not there now; connect that drive, or use --exclude {model_id}"
        return Unavailable(message, self._catalog.is_cached(model_id))

    def expect_download(self, folder: str) -> None:
        """A client is about to write to a repo folder: let it land in the real cache."""
        if all(os.path.isdir(f"{self._tree.hub}/{each}") for each in (hfcache.LOCKS, folder)):
            return
        try:
            with self._lock:
                self._tree.expect(folder, self.settings.hub_cache)
        except OSError as error:
            logger.debug("%s is downloaded into the session and moved later: %s", folder, error)

    def expect_model(self, model_id: str) -> None:
        """A model is about to be downloaded by a program in `environment`: let it land in the real cache."""
        self.expect_download(hfcache.repo_folder(model_id))

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
    kind: config.Kind | None = None,
    exclude: Sequence[str] = (),
    gateway: bool = False,
    trusts_code: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """Open an overlay; it is removed when the context ends.

    `model_paths` come first to last; without any, MLX_OMNI_MODEL_PATH of `environ` (default: this process's) counts.
    `kind` is `mlx` for models that mlx-lm can load, or `any`; None: `mlx` if mlx-lm is installed, else `any`.
    `exclude` names ids for which they do not count. With `gateway`, programs keep the network: a loopback Hub answers
    for the user's models and passes on the rest; without it, a program that asks the Hub may be sent to download.
    `trusts_code` also takes models that bring their architecture as a Python file: whoever loads them must tell mlx-lm.
    Raises UsageError for a model path that is a file, SessionError when the tree cannot be made, OverlayError for `mlx`
    without mlx-lm.

        with hf_overlay.open_session(["/Volumes/LLMS/models"]) as session:
            subprocess.run(["mlx_lm.generate", "--model", "org/name"], env=session.environment)
    """
    environ = os.environ if environ is None else environ
    settings = config.load(
        [os.fspath(path) for path in model_paths],
        environ,
        os.getcwd(),
        kind=kind,
        exclude=exclude,
        trusts_code=trusts_code,
    )
    if settings.roots:
        logger.info("model paths: %s", ", ".join(settings.roots))
    else:
        logger.info("using HuggingFace cache only")
    sessions = lease.sessions_folder(environ)
    for folder in (sessions, settings.hf_home):
        if config.expand(folder, environ) != folder:
            raise UsageError(f"programs would expand the $NAME in {folder}; set HF_OVERLAY_DIR, or HF_HOME, to another")
    clear_dead(sessions)
    try:
        owner = Lease.acquire(sessions, settings)
    except OSError as error:
        raise _session_error(sessions, error) from error
    session: Session | None = None
    try:
        try:
            session = Session(settings, environ, owner)
        except OSError as error:
            raise _session_error(owner.path, error) from error
        if gateway:
            session.start_gateway()
        yield session
    finally:
        if session is not None:
            session.stop()
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
            owner = lease.read_owner(path)
            stuck = writeback.bring_home(path, owner.hub_cache) if owner is not None else {}
            kept = tree.remove(path, stuck)
            for kept_path in kept:
                reason = stuck.get(kept_path, "the cache holds, or a program is downloading, other bytes for it")
                logger.warning("a download stays in %s and is tried again at the next start: %s", kept_path, reason)
            if not kept:
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
