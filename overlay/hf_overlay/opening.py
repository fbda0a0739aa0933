"""Opens a session, and ends it: dead ones are cleared before, and its own downloads come home after."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from hf_overlay import config, configfile
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.config import Settings
from hf_overlay.errors import SessionError, UsageError
from hf_overlay.messages import Messages
from hf_overlay.session import Session, session_error
from hf_overlay.tree import clear, held, lease, shared
from hf_overlay.tree.lease import Lease


@contextmanager
def open_session(
    model_paths: Sequence[str | os.PathLike[str]] = (),
    *,
    below: Sequence[str | os.PathLike[str]] = (),
    maps: Mapping[str, str | os.PathLike[str]] | None = None,
    kind: config.Kind | None = None,
    exclude: Sequence[str] = (),
    gateway: bool = False,
    trusts_code: bool = False,
    encoders: bool = False,
    hold_downloads: bool = False,
    announces: bool = False,
    messages: Messages | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """Open an overlay; it is removed when the context ends.

    `model_paths` are in order of precedence; without any, MLX_OMNI_MODEL_PATH of `environ` (default: this process's)
    names them, else the configuration file. `below` are read-only tiers behind the user's own cache, Hugging Face
    caches or folders of models; without any, HF_OVERLAY_BELOW or the file names them. `maps` says which folder answers
    to an id, before all else: `org/name`, or `datasets/org/name`. For the ids in `exclude` they are all ignored.

    With `gateway`, programs keep the network: a Hub on loopback serves the user's models and passes on the rest;
    without it, a program that asks the Hub may download a model that the user has. `kind` is `mlx` for models that
    mlx-lm can load, or `any`; None: `mlx` if mlx-lm is installed, else `any`. `trusts_code` also takes models that
    bring their architecture as a Python file, which mlx-lm runs only when its caller allows it. `encoders` also takes
    those that mlx-omni-server embeds and ranks texts with, and leaves out what it cannot embed or rank with.

    While the real cache is away or read-only, nothing is downloaded: the gateway refuses, and without one programs are
    put offline. With `hold_downloads` they download all the same; it is held in the session's folder, shown by later
    sessions, and moved to the real cache by the first start that can.

    Sessions share the repos that stand for the user's models, which nobody can write into, where programs announce what
    they download: to the gateway, or, with `announces`, by `Session.expect_model`; or where they are offline.
    `messages` gets what people should know; without one, Python's logger `hf_overlay`.
    Raises UsageError for a model path that is a file, SessionError when the tree cannot be made, OverlayError for `mlx`
    without mlx-lm.

        with hf_overlay.open_session(["/Volumes/LLMS/models"]) as session:
            command = ["mlx_lm.generate", "--model", "org/name"]
            subprocess.run(command, env=session.environment, pass_fds=[session.owner_fd])
    """
    environ = os.environ if environ is None else environ
    messages = Messages() if messages is None else messages
    settings = config.load(
        [os.fspath(path) for path in model_paths],
        environ,
        os.getcwd(),
        kind=kind,
        exclude=exclude,
        trusts_code=trusts_code,
        encoders=encoders,
        holds_downloads=hold_downloads,
        below=[os.fspath(path) for path in below],
        maps={name: os.fspath(path) for name, path in (maps or {}).items()},
        file=configfile.read(environ),
    )
    if config.is_overlay(settings.hub_cache) and lease.has_ended(settings.hub_cache):
        raise config.ended(settings.hub_cache, environ)
    catalog = Catalog(settings, index=config.index_folder(environ))
    if settings.roots:
        messages.info(f"model paths: {', '.join(settings.roots)}")
    elif not settings.below and not settings.maps:
        messages.info("using HuggingFace cache only")
    if settings.below:
        messages.info(f"below the Hugging Face cache: {', '.join(settings.below)}")
    sessions = lease.sessions_folder(environ)
    for folder in (sessions, settings.hf_home):
        if config.expand(folder, environ) != folder:
            raise UsageError(f"programs would expand the $NAME in {folder}; set HF_OVERLAY_DIR, or HF_HOME, to another")
    try:
        clear.clear_earlier(environ, catalog.patience, messages)
        clear.clear_dead(sessions, catalog.patience, messages)
        others = lease.sessions_in(sessions)
        owner = Lease.acquire(sessions, settings)
    except OSError as error:
        raise session_error(sessions, error) from error
    session: Session | None = None
    try:
        with held.shown(sessions, settings.hub_cache, catalog.patience) as repos:
            try:
                catalog.hold(repos)
                session = Session(
                    catalog,
                    environ,
                    owner,
                    messages,
                    shares=_shares(settings, gateway or announces or config.is_offline(environ)),
                )
                _remove_unused(owner.path, messages)
            except OSError as error:
                raise session_error(owner.path, error) from error
            if gateway:
                session.start_gateway()
            yield session
    finally:
        if session is not None:
            session.stop()
        owner.release()
        clear.clear_ended(sessions, owner.path, others, catalog.patience, messages)


def _shares(settings: Settings, is_announced: bool) -> bool:
    """Whether a session shares repos: if programs announce what they write, and its cache is no other session's."""
    return is_announced and not config.is_overlay(settings.hub_cache)


def _remove_unused(session: str, messages: Messages) -> None:
    """Once a day, remove shared repos that have had no use for long. Nobody waits for it."""
    try:
        if shared.is_due(os.path.dirname(session)):
            remove = partial(_quietly, partial(shared.remove_unused, session), messages)
            threading.Thread(target=remove, name="removes unused repos", daemon=True).start()
    except OSError:  # none was shared yet, or the disk is full
        return


def _quietly(function: Callable[[], None], messages: Messages) -> None:
    try:
        function()
    except (OSError, SessionError) as error:
        messages.debug(f"unused repos stay for now: {error}")
