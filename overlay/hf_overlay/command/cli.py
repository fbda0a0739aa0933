"""The command `hf-overlay`.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an expected failure, 2 a usage error.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from functools import partial

from hf_overlay import config, configfile, streams
from hf_overlay.catalog import kinds
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.command.ending import exit_status
from hf_overlay.command.output import Lines, print_findings, print_json, print_table, say, size
from hf_overlay.command.parser import make_parser
from hf_overlay.config import ConfigFile, Settings
from hf_overlay.errors import UsageError
from hf_overlay.models import Code
from hf_overlay.text import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Without `argv` it is this process's own, which ends with it."""
    if argv is not None:
        return exit_status(partial(_run_command, argv), say)
    streams.prepare()
    gc.disable()  # looks for garbage in what a start makes take milliseconds; what goes on after it enables them
    status = exit_status(partial(_run_command, sys.argv[1:]), say)
    os._exit(status)  # without taking apart all that was imported, which takes milliseconds


def _run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. Raises OverlayError, and SystemExit for a mistake in the options."""
    # What follows `--` is the program's own, even where it looks like ours.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    first = arguments[0] if arguments else ""
    parser = make_parser(only=first if first in (*_COMMANDS, "run") else "")
    options = parser.parse_args(arguments[:split])
    command = arguments[split + 1 :]
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
    return _COMMANDS[options.command](options)


# Commands ------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    from hf_overlay.command import run as launch  # sessions, which few commands need

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
        messages=_messages(options),
    )


def _serve(options: argparse.Namespace) -> int:
    from hf_overlay.command import serve as service

    return service.serve(
        options.model_path,
        below=options.below,
        maps=config.parse_maps(options.map),
        kind=options.kind,
        exclude=options.exclude,
        offline=options.offline,
        hold_downloads=options.hold_downloads,
        interval_seconds=options.interval,
        messages=_messages(options),
    )


def _env(options: argparse.Namespace) -> int:
    from hf_overlay.command import serve as service

    variables, warning = service.offered(os.environ)
    if warning is not None:
        say(f"warning: {warning}")
    if options.json:
        return print_json(variables)
    is_fish = os.path.basename(os.environ.get("SHELL", "")) == "fish"
    print(service.as_shell(variables, options.shell or ("fish" if is_fish else "sh")))
    return 0


def _ls(options: argparse.Namespace) -> int:
    catalog = _catalog(options, warn=False)
    resolutions = catalog.resolutions()
    _warn(catalog, options)
    # With a restriction every model that was found is mlx-lm's; without one it may be, where mlx-lm is installed. What
    # is mapped to an id may be of any kind.
    types = kinds.installed() if catalog.types is None else catalog.types
    kind = {
        model_id: "mlx"
        if catalog.types is not None and resolution.winner.source != "map"
        else kinds.kind_of(resolution.winner, types)
        for model_id, resolution in resolutions.items()
    }
    if options.json:
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
        return print_json(rows)
    models = [resolution.winner for resolution in resolutions.values()]
    if not models and not options.quiet:
        looked = ", ".join([*catalog.settings.roots, catalog.settings.hub_cache, *catalog.settings.below])
        say(f"no models in {looked}; hf-overlay doctor says what was left out there, and why")
    return print_table(
        ("ID", "SOURCE", "KIND", "SIZE", "TYPE", "PATH"),
        [
            (model.id, model.source, kind[model.id], size(model.size_bytes), model.model_type or "-", model.path)
            for model in models
        ],
    )


def _path(options: argparse.Namespace) -> int:
    if config.kind_and_id(options.id)[0] != "models":
        raise UsageError(f"path finds models alone; hf-overlay why {options.id} says where that repo is")
    model = _catalog(options).find(options.id)
    if options.json:
        return print_json({"id": model.id, "source": model.source, "path": model.path})
    print(printable(model.path))
    return 0


def _why(options: argparse.Namespace) -> int:
    candidates = _catalog(options).explain(options.id)
    if options.json:
        rows = [
            {"path": path, "source": source, "verdict": reason.text, "code": reason.code}
            for path, source, reason in candidates
        ]
        print_json({"id": options.id, "candidates": rows})
    else:
        for path, source, reason in candidates:
            print(printable(f"{path} ({source}): {reason.text}"))
    return 0 if any(candidate.reason.code is Code.WINS for candidate in candidates) else 1


def _plan(options: argparse.Namespace) -> int:
    from hf_overlay.tree.lease import sessions_folder

    catalog, folder = _catalog(options, keeps=False), sessions_folder(os.environ)
    plan = catalog.plan(case_insensitive=catalog.answers(folder) and _is_case_insensitive(folder))
    links: list[dict[str, str]] = []
    for name, entry in plan.entries.items():
        if isinstance(entry, str):
            links.append({"link": f"hub/{name}", "target": entry})
        else:
            links += [{"link": f"hub/{name}/{where}", "target": target} for where, target in entry.parts.links]
    left_out = [{"id": model.id, "path": model.path, "reason": reason.text} for model, reason in plan.left_out]
    if options.json:
        return print_json({"links": links, "left_out": left_out})
    for link in links:
        print(printable(f"{link['link']} -> {link['target']}"))
    for model, reason in plan.left_out:
        say(f"by path only: {model.id} ({model.path}): {reason.text}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from hf_overlay import doctor

    findings = doctor.examine(_catalog(options, warn=False, keeps=False), os.environ)
    if not findings and not options.json:
        say("no problems found")
    return print_findings(findings, as_json=options.json)


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
        return print_json(
            {"file": file.path, "is_there": file.text is not None, "settings": [row._asdict() for row in rows]}
        )
    if file.path is not None:
        print(printable(f"{file.path}" + (" (there is none)" if file.text is None else "")))
    return print_table(("SETTING", "VALUE", "ORIGIN"), [line for row in rows for line in row.lines()])


def _clean(options: argparse.Namespace) -> int:
    from hf_overlay.patience import Patience
    from hf_overlay.tree import clear, lease

    patience = Patience()
    folders = lease.all_sessions_folders(os.environ)
    cleared = [each for folder in folders for each in clear.clear_dead(folder, patience, Lines(0))]
    if options.json:
        return print_json([{"session": each.path, "kept": list(each.kept)} for each in cleared])
    for each in cleared:
        print(printable(f"{each.path}: " + (f"kept {', '.join(each.kept)}" if each.kept else "cleared")))
    return 0


def _service_install(options: argparse.Namespace, program_options: Sequence[str]) -> int:
    from hf_overlay.command import service

    _check_service(options)
    service.install(_served(options), program_options, os.environ, replaces=options.replace)
    return 0


def _check_service(options: argparse.Namespace) -> None:
    """Raise UsageError for an option that means nothing to the action."""
    if options.json and options.action != "status":
        raise UsageError(f"service {options.action} prints nothing; leave out --json")
    if options.replace and options.action == "status":
        raise UsageError("service status replaces nothing; leave out --replace")


def _service(options: argparse.Namespace) -> int:
    from hf_overlay.command import service

    _check_service(options)
    if options.action == "uninstall":
        service.uninstall(_served(options), os.environ, replaces=options.replace)
        return 0
    status = service.status(_served(options), os.environ)
    if options.json:
        print_json(status._asdict())
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
    say(f"hf overlay … now runs hf-overlay ({manifest}); to undo: hf extensions remove overlay")
    return 0


_COMMANDS = {
    "serve": _serve,
    "env": _env,
    "ls": _ls,
    "path": _path,
    "why": _why,
    "plan": _plan,
    "doctor": _doctor,
    "config": _config,
    "clean": _clean,
    "service": _service,
    "completion": _completion,
    "extension": _extension,
}
"""All but `run`, which also takes a program."""


# Shared --------------------------------------------------------------------------------------------------------


def _catalog(options: argparse.Namespace, *, warn: bool = True, keeps: bool = True) -> Catalog:
    """What is on the disk; `keeps` what it finds for later commands."""
    settings = _settings(options, configfile.read(os.environ))
    catalog = Catalog(settings, index=config.index_folder(os.environ) if keeps else None)
    if warn:
        _warn(catalog, options)
    if options.verbose:
        say(f"model paths: {', '.join(settings.roots)}" if settings.roots else "using HuggingFace cache only")
        say(f"Hugging Face cache: {settings.hub_cache}")
        for tier in settings.below:
            say(f"below it: {tier}")
        for each in settings.maps:
            say(f"map: {each.full_id} is {each.folder}")
    return catalog


def _settings(options: argparse.Namespace, file: ConfigFile) -> Settings:
    return config.load(
        options.model_path,
        os.environ,
        config.working_folder(),
        kind=options.kind,
        exclude=options.exclude,
        below=options.below,
        maps=config.parse_maps(options.map),
        file=file,
    )


def _warn(catalog: Catalog, options: argparse.Namespace) -> None:
    for warning in catalog.warnings():
        if not options.quiet:
            say(f"warning: {warning}")


def _messages(options: argparse.Namespace) -> Lines:
    return Lines(-1 if options.quiet else 1 if options.verbose else 0)


def _is_case_insensitive(folder: str) -> bool:
    """Whether file names in a folder ignore case, judged by its nearest parent that exists."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return os.path.exists(folder.swapcase()) and os.path.samefile(folder, folder.swapcase())
