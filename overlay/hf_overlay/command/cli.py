"""The command `hf-overlay`. Data goes to stdout, everything else to stderr; 0 done, 1 expected failure, 2 usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hf_overlay import config
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.errors import OverlayError, UsageError
from hf_overlay.models import Code, Model
from hf_overlay.text import printable

EXAMPLES = """\
examples:
  hf-overlay run --model-path /Volumes/LLMS/models -- python my_script.py
  hf-overlay run -- mlx_lm.generate --model mlx-community/Llama-3-8B-Instruct --prompt hi
  hf-overlay ls --model-path /Volumes/LLMS/models
  mlx_lm.generate --model "$(hf-overlay path org/sub/name)" --prompt hi
  hf-overlay why org/name
  hf-overlay serve --model-path /Volumes/LLMS/models     (and in other shells: eval "$(hf-overlay env)")
  hf-overlay doctor

model paths:
  --model-path, as often as you like (the first wins), else MLX_OMNI_MODEL_PATH (several, separated like PATH),
  else the Hugging Face cache alone. Your folders are only ever read.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the one place that turns errors into exit codes."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What follows `--` is the program's own, even where it looks like ours.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = make_parser()
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    try:
        if options.command == "run":
            return _run(options, command)
        if command:
            raise UsageError(f"{options.command} starts no program; leave out what follows --")
        status: int = options.function(options)
        sys.stdout.flush()
        return status
    except OverlayError as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # `hf-overlay ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The whole command line, for `main` and for shell completion."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--model-path", action="append", default=[], metavar="DIR", help="a folder of models; repeat it for more"
    )
    common.add_argument(
        "--all-kinds", action="store_true", help="also models that mlx-lm cannot load (transformers, diffusers, …)"
    )
    common.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="ID",
        help="let the Hugging Face cache and the Hub answer for this id, not your folder; repeat it for more",
    )
    common.add_argument("-q", "--quiet", action="store_true", help="no warnings, no start-up line")
    common.add_argument("-v", "--verbose", action="store_true", help="say which source each model comes from")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--json", action="store_true", help="print JSON")

    parser = argparse.ArgumentParser(
        prog="hf-overlay",
        description="Your model folders in front of the Hugging Face cache, for every program that reads the cache.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, function: Callable[..., int], text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[*parents])
        command.set_defaults(function=function)
        return command

    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--offline", action="store_true", help="no network: no gateway, and HF_HUB_OFFLINE=1")
    run = add("run", _run, "run a program that sees your folders and the cache as one cache", common, network)
    run.usage = "hf-overlay run [options] -- COMMAND [ARGUMENT …]"
    serve = add(
        "serve", _serve, "keep one up, in the foreground, for shells and programs started elsewhere", common, network
    )
    serve.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS", help="how often folders are looked at (default: 2)"
    )
    env = add("env", _env, 'point a shell at the one being served: eval "$(hf-overlay env)"', data)
    env.add_argument("--shell", choices=["sh", "fish"], help="default: by $SHELL; sh is for bash and zsh, too")
    add("ls", _ls, "list every model that can be loaded", common, data)
    add("path", _path, "print the folder to load for an id", common, data).add_argument("id", metavar="ID")
    add("why", _why, "tell which folder answers to an id, and why each other one does not", common, data).add_argument(
        "id", metavar="ID"
    )
    add("plan", _plan, "print what would be linked to what, and change nothing", common, data)
    add("doctor", _doctor, "find what will bite, and what to do about it", common, data)
    add("clean", _clean, "clear what killed programs left behind, now", data)
    completion = add("completion", _completion, "print a completion script for your shell")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


# Commands ------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    from hf_overlay.command import run as launch  # sessions and logging, which no other command needs

    if not command:
        raise UsageError("nothing to run; put the program after --, as in: hf-overlay run -- python my_script.py")
    return launch.run(
        command,
        options.model_path,
        all_kinds=options.all_kinds,
        exclude=options.exclude,
        offline=options.offline,
        verbosity=_verbosity(options),
    )


def _serve(options: argparse.Namespace) -> int:
    from hf_overlay.command import run as launch
    from hf_overlay.command import serve as service

    launch.log_to_stderr(_verbosity(options))
    return service.serve(
        options.model_path,
        all_kinds=options.all_kinds,
        exclude=options.exclude,
        offline=options.offline,
        interval_seconds=options.interval,
    )


def _env(options: argparse.Namespace) -> int:
    from hf_overlay.command import serve as service

    variables = service.offered(os.environ)
    if options.json:
        return _print_json(variables)
    is_fish = os.path.basename(os.environ.get("SHELL", "")) == "fish"
    print(service.as_shell(variables, options.shell or ("fish" if is_fish else "sh")))
    return 0


