"""`hf-overlay serve` and `hf-overlay env`: one overlay for shells, notebooks and programs with no command line."""

import gc
import os
import shlex
import signal
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from types import FrameType
from typing import NamedTuple

from hf_overlay import config, descriptors
from hf_overlay.command.output import Lines
from hf_overlay.config import Kind
from hf_overlay.errors import OverlayError
from hf_overlay.messages import Messages
from hf_overlay.opening import open_session
from hf_overlay.patience import Patience
from hf_overlay.session import Session
from hf_overlay.tree import clear, lease
from hf_overlay.tree.lease import Owner


def serve(
    model_paths: Sequence[str],
    *,
    below: Sequence[str],
    maps: Mapping[str, str],
    kind: Kind | None,
    exclude: Sequence[str],
    offline: bool,
    hold_downloads: bool,
    interval_seconds: float,
    messages: Messages,
) -> int:
    """Keep an overlay up, following the folders, until a signal ends it; returns 0. Raises OverlayError.

    Programs get what the gateway has begun to send them, unless a second signal comes.
    """
    descriptors.raise_limit()
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
            below=below,
            maps=maps,
            kind=kind,
            exclude=exclude,
            gateway=not config.is_offline(environ),
            hold_downloads=hold_downloads,
            environ=environ,
            messages=messages,
        ) as session:
            gc.enable()  # this may go on for months
            session.offer()
            messages.info(f'serving {session.hub_cache}; in another shell: eval "$(hf-overlay env)"')
            trouble = ""
            while not stop.wait(interval_seconds):
                try:
                    changes = session.refresh(only_settled=True)
                except OverlayError as error:
                    if str(error) != trouble:  # once, not at every turn
                        messages.warning(str(error))
                    trouble = str(error)
                    continue
                trouble = ""
                for what, ids in zip(changes._fields, changes, strict=True):
                    for model_id in ids:
                        messages.info(f"{what}: {model_id}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


class Offer(NamedTuple):
    """What a shell takes over from the overlay that is being served."""

    variables: dict[str, str | None]
    """Name -> value, None to take it out."""
    warning: str | None
    """What differs for programs of this shell, beside their models; None when nothing does."""


def offered(environ: Mapping[str, str]) -> Offer:
    """The variables of the newest overlay being served, for a shell that has `environ`.

    Raises OverlayError when none is being served, and where the shell has chosen another home for login and downloads.
    """
    sessions = lease.sessions_folder(environ)
    clear.check_answers(sessions, Patience())
    owners = []
    for path in lease.sessions_in(sessions, Lines(0)):
        owner = lease.read_owner(path)
        if owner is None or not owner.service:
            continue
        with lease.dead(sessions, path) as is_dead:
            if not is_dead:
                _check(owner.service, path)
                owners.append(owner)
    if not owners:
        cache = config.hub_cache(environ)
        if config.is_overlay(cache) and lease.has_ended(cache):
            raise config.ended(cache, environ)
        raise OverlayError("no overlay is being served; start one: hf-overlay serve --model-path DIR")
    owner = max(owners, key=lambda owner: owner.started)
    variables = owner.service
    return Offer(
        {**variables, **(config.past_proxies(environ) if "HF_ENDPOINT" in variables else {})},
        _other_home(owner, environ),
    )


def _other_home(owner: Owner, environ: Mapping[str, str]) -> str | None:
    """A warning where the overlay keeps login and downloads elsewhere than the shell would; None where it does not.

    Raises OverlayError when the shell's own variables say where: a service knows nothing of them, and to replace them
    would lose the login, and put downloads on a disk that was not chosen for them (P9).
    """
    own_cache = config.hub_cache(environ)
    homes = {"hf_home": (config.hf_home(environ), owner.service.get("HF_HOME"))}
    if not config.is_overlay(own_cache):  # else the shell has joined one, and its own cache is not known
        homes["hub_cache"] = (own_cache, owner.hub_cache)
    for folder, (own, theirs) in homes.items():
        if theirs is None or _is_same(own, theirs):
            continue
        name = config.DECIDING_VARIABLES[folder][0]
        if by := [each for each in config.DECIDING_VARIABLES[folder] if each in environ]:
            raise OverlayError(
                f"{name} is {own} in this shell, and {theirs} in the overlay that is being served; start that overlay "
                f"from this shell (hf-overlay service install, or serve), or use its own: unset {' '.join(by)}"
            )
        return f"login and downloads are those of the overlay's {name}, {theirs}, not of {own}"
    return None


def _is_same(one: str, other: str) -> bool:
    """Whether two paths lead to the same place; a disk that does not answer is another one."""
    if os.path.normpath(one) == os.path.normpath(other):
        return True
    patience = Patience()
    try:
        places = {patience.ask(path, partial(os.path.realpath, path)) for path in (one, other)}
    except OSError:
        return False
    return len(places) == 1


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
