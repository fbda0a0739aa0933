"""`mlx-omni-server key`: makes API keys with names. The configuration file holds only their hashes."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import secrets
from pathlib import Path

from hf_overlay import OverlayError, UsageError, configfile
from hf_overlay.config import FILE_VARIABLE, ConfigFile

from mlx_overlay_server import configuration
from mlx_overlay_server.access import digest
from mlx_overlay_server.command.output import print_json, print_table, say
from mlx_overlay_server.settings import Key

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PREFIX = "mlx-"


def key(options: argparse.Namespace) -> int:
    """Make a key, or list the existing ones."""
    file = configfile.read(os.environ)
    keys = configuration.parse(file).keys
    return _add(options, file, keys) if options.action == "add" else _ls(options, file, keys)


def _add(options: argparse.Namespace, file: ConfigFile, keys: tuple[Key, ...]) -> int:
    name = options.name
    if name is None or not _NAME.fullmatch(name):
        raise UsageError("give the key a name of letters, digits, - and _, as in: key add ann")
    if file.path is None:
        raise OverlayError(f"{FILE_VARIABLE} is empty, so there is no configuration file; unset it")
    if name in {each.name for each in keys}:
        raise OverlayError(f"there is a key {name!r} already; remove its lines from {file.path} first")
    made = f"{_PREFIX}{secrets.token_urlsafe(32)}"
    lines = ["", f"[server.key.{name}]", f'hash = "{digest(made.encode())}"']
    if options.models:
        lines.append(f"models = {json.dumps(options.models)}")
    if options.rate is not None:
        lines.append(f"rate = {options.rate}")
    text = "\n".join(lines) + "\n"
    before = file.text or ""
    added = text if not before or before.endswith("\n") else f"\n{text}"
    configuration.parse(configfile.parse(file.path, before + added))  # the file must still be valid afterwards
    # First: a hash is of no use where nobody has got the key.
    print(json.dumps({"name": name, "key": made}, indent=2) if options.json else made, flush=True)
    _append(Path(file.path), added)
    say(f"this is the key {name!r}, shown this once; its hash is in {file.path}")
    return 0


def _append(path: Path, text: str) -> None:
    """Append lines to a file, or none of them. Nothing else in it changes. Raises OverlayError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            size = file.tell()
            if file.write(text.encode()) < len(text.encode()):  # a full disk takes a part, which is not TOML
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        advice = "make it writable, and then another key, for this one does not count"
        raise OverlayError(f"cannot write {path}: {error.strerror}; {advice}") from error


def _ls(options: argparse.Namespace, file: ConfigFile, keys: tuple[Key, ...]) -> int:
    if options.name is not None or options.models or options.rate is not None:
        raise UsageError("key ls takes no name, models or rate")
    where = {
        each.name: f"{file.path}:{configfile.line_of(file.text or '', 'server', 'key', each.name)}" for each in keys
    }
    if options.json:
        return print_json(
            [{"name": each.name, "models": each.models, "rate": each.rate, "where": where[each.name]} for each in keys]
        )
    if not keys:
        say("there are no keys with names; make one: mlx-omni-server key add NAME")
        return 0
    return print_table(
        ("NAME", "MODELS", "REQUESTS A MINUTE", "WHERE"),
        [(each.name, ", ".join(each.models) or "all", str(each.rate or "any"), where[each.name]) for each in keys],
    )
