"""The command of `make soak`: prints a row for each campaign, and exits 1 when a promise was broken."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory

from tests.support import soak
from tests.support.processes import signals_reach_children


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaigns that are named, or all, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.soak", description="Break things at random.")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for each campaign, without its start (default: 60)"
    )
    parser.add_argument("--seed", type=int, help="draws the same faults as a run that printed it (default: a new one)")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(soak.CAMPAIGNS)}")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.campaigns if name not in soak.CAMPAIGNS]:
        parser.error(f"there is no campaign {', '.join(unknown)}; there are {', '.join(soak.CAMPAIGNS)}")
    seed = SystemRandom().randrange(10**6) if options.seed is None else options.seed
    is_broken = False
    if not options.json:
        print(f"{'seed ' + str(seed):<14}{'tried':>8}{'lost':>8}{'waited':>10}{'held':>8}")
    for name in options.campaigns or soak.CAMPAIGNS:
        with TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder, signals_reach_children():
            row = soak.run(name, Path(folder, name), options.seconds, seed)
        is_broken = is_broken or bool(row.broken)
        if options.json:
            print(json.dumps({"campaign": name, "seed": seed, **row._asdict()}), flush=True)
        else:
            print(f"{name:<14}{row.tried:>8}{row.lost:>8}{row.waited:>8.2f} s{row.held:>8}", flush=True)
            print(*(f"  broken: {what}" for what in row.broken), sep="\n", end="\n" * bool(row.broken), flush=True)
    return int(is_broken)


if __name__ == "__main__":
    sys.exit(main())