def _ls(options: argparse.Namespace) -> int:
    catalog = _catalog(options, warn=False)
    choices = catalog.resolutions()
    _warn(catalog, options)
    rows = [
        {
            "id": model_id,
            "source": choice.winner.source,
            "path": choice.winner.path,
            "model_type": choice.winner.model_type,
            "size_bytes": choice.winner.size_bytes,
            "shadows": [model.path for model in choice.shadows],
        }
        for model_id, choice in choices.items()
    ]
    if options.json:
        return _print_json(rows)
    models = [choice.winner for choice in choices.values()]
    return _print_table(
        ("ID", "SOURCE", "SIZE", "TYPE", "PATH"),
        [(model.id, model.source, _size(model), model.model_type or "-", model.path) for model in models],
    )


def _path(options: argparse.Namespace) -> int:
    model = _catalog(options).find(options.id)
    if options.json:
        return _print_json({"id": model.id, "source": model.source, "path": model.path})
    print(printable(model.path))
    return 0


def _why(options: argparse.Namespace) -> int:
    candidates = _catalog(options).explain(options.id)
    if options.json:
        rows = [
            {"path": path, "source": source, "verdict": reason.text, "code": reason.code}
            for path, source, reason in candidates
        ]
        _print_json({"id": options.id, "candidates": rows})
    else:
        for path, source, reason in candidates:
            print(printable(f"{path} ({source}): {reason.text}"))
    return 0 if any(candidate.reason.code is Code.WINS for candidate in candidates) else 1


def _plan(options: argparse.Namespace) -> int:
    from hf_overlay.tree.lease import sessions_folder

    plan = _catalog(options).plan(case_insensitive=_is_case_insensitive(sessions_folder(os.environ)))
    links: list[dict[str, str]] = []
    for name, entry in plan.entries.items():
        if isinstance(entry, str):
            links.append({"link": f"hub/{name}", "target": entry})
        else:
            links += [{"link": f"hub/{name}/{where}", "target": target} for where, target in entry.links]
    left_out = [{"id": model.id, "path": model.path, "reason": reason.text} for model, reason in plan.left_out]
    if options.json:
        return _print_json({"links": links, "left_out": left_out})
    for link in links:
        print(printable(f"{link['link']} -> {link['target']}"))
    for model, reason in plan.left_out:
        _say(f"by path only: {model.id} ({model.path}): {reason.text}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from hf_overlay.command import doctor

    findings = doctor.examine(_catalog(options, warn=False), os.environ)
    if options.json:
        _print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            print(printable(f"{finding.where}: {finding.what}\n    {finding.advice}"))
        if not findings:
            _say("nothing found")
    return 1 if findings else 0


def _clean(options: argparse.Namespace) -> int:
    from hf_overlay import session
    from hf_overlay.tree import lease

    cleared = session.clear_dead(lease.sessions_folder(os.environ))
    if options.json:
        return _print_json([{"session": each.path, "kept": list(each.kept)} for each in cleared])
    for each in cleared:
        print(printable(f"{each.path}: " + (f"kept {', '.join(each.kept)}" if each.kept else "cleared")))
    return 0


def _completion(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(make_parser(), options.shell))
    return 0


# Shared --------------------------------------------------------------------------------------------------------


def _catalog(options: argparse.Namespace, *, warn: bool = True) -> Catalog:
    settings = config.load(
        options.model_path, os.environ, os.getcwd(), all_kinds=options.all_kinds, exclude=options.exclude
    )
    catalog = Catalog(settings)
    if warn:
        _warn(catalog, options)
    if options.verbose:
        _say(f"model paths: {', '.join(settings.roots)}" if settings.roots else "using HuggingFace cache only")
        _say(f"Hugging Face cache: {settings.hub_cache}")
    return catalog


def _warn(catalog: Catalog, options: argparse.Namespace) -> None:
    for warning in catalog.warnings():
        if not options.quiet:
            _say(f"warning: {warning}")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise ValueError(text)
    return seconds


def _verbosity(options: argparse.Namespace) -> int:
    return -1 if options.quiet else 1 if options.verbose else 0


def _is_case_insensitive(folder: str) -> bool:
    """Whether names there that differ in case are one; asked of the nearest folder that exists."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return os.path.exists(folder.swapcase()) and os.path.samefile(folder, folder.swapcase())


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2))
    return 0


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    for number, row in enumerate([header, *rows]):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        print(_bold(line) if number == 0 else line)
    return 0


def _bold(text: str) -> str:
    is_plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if is_plain else f"\033[1m{text}\033[0m"


def _size(model: Model) -> str:
    size = float(model.size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _say(text: str) -> None:
    print(f"hf-overlay: {printable(text)}", file=sys.stderr)
