"""The command line of `mlx-omni-server`: its commands with their options, beside the options for serving."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from mlx_overlay_server import arguments, options
from mlx_overlay_server.command import NAMES
from mlx_overlay_server.settings import API_KEY_VARIABLE

_TEXTS = {
    "ls": "list the models that requests can name",
    "pull": "download a model from the Hub into the Hugging Face cache",
    "ps": "list the models that the running server holds in memory",
    "stop": "unload a model from the running server's memory",
    "bench": "measure how fast a model reads and answers here, with 1, 8 and 32 streams",
    "doctor": "diagnose problems and suggest fixes",
    "config": "print the settings in force, and where each comes from",
    "key": "make API keys with names for the configuration file",
    "service": "start the server at login: launchd or systemd",
    "launch": "start a coding agent that uses a model of this machine",
    "completion": "print a completion script for your shell",
}

AGENTS = ("claude", "codex", "opencode", "aider")
"""The help about the agents that `launch` starts."""

_LAUNCH_EXAMPLES = """\
What follows -- are arguments of the agent. A server is started where none runs, and ends with the agent. None of your
files is changed: the agent gets all it needs in its own environment.

examples:
  mlx-omni-server launch claude
  mlx-omni-server launch codex --model qwen3-coder -- exec "What does this project do?"
"""

_SERVICE_EXAMPLES = """\
What follows -- are options of mlx-omni-server. The unit also carries the shell's variables that it reads: HF_HOME,
MLX_OMNI_MODEL_PATH, HF_TOKEN, proxies, …

examples:
  mlx-omni-server service install -- --model-path /Volumes/LLMS/models
  mlx-omni-server service status
  mlx-omni-server service uninstall
"""


_KEY_EXAMPLES = """\
The file that `mlx-omni-server config` names gets the hash of a key. A server that runs takes it at once.

examples:
  mlx-omni-server key add ann
  mlx-omni-server key add bob --model qwen:code --rate 60
  mlx-omni-server key ls
"""

_COMPLETION_EXAMPLES = """\
examples:
  eval "$(mlx-omni-server completion bash)"         also for zsh and tcsh
  mlx-omni-server completion fish | source
"""


def make_parser(only: str = "", *, with_options: bool = True) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, for `main` and for shell completion.

    `only` names the one command whose options are made; empty: those of serving and of all commands. Without
    `with_options`, commands are only named, as in the help for serving, because making their options takes longer than
    everything else.
    """
    parser = argparse.ArgumentParser(prog=options.PROGRAM) if only else options.make_parser()
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands beside serving")
    for name in (only,) if only else NAMES:
        text = _TEXTS[name]
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if with_options:
            _OPTIONS[name](command)
    return parser


def _ls(parser: argparse.ArgumentParser) -> None:
    options.add_folders(parser)
    _add_json(parser)


def _pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="org/name, as on the Hub")
    options.add_folders(parser)
    _add_json(parser)


def _ps(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    _add_json(parser)


def _stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an id, or a part of one that no other model in memory has")
    parser.add_argument("--force", action="store_true", help="also while requests use it, which end with an error then")
    _add_server(parser)
    _add_json(parser)


def _bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="MODEL", help="an id, or a part of one that no other model has")
    parser.add_argument(
        "--streams", type=_numbers, default=(1, 8, 32), metavar="N,…", help="streams at once; default: 1,8,32"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=arguments.positive,
        default=512,
        metavar="TOKENS",
        help="about how long each prompt is; default: 512",
    )
    parser.add_argument(
        "--tokens", type=arguments.positive, default=128, metavar="TOKENS", help="tokens of each answer; default: 128"
    )
    options.add_folders(parser)
    _add_server(parser)
    _add_json(parser)


def _doctor(parser: argparse.ArgumentParser) -> None:
    options.add_folders(parser)
    _add_server(parser)
    _add_json(parser)


def _config(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{options.PROGRAM} config [options]"
    options.add_options(parser)
    _add_json(parser)


def _key(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _KEY_EXAMPLES
    parser.add_argument("action", choices=["add", "ls"], help="make a key and print it; list the names of all keys")
    parser.add_argument("name", metavar="NAME", nargs="?", help="who the key is for")
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="ID",
        help="a model that it is for; may be repeated; default: all",
    )
    parser.add_argument("--rate", type=arguments.positive, metavar="N", help="requests that it may send in a minute")
    _add_json(parser)


def _service(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{options.PROGRAM} service [options] {{install,uninstall,status}} [-- OPTION …]"
    parser.epilog = _SERVICE_EXAMPLES
    parser.add_argument(
        "action",
        choices=["install", "uninstall", "status"],
        help="start it now and at each login; end it, for now and for each login; print whether it runs",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="also overwrite or remove a unit (the file for launchd or systemd) that this command did not write",
    )
    _add_json(parser)


def _launch(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{options.PROGRAM} launch [options] AGENT [-- ARGUMENT …]"
    parser.epilog = _LAUNCH_EXAMPLES
    parser.add_argument("agent", metavar="AGENT", choices=AGENTS, help=", ".join(AGENTS))
    parser.add_argument(
        "--model", metavar="MODEL", help="an id, alias or profile, or a part of one; default: the best one that is able"
    )
    options.add_folders(parser)
    _add_server(parser)


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _COMPLETION_EXAMPLES
    parser.add_argument("shell", choices=options.SHELLS)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(arguments.positive(part) for part in text.split(","))


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", metavar="URL", help="the running server; default: the one that runs here, as http://127.0.0.1:10240"
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"its key, if it has one; safer in {API_KEY_VARIABLE}")


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "ls": _ls,
    "pull": _pull,
    "ps": _ps,
    "stop": _stop,
    "bench": _bench,
    "doctor": _doctor,
    "config": _config,
    "key": _key,
    "service": _service,
    "launch": _launch,
    "completion": _completion,
}
"""The functions that add each command's options to its parser."""
