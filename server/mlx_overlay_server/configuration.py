"""The table `[server]` of the configuration file, which hf-overlay's own file is: settings, profiles and keys.

    [server]
    default_model = "org/name"
    memory_budget = "24G"

    [server.alias]
    "gpt-5" = "qwen:code"

    [server.profile."qwen:code"]
    model = "Qwen/Qwen3-8B-MLX-4bit"
    temperature = 0.2

    [server.key.ann]
    hash = "…"

Each flag of the command line is a setting of the same name, with `_` for `-`. Every mistake is a UsageError that names
the file, the line, and what to do.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from hf_overlay import UsageError, configfile
from hf_overlay.config import ConfigFile, file_path, in_force

from mlx_overlay_server import options, profiles
from mlx_overlay_server.settings import API_KEY_VARIABLE, Key, Profile, Settings, rank

_TABLES = ("alias", "profile", "key")
_ELSEWHERE = {
    "model_path": "put it above [server]: hf-overlay reads it, too",
    "below": "put it above [server]: hf-overlay reads it, too",
    "exclude": "put it above [server]: hf-overlay reads it, too",
    "map": "write it as [map]: hf-overlay reads it, too",
    "api_key": "keys are kept as hashes: mlx-omni-server key add NAME",
    "draft_model": "it belongs to a model: write it below [server.profile.ID]",
    "adapter_path": "it belongs to a model: write it below [server.profile.ID]",
}
"""Flags that the table does not have, and where to write them instead."""


class Origin(NamedTuple):
    """A setting's value, and where it comes from."""

    value: Any
    origin: str
    """A flag, a variable, `FILE:LINE`, or `default`."""


@dataclass(frozen=True, slots=True)
class Table:
    """The content of the table `[server]`."""

    values: Mapping[str, Any]
    """The values of settings, by the names of their fields."""
    lines: Mapping[str, int]
    """The line of each of them."""
    profiles: Mapping[str, Profile]
    keys: tuple[Key, ...]


