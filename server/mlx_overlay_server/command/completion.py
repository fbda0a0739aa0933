"""`mlx-omni-server completion`: a script with which a shell completes commands and options."""

from __future__ import annotations

import argparse

import shtab

from mlx_overlay_server.command.parser import make_parser


def completion(options: argparse.Namespace) -> int:
    """Print the script."""
    print(shtab.complete(make_parser(), options.shell))
    return 0
