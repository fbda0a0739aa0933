"""The command line of `hf-overlay`: its commands, options and help."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import get_args

from hf_overlay import config

EXAMPLES = """\
examples:
  hf-overlay run --model-path /Volumes/LLMS/models -- python my_script.py
  hf-overlay run -- mlx_lm.generate --model mlx-community/Llama-3-8B-Instruct --prompt hi
  hf-overlay ls --model-path /Volumes/LLMS/models
  hf-overlay run --below /shared/huggingface/hub -- python train.py
  hf-overlay run --map org/name=/data/my-model -- python my_script.py
  mlx_lm.generate --model "$(hf-overlay path org/sub/name)" --prompt hi
  hf-overlay why org/name
  hf-overlay serve --model-path /Volumes/LLMS/models     (and in other shells: eval "$(hf-overlay env)")
  hf-overlay doctor
  hf-overlay config

model paths:
  --model-path, as often as you like (the first wins), else MLX_OMNI_MODEL_PATH (several, separated like PATH),
  else model_path in the file that `hf-overlay config` names, else the Hugging Face cache alone. hf-overlay only ever
  reads your folders.

layers, first to last:
  --map ID=DIR, --model-path DIR, the Hugging Face cache, --below DIR (else HF_OVERLAY_BELOW, separated like PATH)
"""

ENV_EXAMPLES = """\
examples:
  eval "$(hf-overlay env)"         in sh, bash and zsh
  hf-overlay env | source          in fish
  hf-overlay env --json            for a notebook, which sets them before it imports huggingface_hub
"""

CONFIG_EXAMPLES = """\
What comes first wins: flags, then variables, then the file, which is TOML:

  model_path = ["/Volumes/LLMS/models", "~/models"]
  below = ["/shared/huggingface/hub"]
  exclude = ["org/name"]
  [map]
  "org/other" = "/data/my-model"

examples:
  hf-overlay config
  hf-overlay config --json --model-path /Volumes/LLMS/models
  HF_OVERLAY_CONFIG=other.toml hf-overlay config       another file; empty: none
"""

SERVE_EXAMPLES = """\
examples:
  hf-overlay serve --model-path /Volumes/LLMS/models       until Ctrl-C
  eval "$(hf-overlay env)"                                 in another shell, to join it
"""

COMPLETION_EXAMPLES = """\
examples:
  eval "$(hf-overlay completion bash)"         also for zsh and tcsh
  hf-overlay completion fish | source
"""

SERVICE_EXAMPLES = """\
What follows -- are options of `hf-overlay serve`, or with --server of `mlx-omni-server`. The unit also carries the
shell's variables that they read: HF_HOME, MLX_OMNI_MODEL_PATH, HF_TOKEN, proxies, …

examples:
  hf-overlay service install                                     (with the folders that `hf-overlay config` shows)
  hf-overlay service install -- --model-path /Volumes/LLMS/models
  hf-overlay service install --server -- --port 8000
  hf-overlay service status
  hf-overlay service uninstall --server
"""


def make_parser(*, only: str = "", folders: object = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, for `main` and for shell completion.

    `only` names the one command to parse, if that is known: making the parsers of all takes longer than many commands.
    `folders` is how shells complete a folder's name: shtab.DIRECTORY, where completion is asked for.
    """
    # Told the width, or argparse imports shutil, and all compressors with it, for each option that is added.
    formatter = partial(argparse.RawDescriptionHelpFormatter, width=_columns() - 2)
    parser = argparse.ArgumentParser(
        prog="hf-overlay",
        description="Your model folders in front of the Hugging Face cache, for every program that reads the cache.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog=parser.prog)
    for name, (text, more, options) in _COMMANDS.items():
        if only in ("", name):
            command = commands.add_parser(name, help=text, description=text, epilog=more, formatter_class=formatter)
            for add in options:
                add(command, folders)
    return parser


# The options of the commands. Not by argparse's `parents`, which makes each option once more for each command.


def _layers(parser: argparse.ArgumentParser, folders: object) -> None:
    model_path = parser.add_argument(
        "--model-path", action="append", default=[], metavar="DIR", help="a folder of models; repeat it for more"
    )
    model_path.complete = folders  # type: ignore[attr-defined]  # shtab looks for it there
    below = parser.add_argument(
        "--below",
        action="append",
        default=[],
        metavar="DIR",
        help="a Hugging Face cache or a folder of models behind your own cache, only read; repeat it for more",
    )
    below.complete = folders  # type: ignore[attr-defined]
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="ID=DIR",
        help="this folder answers to this id (org/name, datasets/org/name), before all else; repeat it for more",
    )
    parser.add_argument(
        "--kind",
        choices=get_args(config.Kind),
        help="models that mlx-lm can load, or any (transformers, diffusers, …); "
        "default: mlx if mlx-lm is installed beside hf-overlay, else any",
    )
    parser.add_argument("--all-kinds", dest="kind", action="store_const", const="any", help="the same as --kind any")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="ID",
        help="load this id from the Hugging Face cache and the Hub, not from your folder; repeat it for more",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print no warnings and no start-up line")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print which folders are looked at")


