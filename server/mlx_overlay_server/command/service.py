"""`mlx-omni-server service`: starts the server at login, by the units that `hf-overlay service --server` writes."""

from __future__ import annotations

import argparse
import os

from hf_overlay.command import service as units
from hf_overlay.errors import UsageError
from hf_overlay.text import printable

from mlx_overlay_server.command.output import print_json


def service(options: argparse.Namespace) -> int:
    """Install, remove or describe the unit."""
    if options.more and options.action != "install":
        raise UsageError(f"service {options.action} takes no options for the server; leave out -- and the rest")
    if options.json and options.action != "status":
        raise UsageError(f"service {options.action} prints nothing; leave out --json")
    if options.replace and options.action == "status":
        raise UsageError("service status replaces nothing; leave out --replace")
    if options.action == "install":
        units.install(units.SERVER, options.more, os.environ, replaces=options.replace)
        return 0
    if options.action == "uninstall":
        units.uninstall(units.SERVER, os.environ, replaces=options.replace)
        return 0
    status = units.status(units.SERVER, os.environ)
    if options.json:
        print_json(status._asdict())
    else:
        print(printable(f"{status.name}: {status.text}"))
    return 0 if status.pid is not None else 1
