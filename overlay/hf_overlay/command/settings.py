"""`hf-overlay config`: the settings in force, each with the flag, variable or line of a file that it comes from."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

from hf_overlay import config, configfile
from hf_overlay.config import ConfigFile, InForce, Settings
from hf_overlay.tree import lease


class Row(NamedTuple):
    """One setting."""

    name: str
    value: str | list[str]
    """A folder, or a list of folders, ids, or `ID=FOLDER`."""
    origin: str
    """A flag, a variable, `FILE:LINE`, or `default`."""

    def lines(self) -> list[tuple[str, str, str]]:
        """The cells of a table: one line for each value."""
        values = [self.value] if isinstance(self.value, str) else self.value or ["-"]
        return [(self.name if number == 0 else "", value, self.origin) for number, value in enumerate(values)]


def rows(settings: Settings, given: InForce, file: ConfigFile, environ: Mapping[str, str]) -> list[Row]:
    """All settings, those that a person gives first. `given` is where those come from. Raises OSError."""
    folders = {"hub_cache": settings.hub_cache, "hf_home": settings.hf_home}
    # On macOS only shells have XDG variables, and a service must use the same folder.
    sessions = (config.DIRECTORY_VARIABLE, *(() if sys.platform == "darwin" else ("XDG_CACHE_HOME",)))
    return [
        Row("model_path", list(settings.roots), _origin("model_path", given.model_path.origin, file)),
        Row("below", list(settings.below), _origin("below", given.below.origin, file)),
        Row("map", [f"{each.full_id}={each.folder}" for each in settings.maps], _origin("map", given.map.origin, file)),
        Row("exclude", list(settings.exclude), _origin("exclude", given.exclude.origin, file)),
        *(Row(name, path, _deciding(config.DECIDING_VARIABLES[name], environ)) for name, path in folders.items()),
        Row("sessions", lease.sessions_folder(environ), _deciding(sessions, environ)),
    ]


def _origin(name: str, origin: str, file: ConfigFile) -> str:
    """An origin as it is shown: with the line, where it is the file."""
    if origin != file.path or file.text is None:
        return origin
    return f"{origin}:{configfile.line_of(file.text, name)}"


def _deciding(variables: tuple[str, ...], environ: Mapping[str, str]) -> str:
    return next((name for name in variables if name in environ), "default")
