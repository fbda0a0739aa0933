"""`hf-overlay service`: the overlay, or the server, started at login. Installing twice is installing once."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from hf_overlay import config, configfile
from hf_overlay.command.extension import executable
from hf_overlay.command.units import MARK, Manager, Unit, manager
from hf_overlay.errors import OverlayError, UsageError

OVERLAY, SERVER = "hf-overlay", "mlx-omni-server"
_ABOUT = {
    OVERLAY: "Model folders in front of the Hugging Face cache",
    SERVER: "OpenAI- and Anthropic-compatible server for local models",
}
_CARRIED = re.compile(
    r"(HF|MLX_OMNI)_\w+|HUGGINGFACE_HUB_CACHE|HUGGING_FACE_HUB_TOKEN|TRANSFORMERS_OFFLINE|XDG_(CACHE|CONFIG|DATA)_HOME"
    r"|(https?|all|no)_proxy|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE"
)
"""The variables that a program needs to find in a unit what it finds in the shell: caches, login, keys, proxies."""
_FOLDERS = ("--model-path", "--below", "--adapter-path")
"""Options whose value is a folder."""
_MAP = "--map"


class Status(NamedTuple):
    """How a service fares."""

    name: str
    path: str
    """The unit's file."""
    is_installed: bool
    is_loaded: bool
    """It is started at login."""
    pid: int | None
    log: str
    """The command that shows its log."""

    @property
    def text(self) -> str:
        """One line for a person: how it fares, and what to do where it does not."""
        install = "hf-overlay service install" + (" --server" if self.name == SERVER else "")
        if not self.is_installed and not self.is_loaded:
            return f"not installed (no {self.path}); to install it: {install}"
        if self.pid is not None:
            return f"running (process {self.pid}); {self.path}; its log: {self.log}"
        if self.is_loaded:
            return f"not running, though it is started at login; look at its log: {self.log}"
        return f"not loaded; to load it: {install} ({self.path})"


def install(name: str, options: Sequence[str], environ: Mapping[str, str], *, replaces: bool = False) -> None:
    """Write the unit of OVERLAY or SERVER, with options for its program, and start it; nothing where all is so.

    `replaces` also overwrites a unit that is not ours. Raises OverlayError, and UsageError for options that the program
    does not take. Where it cannot be started, its file is as it was before.
    """
    if config.is_overlay(config.hub_cache(environ)):
        raise OverlayError("this shell is in an overlay, which a service must not be; use a new shell")
    configfile.read(environ)  # for the mistakes in it
    program = _program(name, environ)
    options = _absolute(options, environ, config.working_folder())
    verb = ("serve",) if name == OVERLAY else ()
    _check(name, [program, "--version", *verb, *options])
    at = manager(name, environ)
    unit = Unit(name, _ABOUT[name], (program, *verb, *options), _carried(environ, config.working_folder()))
    _check_texts(unit)
    text, before = at.text(unit), _read(at.path)
    if before is not None and MARK not in before and not replaces:
        raise OverlayError(f"{at.path} is not ours; look at it, then remove it or add --replace")
    if before == text and at.state().pid is not None:
        return
    _write(at.path, text)
    try:
        at.load()
    except OverlayError as error:
        _take_back(at, before)
        raise OverlayError(f"{error}; the unit is {'not installed' if before is None else 'as it was'}") from error


def _take_back(at: Manager, before: str | None) -> None:
    """Leave a unit that could not be started as it was before: its file would start it at the next login."""
    if before is not None:
        _write(at.path, before)
        return
    with suppress(OverlayError):  # it may be that nothing can be asked of what starts programs
        at.unload()
    os.unlink(at.path)
    with suppress(OverlayError):
        at.forget()


def uninstall(name: str, environ: Mapping[str, str], *, replaces: bool = False) -> None:
    """End a service and remove its unit; nothing where there is none.

    Raises OverlayError, as for a unit that is not ours, unless it is one that `replaces` covers, too.
    """
    at = manager(name, environ)
    before = _read(at.path)
    if before is None:
        return
    if MARK not in before and not replaces:
        raise OverlayError(f"{at.path} is not ours; look at it, then remove it or add --replace")
    at.unload()
    os.unlink(at.path)
    at.forget()


def status(name: str, environ: Mapping[str, str]) -> Status:
    """How a service fares. Raises OverlayError."""
    at = manager(name, environ)
    is_installed = _read(at.path) is not None
    state = at.state()
    return Status(name, at.path, is_installed, state.is_loaded, state.pid, at.log)


def _program(name: str, environ: Mapping[str, str]) -> str:
    """The path of a command, the one beside ours first. Raises OverlayError."""
    ours = executable()
    beside = os.path.join(os.path.dirname(ours), name)
    if os.path.isfile(beside):
        return beside
    if (found := shutil.which(name, path=environ.get("PATH"))) is None:
        raise OverlayError(f"there is no {name} beside {ours}, nor in PATH; install it: docs/install.md")
    return os.path.abspath(found)


def _carried(environ: Mapping[str, str], cwd: str) -> dict[str, str]:
    """The variables for a unit, with whole paths."""
    carried = {name: value for name, value in sorted(environ.items()) if _CARRIED.fullmatch(name)}
    for name in (config.MODEL_PATH_VARIABLE, config.BELOW_VARIABLE):
        if parts := [part for part in carried.get(name, "").split(os.pathsep) if part]:
            carried[name] = os.pathsep.join(_whole(part, environ, cwd) for part in parts)
    for name in (config.FILE_VARIABLE, config.DIRECTORY_VARIABLE):
        if path := carried.get(name):
            carried[name] = _whole(path, environ, cwd)
    return carried


def _absolute(options: Sequence[str], environ: Mapping[str, str], cwd: str) -> list[str]:
    """The options with whole paths."""

    def whole(flag: str, value: str) -> str:
        id_, equals, folder = value.partition("=") if flag == _MAP else ("", "", value)
        return f"{id_}{equals}{_whole(folder, environ, cwd)}" if folder else value

    found: list[str] = []
    for option in options:
        flag, equals, value = option.partition("=")
        if equals and flag in (*_FOLDERS, _MAP):
            option = f"{flag}={whole(flag, value)}"
        elif found and found[-1] in (*_FOLDERS, _MAP):
            option = whole(found[-1], option)
        found.append(option)
    return found


def _whole(path: str, environ: Mapping[str, str], cwd: str) -> str:
    """A path that leads to the same place without the shell's working folder, in which no unit is started."""
    return os.path.join(cwd, config.expand_user(path, environ))


def _check(name: str, command: Sequence[str]) -> None:
    """Raise UsageError for options that the program does not take."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UsageError(f"{name} does not take these options: {said[-1] if said else f'status {done.returncode}'}")


def _check_texts(unit: Unit) -> None:
    """Raise UsageError for what no unit can hold. It is not repeated: it may be a key."""
    texts = [("an option", each) for each in unit.command] + [*unit.environ.items()]
    for name, text in texts:
        if any(each < " " or each == "\x7f" or "\ud800" <= each <= "\udfff" for each in text):
            raise UsageError(
                f"{name} holds a control character, or a name that is not UTF-8, which a unit cannot hold; "
                "rename the folder, or go without it"
            )


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OverlayError(f"cannot read {path}: {error.strerror}; look at it, and remove it") from error


def _write(path: str, text: str) -> None:
    """Replace a file in one step, readable by its user alone: there may be a key or a token in it."""
    new = f"{path}.new"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(new, path)
    except OSError as error:
        raise OverlayError(f"cannot write {path}: {error.strerror}; make its folder writable") from error
