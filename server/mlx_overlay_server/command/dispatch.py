"""Runs one command, whose module is imported only then."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib import import_module

from hf_overlay import UsageError

from mlx_overlay_server import signals
from mlx_overlay_server.command.parser import make_parser

_TAKE_MORE = ("service", "launch")
"""Commands that pass what follows `--` on to another program."""
_MODULES = {"ps": "resident", "stop": "resident", "config": "settings"}
"""The modules of commands whose names differ from the commands'."""


def run(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names, and return its exit code. Raises OverlayError."""
    name = arguments[0]
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = make_parser(only=name)
    options = parser.parse_args(arguments[:split])
    options.more = list(arguments[split + 1 :])
    signals.raise_stopped()  # so that a command which is ended clears up
    if options.more and name not in _TAKE_MORE:
        raise UsageError(f"{name} starts no other program; leave out -- and what follows it")
    module = import_module(f"mlx_overlay_server.command.{_MODULES.get(name, name)}")
    command: Callable[[argparse.Namespace], int] = getattr(module, name)
    return command(options)
