"""`mlx-omni-server bench`: measures how fast a model reads and answers on this machine, and prints a table to paste."""

from __future__ import annotations

import argparse
import platform
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version

from mlx_overlay_server.command import models, started
from mlx_overlay_server.command.client import client, running
from mlx_overlay_server.command.measure import Round, measured
from mlx_overlay_server.command.output import print_json, say
from mlx_overlay_server.names import resolved

_HEADER = ("streams", "prompt", "first token (median)", "first token (last)", "prefill", "decode", "decode, all")


def bench(options: argparse.Namespace) -> int:
    """Measure a model with the running server, or with one that is started for it."""
    with ExitStack() as held:
        if options.url is not None or running():
            server = client(options)
            ids = [each["id"] for each in server.get("/v1/models")["data"]]
        else:
            ids = [each.id for each in models.listed(models.catalog(options))]
            resolved(options.id, ids)  # before a server is started in vain
            say("no server runs here: one is started for this")
            server = held.enter_context(started.server(options))
        model = resolved(options.id, ids)
        say(f"loading {model}")
        measured(server, model, 1, prompt_tokens=16, tokens=8)
        rounds = []
        for streams in options.streams:
            say(f"{streams} stream{'s' if streams > 1 else ''} …")
            rounds.append(measured(server, model, streams, prompt_tokens=options.prompt_tokens, tokens=options.tokens))
    if options.json:
        return print_json({"model": model, "machine": _machine(), "rounds": [asdict(each) for each in rounds]})
    print(f"{model}, {options.tokens} tokens a stream; {_machine()}\n")
    for line in table(rounds):
        print(line)
    return 0


def table(rounds: list[Round]) -> list[str]:
    """Return the lines of a table in Markdown, which can also be read in a terminal."""
    rows = [
        (
            str(each.streams),
            f"{each.prompt} tokens",
            f"{each.first_p50:.2f} s",
            f"{each.first_max:.2f} s",
            f"{each.prefill:.0f} tokens/s",
            f"{each.decode:.1f} tokens/s",
            f"{each.total:.0f} tokens/s",
        )
        for each in rounds
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in (_HEADER, *rows)]  # fmt: skip
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def _machine() -> str:
    names = ("mlx-overlay-server", "mlx-lm", "mlx")
    programs = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{programs}, {platform.system()} {platform.machine()}"
