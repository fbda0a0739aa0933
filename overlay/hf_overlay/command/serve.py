"""`hf-overlay serve` and `hf-overlay env`: one overlay for shells, notebooks and programs with no command line."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType

from hf_overlay import config
from hf_overlay.config import Kind
from hf_overlay.errors import OverlayError
from hf_overlay.patience import Patience
from hf_overlay.session import Session, open_session
from hf_overlay.tree import clear, lease

logger = logging.getLogger("hf_overlay")


def serve(
    model_paths: Sequence[str],
    *,
    kind: Kind | None,
    exclude: Sequence[str],
    offline: bool,
    hold_downloads: bool,
    interval_seconds: float,
) -> int:
    """Keep an overlay up, following the folders, until a signal ends it; returns 0. Raises OverlayError.

    Programs get what the gateway has begun to send them, unless a second signal comes.
    """
    stop = threading.Event()
    session: Session | None = None

    def end(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set() and session is not None:
            session.cut()
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else dict(os.environ)
    try:
        with open_session(
            model_paths,
            kind=kind,
            exclude=exclude,
            gateway=not config.is_offline(environ),
            hold_downloads=hold_downloads,
            environ=environ,
        ) as session:
            session.offer()
            logger.info('serving %s; in another shell: eval "$(hf-overlay env)"', session.hub_cache)
            trouble = ""
            while not stop.wait(interval_seconds):
                try:
                    changes = session.refresh(only_settled=True)
                except OverlayError as error:
                    if str(error) != trouble:  # once, not at every turn
                        logger.warning("%s", error)
                    trouble = str(error)
                    continue
                trouble = ""
                for what, ids in zip(changes._fields, changes, strict=True):
                    for model_id in ids:
                        logger.info("%s: %s", what, model_id)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def offered(environ: Mapping[str, str]) -> dict[str, str | None]:
    """The variables of the newest overlay being served: name -> value, None to take it out. Raises OverlayError."""
    sessions = lease.sessions_folder(environ)
    clear.check_answers(sessions, Patience())
    services = []
    for path in lease.sessions_in(sessions):
        owner = lease.read_owner(path)
        if owner is None or not owner.service:
            continue
        with lease.dead(sessions, path) as is_dead:
            if not is_dead:
                _check(owner.service, path)
                services.append((owner.started, owner.service))
    if not services:
        raise OverlayError("no overlay is being served; start one: hf-overlay serve --model-path DIR")
    variables = max(services, key=lambda service: service[0])[1]
    return {**variables, **(config.past_proxies(environ) if "HF_ENDPOINT" in variables else {})}


def _check(variables: Mapping[str, object], path: str) -> None:
    """Raise OverlayError for what no overlay offers: a shell would evaluate it, names as well as values."""
    for name, value in variables.items():
        if name not in config.CHANGED_VARIABLES or not (value is None or isinstance(value, str)):
            raise OverlayError(
                f"the overlay at {path} offers {name!r}, which no overlay sets; end its hf-overlay serve"
            )


def as_shell(variables: Mapping[str, str | None], shell: str) -> str:
    """Commands that set and unset variables, for `sh` (bash, zsh) or `fish`."""
    lines = []
    for name, value in variables.items():
        if shell == "fish":
            quoted = "'" + (value or "").replace("\\", "\\\\").replace("'", "\\'") + "'"
            lines.append(f"set -e {name};" if value is None else f"set -gx {name} {quoted};")
        else:
            lines.append(f"unset {name};" if value is None else f"export {name}={shlex.quote(value)};")
    return "\n".join(lines)