def _json(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _network(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.add_argument("--offline", action="store_true", help="keep programs off the network: HF_HUB_OFFLINE=1")
    parser.add_argument(
        "--hold-downloads",
        action="store_true",
        help="download even while the Hugging Face cache is away or read-only, and hold it until a later start "
        "can move it there",
    )


def _run(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.usage = "hf-overlay run [options] -- COMMAND [ARGUMENT …]"


def _serve(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="seconds between two scans of your folders (default: 2)",
    )


def _env(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.add_argument(
        "--shell", choices=["sh", "fish"], help="sh is also for bash and zsh (default: taken from $SHELL)"
    )


def _id(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.add_argument("id", metavar="ID", help="org/name, as `hf-overlay ls` prints it")


def _service(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.usage = "hf-overlay service [options] {install,uninstall,status} [-- OPTION …]"
    parser.add_argument(
        "action",
        choices=["install", "uninstall", "status"],
        help="start it now and at each login; end it, for now and for each login; print whether it runs",
    )
    parser.add_argument("--server", action="store_true", help="mlx-omni-server in place of hf-overlay serve")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="also overwrite or remove a unit (the file for launchd or systemd) that this command did not write",
    )


def _completion(parser: argparse.ArgumentParser, _folders: object) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish", "tcsh"])


_Options = Callable[[argparse.ArgumentParser, object], None]

_COMMANDS: Mapping[str, tuple[str, str, tuple[_Options, ...]]] = {
    "run": (
        "run a program that sees your folders and the Hugging Face cache as one cache",
        "",
        (_layers, _network, _run),
    ),
    "serve": (
        "keep an overlay open for shells and programs started elsewhere",
        SERVE_EXAMPLES,
        (_layers, _network, _serve),
    ),
    "env": ("print the variables of the overlay that `serve` keeps open", ENV_EXAMPLES, (_json, _env)),
    "ls": ("list the models that can be loaded", "", (_layers, _json)),
    "path": ("print the folder that an id is loaded from", "", (_layers, _json, _id)),
    "why": ("explain which folder an id is loaded from, and why not from the others", "", (_layers, _json, _id)),
    "plan": ("print the links an overlay would hold, without making it", "", (_layers, _json)),
    "doctor": ("diagnose problems and suggest fixes", "", (_layers, _json)),
    "config": ("print the settings in force, and where each comes from", CONFIG_EXAMPLES, (_layers, _json)),
    "clean": ("remove the overlays of programs that were killed; their downloads move to the cache", "", (_json,)),
    "service": (
        "start the overlay, or the server, at login: launchd or systemd",
        SERVICE_EXAMPLES,
        (_json, _service),
    ),
    "completion": ("print a completion script for your shell", COMPLETION_EXAMPLES, (_completion,)),
    "extension": ("make `hf overlay …`, of huggingface_hub's command hf, run hf-overlay", "", ()),
}
"""Each command: its help, what follows that in its own help, and what adds its options."""


def _columns() -> int:
    """The width of the terminal, as shutil.get_terminal_size finds it."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):  # there is no stdout, or it is closed, or no terminal
        return 80


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise ValueError(text)
    return seconds
