"""Runs one command. Its module is imported here, and only here errors become exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hf_overlay import OverlayError, UsageError

from mlx_overlay_server import signals
from mlx_overlay_server.command.output import say
from mlx_overlay_server.command.parser import make_parser

_TAKE_MORE = ("service", "launch")
"""Commands that pass what follows `--` on to another program."""
_MODULES = {"ps": "resident", "stop": "resident", "config": "settings"}
"""The modules of commands whose names differ from the commands'."""


def run(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names, and return its exit code; a usage error exits with 2."""
    name = arguments[0]
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = make_parser(only=name)
    options = parser.parse_args(arguments[:split])
    options.more = list(arguments[split + 1 :])
    signals.raise_stopped()  # so that a command which is ended clears up
    try:
        if options.more and name not in _TAKE_MORE:
            raise UsageError(f"{name} starts no other program; leave out -- and what follows it")
        module = import_module(f"mlx_overlay_server.command.{_MODULES.get(name, name)}")
        command: Callable[[argparse.Namespace], int] = getattr(module, name)
        status = command(options)
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
        return status
    except OverlayError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:  # such as a full disk that the output goes to
        if sys.stdout is not None:  # or Python would try to write it again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has gone, as in `mlx-omni-server ls | head`
            return 0
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
