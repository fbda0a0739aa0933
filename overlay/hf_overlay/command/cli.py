"""The command `hf-overlay`.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an expected failure, 2 a usage error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from hf_overlay import config, configfile
from hf_overlay.catalog import kinds
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.config import ConfigFile, Settings
from hf_overlay.errors import OverlayError, UsageError
from hf_overlay.models import Code, Model
from hf_overlay.text import printable

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become exit codes here and nowhere else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What follows `--` is the program's own, even where it looks like ours.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = make_parser()
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
    try:
        if options.version:
            from importlib.metadata import version

            print(f"hf-overlay {version('hf-overlay')}")
            return 0
        if options.command is None:
            if command:
                raise UsageError("put a command before --, as in: hf-overlay run -- python my_script.py")
            parser.print_help()
            return 0
        if options.command == "run":
            return _run(options, command)
        if options.command == "service" and options.action == "install":
            return _service_install(options, command)
        if command:
            raise UsageError(f"hf-overlay {options.command} runs no program; leave out -- and the rest")
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


def make_parser(*, folders: object = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, for `main` and for shell completion.

    `folders` is how shells complete a folder's name: shtab.DIRECTORY, where completion is asked for.
    """
    common = argparse.ArgumentParser(add_help=False)
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
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--json", action="store_true", help="print JSON")

    parser = argparse.ArgumentParser(
        prog="hf-overlay",
        description="Your model folders in front of the Hugging Face cache, for every program that reads the cache.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(
        name: str, function: Callable[..., int], text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[*parents])
        command.set_defaults(function=function)
        return command

    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--offline", action="store_true", help="keep programs off the network: HF_HUB_OFFLINE=1")
    network.add_argument(
        "--hold-downloads",
        action="store_true",
        help="download even while the Hugging Face cache is away or read-only, and hold it until a later start "
        "can move it there",
    )
    run = add(
        "run", _run, "run a program that sees your folders and the Hugging Face cache as one cache", common, network
    )
    run.usage = "hf-overlay run [options] -- COMMAND [ARGUMENT …]"
    serve = add("serve", _serve, "keep an overlay open for shells and programs started elsewhere", common, network)
    serve.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="seconds between two scans of your folders (default: 2)",
    )
    env = add("env", _env, 'print the variables of the overlay that `serve` keeps open: eval "$(hf-overlay env)"', data)
    env.add_argument("--shell", choices=["sh", "fish"], help="sh is also for bash and zsh (default: taken from $SHELL)")
    add("ls", _ls, "list the models that can be loaded", common, data)
    add("path", _path, "print the folder that an id is loaded from", common, data).add_argument("id", metavar="ID")
    add(
        "why", _why, "explain which folder an id is loaded from, and why not from the others", common, data
    ).add_argument("id", metavar="ID")
    add("plan", _plan, "print the links an overlay would hold, without making it", common, data)
    add("doctor", _doctor, "diagnose problems and suggest fixes", common, data)
    add("config", _config, "print the settings in force, and where each comes from", common, data)
    add("clean", _clean, "remove the overlays of programs that were killed; their downloads move to the cache", data)
    service = add("service", _service, "start the overlay, or the server, at login: launchd or systemd", data)
    service.usage = "hf-overlay service [options] {install,uninstall,status} [-- OPTION …]"
    service.epilog = SERVICE_EXAMPLES
    service.formatter_class = argparse.RawDescriptionHelpFormatter
    service.add_argument("action", choices=["install", "uninstall", "status"])
    service.add_argument("--server", action="store_true", help="mlx-omni-server in place of hf-overlay serve")
    service.add_argument("--replace", action="store_true", help="also overwrite or remove a unit that is not ours")
    completion = add("completion", _completion, "print a completion script for your shell")
    completion.add_argument("shell", choices=["bash", "zsh", "fish", "tcsh"])
    add("extension", _extension, "make `hf overlay …` run hf-overlay")
    return parser


# Commands ------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    from hf_overlay.command import run as launch  # sessions and logging, which no other command needs

    if not command:
        raise UsageError("nothing to run; put the program after --, as in: hf-overlay run -- python my_script.py")
    return launch.run(
        command,
        options.model_path,
        below=options.below,
        maps=config.parse_maps(options.map),
        kind=options.kind,
        exclude=options.exclude,
        offline=options.offline,
        hold_downloads=options.hold_downloads,
        verbosity=_verbosity(options),
    )


def _serve(options: argparse.Namespace) -> int:
    from hf_overlay.command import run as launch
    from hf_overlay.command import serve as service

    launch.log_to_stderr(_verbosity(options))
    return service.serve(
        options.model_path,
        below=options.below,
        maps=config.parse_maps(options.map),
        kind=options.kind,
        exclude=options.exclude,
        offline=options.offline,
        hold_downloads=options.hold_downloads,
        interval_seconds=options.interval,
    )


