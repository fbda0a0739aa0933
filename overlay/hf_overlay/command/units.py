"""What starts programs at login: launchd on macOS, systemd on Linux."""

import os
import plistlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from hf_overlay.config import expand_user
from hf_overlay.errors import OverlayError

MARK = "Written by `hf-overlay service install`; it may be overwritten by the next one."
"""In every unit that we write; without it a unit is somebody else's."""
STOP_SECONDS = 30.0
"""The longest that a program takes to end, with some room."""
OPEN_FILES = 10_240
"""What macOS grants at most; it gives 256 to programs that do not ask."""

_IN_PROGRESS = 36
"""launchctl's status for what it has begun."""


class Unit(NamedTuple):
    """A program to start at login."""

    name: str
    about: str
    command: tuple[str, ...]
    """The path of the program, and its arguments."""
    environ: Mapping[str, str]


class State(NamedTuple):
    """How a unit fares."""

    is_loaded: bool
    """It is started at login."""
    pid: int | None
    """The process that runs now; None when none does."""


class Manager(Protocol):
    """launchd or systemd, for one unit of the user."""

    path: str
    """Where the unit's file is."""
    log: str
    """What shows the program's log: a command."""

    def text(self, unit: Unit) -> str:
        """The content of the unit's file."""

    def state(self) -> State:
        """Look how the unit fares. Raises OverlayError."""

    def load(self) -> None:
        """Start the unit, now and at each login, in place of an earlier version of it. Raises OverlayError."""

    def unload(self) -> None:
        """End the unit, for now and for each login. Raises OverlayError."""

    def forget(self) -> None:
        """Notice that the unit's file is gone. Raises OverlayError."""


def manager(name: str, environ: Mapping[str, str]) -> Manager:
    """What starts programs at login on this machine. Raises OverlayError where there is nothing that we know."""
    tool, kind = ("launchctl", Launchd) if sys.platform == "darwin" else ("systemctl", Systemd)
    if shutil.which(tool, path=environ.get("PATH")) is None:
        raise OverlayError(f"there is no {tool} here; have `hf-overlay serve` started at login by other means")
    made: Manager = kind(name, environ)
    return made


class Launchd:
    """A launchd agent of the user who is logged in."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self._label = f"local.{name}"
        self._target = f"gui/{os.getuid()}/{self._label}"
        self._log = expand_user(f"~/Library/Logs/{name}.log", environ)
        self.path = expand_user(f"~/Library/LaunchAgents/{self._label}.plist", environ)
        self.log = f"tail -f {self._log}"

    def text(self, unit: Unit) -> str:
        """The content of the unit's file."""
        entries = {
            "Label": self._label,
            "ProgramArguments": list(unit.command),
            "EnvironmentVariables": dict(unit.environ),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": 10,
            "ExitTimeOut": int(STOP_SECONDS),
            "ProcessType": "Interactive",  # else macOS holds back its processor time and its disk
            "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
            "StandardOutPath": self._log,
            "StandardErrorPath": self._log,
        }
        head, plist, rest = plistlib.dumps(entries, sort_keys=False).decode().partition("<plist")
        return f"{head}<!-- {MARK} -->\n{plist}{rest}"

    def state(self) -> State:
        """Look how the unit fares. Raises OverlayError."""
        done = _call("launchctl", "print", self._target)
        pid = re.search(r"^\s*pid = (\d+)$", done.stdout, re.MULTILINE)
        return State(done.returncode == 0, int(pid[1]) if done.returncode == 0 and pid else None)

    def load(self) -> None:
        """Start the unit, now and at each login, in place of an earlier version of it. Raises OverlayError."""
        os.makedirs(os.path.dirname(self._log), exist_ok=True)
        self.unload()
        _must("launchctl", "enable", self._target)
        _must("launchctl", "bootstrap", os.path.dirname(self._target), self.path)

    def unload(self) -> None:
        """End the unit, for now and for each login. Raises OverlayError."""
        if not self.state().is_loaded:
            return
        _must("launchctl", "bootout", self._target, also=_IN_PROGRESS)
        # It returns before the program has ended, and until then the unit cannot be loaded again.
        deadline = time.monotonic() + STOP_SECONDS
        while self.state().is_loaded:
            if time.monotonic() > deadline:
                raise OverlayError(f"{self._label} does not end; look at it: launchctl print {self._target}")
            time.sleep(0.1)

    def forget(self) -> None:
        """Nothing: launchd reads the folder at login."""


class Systemd:
    """A unit of the user's own systemd."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self._name = f"{name}.service"
        folder = environ.get("XDG_CONFIG_HOME", "")
        folder = folder if os.path.isabs(folder) else expand_user("~/.config", environ)
        self.path = f"{folder}/systemd/user/{self._name}"
        self.log = f"journalctl --user -u {name}"

    def text(self, unit: Unit) -> str:
        """The content of the unit's file."""
        program, *arguments = unit.command
        command = [_quoted(program), *(_quoted(each).replace("$", "$$") for each in arguments)]
        variables = [f"Environment={_quoted(f'{name}={value}')}" for name, value in unit.environ.items()]
        lines = [
            f"# {MARK}",
            "[Unit]",
            f"Description={unit.about}",
            "",
            "[Service]",
            f"ExecStart={' '.join(command)}",
            *variables,
            "Restart=on-failure",
            "RestartSec=10",
            "RestartPreventExitStatus=2",  # a usage error, which does not go away by itself
            f"LimitNOFILE={OPEN_FILES}:524288",
            "",
            "[Install]",
            "WantedBy=default.target",
        ]
        return "\n".join(lines) + "\n"

    def state(self) -> State:
        """Look how the unit fares. Raises OverlayError."""
        shown = _must("systemctl", "--user", "show", self._name, "--property=UnitFileState,ActiveState,MainPID")
        found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        is_active = found.get("ActiveState") in ("active", "activating", "reloading")
        pid = int(found.get("MainPID") or 0)
        return State(is_active or found.get("UnitFileState") == "enabled", pid if is_active and pid else None)

    def load(self) -> None:
        """Start the unit, now and at each login, in place of an earlier version of it. Raises OverlayError."""
        _must("systemctl", "--user", "daemon-reload")
        _must("systemctl", "--user", "enable", self._name)
        _must("systemctl", "--user", "restart", self._name)

    def unload(self) -> None:
        """End the unit, for now and for each login. Raises OverlayError."""
        if self.state().is_loaded:
            _must("systemctl", "--user", "disable", "--now", self._name)

    def forget(self) -> None:
        """Notice that the unit's file is gone. Raises OverlayError."""
        _must("systemctl", "--user", "daemon-reload")


def _quoted(text: str) -> str:
    """A word of a systemd unit, as it is: no part of it is a specifier, and no space in it separates."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def _must(*command: str, also: int = 0) -> str:
    """What a command prints. Raises OverlayError with what it says, when it fails; `also` is a status that is good."""
    done = _call(*command)
    if done.returncode not in (0, also):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise OverlayError(
            f"`{' '.join(command)}` failed ({said[-1].strip() if said else f'status {done.returncode}'}); "
            "do this in a terminal of the desktop's login"
        )
    return done.stdout


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * STOP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OverlayError(f"`{' '.join(command)}` cannot be run: {error}") from error