def load(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Return the settings in force: flags beat the environment, which beats the file.

    Raises UsageError, and ValueError for flags that do not go together.
    """
    file = configfile.read(environ)
    table = parse(file)
    folders = in_force(
        arguments.model_paths, arguments.exclude, environ, file, below=arguments.below, maps=dict(arguments.maps)
    )
    if rank(environ) is not None:
        for name, profile in table.profiles.items():
            if profile.adapter_path is not None or profile.draft_model is not None:
                says = "under mlx.launch, mlx-lm loads neither draft models nor adapters; take them out of the profile"
                raise _mistake(file, "profile", name, says=says)
    return replace(
        options.read(arguments, environ, table.values),
        model_paths=tuple(folders.model_path.value),
        below=tuple(folders.below.value),
        maps=dict(folders.map.value),
        exclude=tuple(folders.exclude.value),
        profiles=table.profiles,
        keys=table.keys,
    )


def changed(before: Settings, after: Settings) -> set[str]:
    """Return the settings in which two differ, by their names in the file."""
    names = {name: _key_of(action) for name, action in _declared().items()} | {"profiles": "profile", "keys": "key"}
    return {key for name, key in names.items() if _valued(before, name) != _valued(after, name)}


def stamp(environ: Mapping[str, str]) -> object:
    """Return a value that changes when the configuration file changes."""
    path = file_path(environ)
    try:
        status = os.stat(path) if path is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)


def origins(arguments: argparse.Namespace, environ: Mapping[str, str]) -> dict[str, Origin]:
    """Return each setting in force with its origin, by the name of its flag without the dashes.

    Raises what `load` raises.
    """
    file = configfile.read(environ)
    table, settings, flags = parse(file), load(arguments, environ), options.given(arguments)
    found: dict[str, Origin] = {}
    for name, action in _declared().items():
        value = _valued(settings, name)
        if name in flags:
            origin = action.option_strings[0]
        elif name == "api_key" and environ.get(API_KEY_VARIABLE):
            origin = API_KEY_VARIABLE
        elif name in table.lines:
            origin = f"{file.path}:{table.lines[name]}"
        else:
            origin = "default"
        found[_key_of(action)] = Origin(value, origin)
    for name in table.profiles:
        found[f"profile {name}"] = Origin(table.profiles[name], f"{file.path}:{_line(file, 'profile', name)}")
    for key in table.keys:
        found[f"key {key.name}"] = Origin(key, f"{file.path}:{_line(file, 'key', key.name)}")
    return found


def parse(file: ConfigFile) -> Table:
    """Return what the table `[server]` of a configuration file says. Raises UsageError."""
    if not file.server:
        return Table({}, {}, {}, ())
    declared = {_key_of(action): (name, action) for name, action in _declared().items()}
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in file.server.items():
        if key in _TABLES:
            continue
        if key in _ELSEWHERE:
            raise _mistake(file, key, says=f"{key} is no setting of [server]; {_ELSEWHERE[key]}")
        if key not in declared:
            from difflib import get_close_matches  # imported here, because only mistakes need it

            near = get_close_matches(key.replace("-", "_"), [*declared, *_TABLES], 1)
            raise _mistake(
                file,
                key,
                says=f"[server] has no setting {key!r}; "
                + (f"write {near[0]}" if near else "each flag of `mlx-omni-server --help` is one, with _ for -"),
            )
        name, action = declared[key]
        try:
            values[name] = _value(action, value)
        except ValueError as error:
            raise _mistake(file, key, says=f"{key}: {error}") from None
        lines[name] = _line(file, key)
    if aliases := _aliases(file):
        values["aliases"], lines["aliases"] = aliases, _line(file, "alias")
    return Table(values, lines, _profiles(file, aliases), tuple(_keys(file)))


def _valued(settings: Settings, name: str) -> Any:
    """Return the value of a field of the settings, of the engine's options, or of the limits."""
    return next(getattr(each, name) for each in (settings, settings.engine, settings.limits) if hasattr(each, name))


def _declared() -> dict[str, argparse.Action]:
    declared: dict[str, argparse.Action] = {}
    options.make_parser(declared)
    return declared


def _key_of(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--").replace("-", "_")


def _value(action: argparse.Action, value: object) -> Any:
    """Return a value of the file as the command line would give it. Raises ValueError."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("write true or false")
        return value
    if isinstance(action.default, list):  # an option that may be repeated
        if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise ValueError('write a list of texts: ["…", "…"]')
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("write a text or a number")
    try:
        made = action.type(str(value)) if callable(action.type) else str(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(str(error)) from None
    if action.choices is not None and made not in action.choices:
        raise ValueError(f"write one of {', '.join(map(str, action.choices))}")
    return made


def _aliases(file: ConfigFile) -> dict[str, str]:
    aliases = _table(file, "alias", 'write [server.alias], and below it "name" = "org/name"')
    for name, id_ in aliases.items():
        if not (name and isinstance(id_, str) and id_):
            raise _mistake(file, "alias", name, says=f'{name!r} must lead to a model; write "{name}" = "org/name"')
    return aliases


def _profiles(file: ConfigFile, aliases: Mapping[str, str]) -> dict[str, Profile]:
    found: dict[str, Profile] = {}
    for name, table in _table(file, "profile", 'write [server.profile."org/name"]').items():
        if not isinstance(table, dict):
            raise _mistake(file, "profile", name, says=f'write [server.profile."{name}"], and below it what it sets')
        if name in aliases:
            raise _mistake(file, "profile", name, says=f"{name!r} is an alias, too; take another name for one of them")
        try:
            found[name] = profiles.read(name, table)
        except profiles.Mistake as mistake:
            raise _mistake(file, "profile", name, *mistake.keys, says=str(mistake)) from None
    return found


def _keys(file: ConfigFile) -> Iterable[Key]:
    how = "make it with `mlx-omni-server key add NAME`"
    for name, table in _table(file, "key", how).items():
        if not isinstance(table, dict):
            raise _mistake(file, "key", name, says=f"{name!r} must be a table; {how}")
        if unknown := [key for key in table if key not in ("hash", "models", "rate")]:
            raise _mistake(
                file, "key", name, unknown[0], says=f"a key has no {unknown[0]!r}; it has hash, models, rate"
            )
        digest, models, rate = table.get("hash"), table.get("models", []), table.get("rate")
        if not (isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")):
            at = ("hash",) if "hash" in table else ()
            raise _mistake(file, "key", name, *at, says=f"the key {name!r} needs the hash of a key; {how}")
        if not (isinstance(models, list) and all(isinstance(each, str) and each for each in models)):
            raise _mistake(file, "key", name, "models", says='models must be a list of names; write ["org/name"]')
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or rate < 1):
            raise _mistake(file, "key", name, "rate", says="rate must be a number of requests in a minute, 1 or more")
        yield Key(name=name, digest=digest, models=tuple(models), rate=rate)


def _table(file: ConfigFile, key: str, how: str) -> dict[str, Any]:
    table = file.server.get(key, {})
    if not isinstance(table, dict):
        raise _mistake(file, key, says=f"{key} must be a table; {how}")
    return table


def _line(file: ConfigFile, *keys: str) -> int:
    return configfile.line_of(file.text or "", "server", *keys)


def _mistake(file: ConfigFile, *keys: str, says: str) -> UsageError:
    return UsageError(f"{file.path}:{_line(file, *keys)}: {says}")
