"""The command `mlx-omni-server`. Plain, it serves; its first word may name another command.

Exit codes: 0 done, 1 an expected failure, 2 a usage error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

from hf_overlay import streams
from hf_overlay.command.ending import exit_status

from mlx_overlay_server import options as options_
from mlx_overlay_server.command import NAMES
from mlx_overlay_server.command.parser import make_parser
from mlx_overlay_server.options import PROGRAM

_COMMANDS = f"there are {', '.join(NAMES)}; without one, {PROGRAM} serves"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or serve until a signal, and return the exit code. Without `argv` it is this process's own."""
    if argv is not None:
        return exit_status(partial(_run, list(argv)), _say)
    streams.prepare()
    status = exit_status(partial(_run, sys.argv[1:]), _say)
    if "mlx" in sys.modules:
        # A thread may wait for lost ranks for ever, and a normal exit under MLX's own threads has aborted processes.
        os._exit(status)
    return status


def _say(text: str) -> None:
    from mlx_overlay_server.command.output import say  # imported here, because only errors need it

    say(text)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in NAMES:
        from mlx_overlay_server.command import dispatch  # imported here, because serving does not need it

        return dispatch.run(arguments)
    return _serve(arguments)


def _serve(arguments: Sequence[str]) -> int:
    # The options of the other commands take longer to make than those for serving, so they are made only when needed.
    names_another = not {*arguments}.isdisjoint(NAMES)
    if names_another or {"-h", "--help"} & {*arguments}:
        parser = make_parser(with_options=names_another)
    else:
        parser = options_.make_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in NAMES:
        from difflib import get_close_matches

        near = get_close_matches(arguments[0], NAMES, 1)
        parser.error(f"there is no command {arguments[0]!r}; " + (f"did you mean {near[0]}?" if near else _COMMANDS))
    options = parser.parse_args(arguments)
    if getattr(options, "command", None) is not None:
        parser.error(f"the command comes first, and then its options: {PROGRAM} {options.command} …")
    if options.version:
        from importlib.metadata import version

        print(f"mlx-omni-server {version('mlx-overlay-server')}")
        return 0
    from mlx_overlay_server import configuration  # before this, because neither --help nor --version needs settings

    try:
        settings = configuration.load(options, os.environ)
    except ValueError as error:
        parser.error(str(error))
    from mlx_overlay_server import run
    from mlx_overlay_server.live import Live

    live = Live(
        settings,
        stamp=partial(configuration.stamp, dict(os.environ)),
        reread=partial(configuration.load, options, dict(os.environ)),
    )
    return run.serve(live)
