"""Opens a session, and ends it. Before, dead sessions are cleared; after, its downloads are moved to the real cache."""

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
    """Open an overlay and give its session; the overlay is removed when the context ends.

        with hf_overlay.open_session(["/Volumes/LLMS/models"]) as session:
            command = ["mlx_lm.generate", "--model", "org/name"]
            subprocess.run(command, env=session.environment, pass_fds=[session.owner_fd])

    What it shows. Where an argument is left out, a variable of `environ` (default: this process's) counts, else the
    configuration file.

    - `model_paths`: folders of models, the first one wins; else MLX_OMNI_MODEL_PATH.
    - `below`: read-only tiers behind the user's own cache, each a Hugging Face cache or a folder of models; else
      HF_OVERLAY_BELOW.
    - `maps`: folders that answer to an id before all else: {"org/name": DIR, "datasets/org/name": DIR}.
    - `exclude`: ids for which none of these count.
    - `kind`: `mlx` for models that mlx-lm can load, `any` for all; None: `mlx` where mlx-lm is installed, else `any`.
    - `trusts_code`: also models that bring their architecture as a Python file, which mlx-lm runs only when it is told
      to.
    - `encoders`: also models that mlx-omni-server embeds and ranks texts with, and none that it cannot do that with.

    How programs use it.

    - `gateway`: a Hub on loopback answers programs for the user's models, and passes on everything else. Without it, a
      program that asks the Hub may download a model that the user has.
    - `hold_downloads`: while the real cache is away or read-only, nothing is downloaded: the gateway refuses, and
      without one programs are put offline. With this, programs download all the same. The session's folder holds
      that, later sessions show it, and the first start that can moves it to the real cache.
    - `announces`: the caller calls `Session.expect_model` before each download. Then, as with the gateway or offline,
      the session shares the links to the user's models with other sessions, which makes its start and end quicker.
    - `messages`: gets what people should know; None: Python's logger `hf_overlay` gets it.

    Raises UsageError for arguments that make no sense, such as a file as model path; SessionError when the overlay
    cannot be made; OverlayError for `mlx` where mlx-lm is not installed.
    """
    environ = os.environ if environ is None else environ
    messages = Messages() if messages is None else messages
    settings = config.load(
        [os.fspath(path) for path in model_paths],
        environ,
        config.working_folder(),
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
    """Return whether a session shares linked repos: writes are announced, and its cache is not another session's."""
    return is_announced and not config.is_overlay(settings.hub_cache)


def _remove_unused(session: str, messages: Messages) -> None:
    """Once a day, remove shared repos that have not been used for long, in a thread that nothing waits for."""
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