def _env(options: argparse.Namespace) -> int:
    from hf_overlay.command import serve as service

    variables, warning = service.offered(os.environ)
    if warning is not None:
        _say(f"warning: {warning}")
    if options.json:
        return _print_json(variables)
    is_fish = os.path.basename(os.environ.get("SHELL", "")) == "fish"
    print(service.as_shell(variables, options.shell or ("fish" if is_fish else "sh")))
    return 0


def _ls(options: argparse.Namespace) -> int:
    catalog = _catalog(options, warn=False)
    resolutions = catalog.resolutions()
    _warn(catalog, options)
    # With a restriction every model is mlx-lm's; without one it may be, where mlx-lm is installed.
    installed = kinds.installed() if catalog.types is None else None
    kind = {
        model_id: "mlx" if catalog.types is not None else kinds.kind_of(resolution.winner, installed)
        for model_id, resolution in resolutions.items()
    }
    rows = [
        {
            "id": model_id,
            "kind": kind[model_id],
            "source": resolution.winner.source,
            "path": resolution.winner.path,
            "model_type": resolution.winner.model_type,
            "size_bytes": resolution.winner.size_bytes,
            "shadows": [model.path for model in resolution.shadows],
        }
        for model_id, resolution in resolutions.items()
    ]
    if options.json:
        return _print_json(rows)
    models = [resolution.winner for resolution in resolutions.values()]
    if not models and not options.quiet:
        looked = ", ".join([*catalog.settings.roots, catalog.settings.hub_cache])
        _say(f"no models in {looked}; hf-overlay doctor says what was left out there, and why")
    return _print_table(
        ("ID", "SOURCE", "KIND", "SIZE", "TYPE", "PATH"),
        [
            (model.id, model.source, kind[model.id], _size(model), model.model_type or "-", model.path)
            for model in models
        ],
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
            _say("no problems found")
    return 1 if findings else 0


def _config(options: argparse.Namespace) -> int:
    from hf_overlay.command import settings

    file = configfile.read(os.environ)
    given = config.in_force(
        options.model_path,
        options.exclude,
        os.environ,
        file,
        below=options.below,
        maps=config.parse_maps(options.map),
    )
    rows = settings.rows(_settings(options, file), given, file, os.environ)
    if options.json:
        return _print_json(
            {"file": file.path, "is_there": file.text is not None, "settings": [row._asdict() for row in rows]}
        )
    if file.path is not None:
        print(printable(f"{file.path}" + (" (there is none)" if file.text is None else "")))
    return _print_table(("SETTING", "VALUE", "ORIGIN"), [line for row in rows for line in row.lines()])


def _clean(options: argparse.Namespace) -> int:
    from hf_overlay.tree import clear, lease

    cleared = clear.clear_dead(lease.sessions_folder(os.environ))
    if options.json:
        return _print_json([{"session": each.path, "kept": list(each.kept)} for each in cleared])
    for each in cleared:
        print(printable(f"{each.path}: " + (f"kept {', '.join(each.kept)}" if each.kept else "cleared")))
    return 0


def _service_install(options: argparse.Namespace, program_options: Sequence[str]) -> int:
    from hf_overlay.command import service

    service.install(_served(options), program_options, os.environ, replaces=options.replace)
    return 0


def _service(options: argparse.Namespace) -> int:
    from hf_overlay.command import service

    if options.action == "uninstall":
        service.uninstall(_served(options), os.environ, replaces=options.replace)
        return 0
    status = service.status(_served(options), os.environ)
    if options.json:
        _print_json(status._asdict())
    else:
        print(printable(f"{status.name}: {status.text}"))
    return 0 if status.pid is not None else 1


def _served(options: argparse.Namespace) -> str:
    return "mlx-omni-server" if options.server else "hf-overlay"


def _completion(options: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(make_parser(folders=shtab.DIRECTORY), options.shell))
    return 0


def _extension(_options: argparse.Namespace) -> int:
    from hf_overlay.command import extension

    manifest = extension.register(os.environ)
    _say(f"hf overlay … now runs hf-overlay ({manifest}); to undo: hf extensions remove overlay")
    return 0


# Shared --------------------------------------------------------------------------------------------------------


def _catalog(options: argparse.Namespace, *, warn: bool = True) -> Catalog:
    settings = _settings(options, configfile.read(os.environ))
    catalog = Catalog(settings)
    if warn:
        _warn(catalog, options)
    if options.verbose:
        _say(f"model paths: {', '.join(settings.roots)}" if settings.roots else "using HuggingFace cache only")
        _say(f"Hugging Face cache: {settings.hub_cache}")
    return catalog


def _settings(options: argparse.Namespace, file: ConfigFile) -> Settings:
    return config.load(
        options.model_path,
        os.environ,
        os.getcwd(),
        kind=options.kind,
        exclude=options.exclude,
        below=options.below,
        maps=config.parse_maps(options.map),
        file=file,
    )


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
    """Whether file names in a folder ignore case, judged by its nearest parent that exists."""
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
