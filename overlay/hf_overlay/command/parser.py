"""The command line of `hf-overlay`: its commands, options and help."""

from __future__ import annotations

import argparse
import os
import sys
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
    make = partial(argparse.ArgumentParser, formatter_class=formatter)
    common = make(add_help=False)
    model_path = common.add_argument(
        "--model-path", action="append", default=[], metavar="DIR", help="a folder of models; repeat it for more"
    )
    model_path.complete = folders  # type: ignore[attr-defined]  # shtab looks for it there
    below = common.add_argument(
        "--below",
        action="append",
        default=[],
        metavar="DIR",
        help="a Hugging Face cache or a folder of models behind your own cache, only read; repeat it for more",
    )
    below.complete = folders  # type: ignore[attr-defined]
    common.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="ID=DIR",
        help="this folder answers to this id (org/name, datasets/org/name), before all else; repeat it for more",
    )
    common.add_argument(
        "--kind",
        choices=get_args(config.Kind),
        help="models that mlx-lm can load, or any (transformers, diffusers, …); "
        "default: mlx if mlx-lm is installed beside hf-overlay, else any",
    )
    common.add_argument("--all-kinds", dest="kind", action="store_const", const="any", help="the same as --kind any")
    common.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="ID",
        help="load this id from the Hugging Face cache and the Hub, not from your folder; repeat it for more",
    )
    common.add_argument("-q", "--quiet", action="store_true", help="print no warnings and no start-up line")
    common.add_argument("-v", "--verbose", action="store_true", help="print the source each model comes from")
    data = make(add_help=False)
    data.add_argument("--json", action="store_true", help="print JSON")

    parser = make(
        prog="hf-overlay",
        description="Your model folders in front of the Hugging Face cache, for every program that reads the cache.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog=parser.prog)
    unused = make(add_help=False)

    def add(name: str, text: str, *parents: argparse.ArgumentParser, more: str = "") -> argparse.ArgumentParser:
        if only not in ("", name):
            return unused
        return commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=more,
            formatter_class=formatter,
            parents=[*parents],
        )

    network = make(add_help=False)
    network.add_argument("--offline", action="store_true", help="keep programs off the network: HF_HUB_OFFLINE=1")
    network.add_argument(
        "--hold-downloads",
        action="store_true",
        help="download even while the Hugging Face cache is away or read-only, and hold it until a later start "
        "can move it there",
    )
    run = add("run", "run a program that sees your folders and the Hugging Face cache as one cache", common, network)
    run.usage = "hf-overlay run [options] -- COMMAND [ARGUMENT …]"
    serve = add("serve", "keep an overlay open for shells and programs started elsewhere", common, network)
    serve.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="seconds between two scans of your folders (default: 2)",
    )
    env = add("env", "print the variables of the overlay that `serve` keeps open", data, more=ENV_EXAMPLES)
    env.add_argument("--shell", choices=["sh", "fish"], help="sh is also for bash and zsh (default: taken from $SHELL)")
    add("ls", "list the models that can be loaded", common, data)
    add("path", "print the folder that an id is loaded from", common, data).add_argument("id", metavar="ID")
    add("why", "explain which folder an id is loaded from, and why not from the others", common, data).add_argument(
        "id", metavar="ID"
    )
    add("plan", "print the links an overlay would hold, without making it", common, data)
    add("doctor", "diagnose problems and suggest fixes", common, data)
    add("config", "print the settings in force, and where each comes from", common, data, more=CONFIG_EXAMPLES)
    add("clean", "remove the overlays of programs that were killed; their downloads move to the cache", data)
    service = add(
        "service", "start the overlay, or the server, at login: launchd or systemd", data, more=SERVICE_EXAMPLES
    )
    service.usage = "hf-overlay service [options] {install,uninstall,status} [-- OPTION …]"
    service.add_argument("action", choices=["install", "uninstall", "status"])
    service.add_argument("--server", action="store_true", help="mlx-omni-server in place of hf-overlay serve")
    service.add_argument("--replace", action="store_true", help="also overwrite or remove a unit that is not ours")
    completion = add("completion", "print a completion script for your shell")
    completion.add_argument("shell", choices=["bash", "zsh", "fish", "tcsh"])
    add("extension", "make `hf overlay …` run hf-overlay")
    return parser


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
