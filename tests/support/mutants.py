"""`make mutants`: small faults put into the pure modules one at a time, to see whether a test notices each.

Cosmic Ray makes the faults and runs the tests, in a copy of the repository: stopping it leaves no fault behind.
Run as `python -m tests.support.mutants [--sample N] [WORD…]`, from the top; words choose the modules whose paths hold
one. With a sample, at most N of a module's faults are tried, always the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

MODULES = {
    "overlay/hf_overlay/catalog/index.py": ["tests/overlay/catalog/test_index.py"],
    "overlay/hf_overlay/catalog/plan.py": ["tests/overlay/catalog/test_plan.py"],
    "overlay/hf_overlay/catalog/walk.py": [
        "tests/overlay/catalog/test_discovery.py",
        "tests/overlay/catalog/test_index.py",
        "tests/overlay/test_abreast.py",
    ],
    "overlay/hf_overlay/gateway/connection.py": ["tests/overlay/gateway/test_connections.py"],
    "overlay/hf_overlay/gateway/upstream.py": [
        "tests/overlay/gateway/test_connections.py",
        "tests/overlay/gateway/test_headers.py",
        "tests/overlay/gateway/test_upstream.py",
    ],
    "overlay/hf_overlay/hfcache.py": ["tests/overlay/test_hfcache*.py", "tests/overlay/catalog/test_discovery.py"],
    "overlay/hf_overlay/tree/blobstore.py": ["tests/overlay/tree/test_blobstore.py"],
    "overlay/hf_overlay/tree/lease.py": [
        "tests/overlay/tree/test_dead_or_alive.py",
        "tests/overlay/tree/test_lease*.py",
    ],
    "overlay/hf_overlay/tree/writeback.py": [
        "tests/overlay/tree/test_links_stay_inside.py",
        "tests/overlay/tree/test_payloads_outlive_refreshes.py",
        "tests/overlay/tree/test_writeback*.py",
    ],
    "overlay/hf_overlay/tree/shared.py": ["tests/overlay/tree/test_shared.py"],
    "overlay/hf_overlay/tree/usage.py": ["tests/overlay/tree/test_usage.py"],
    "server/mlx_overlay_server/access.py": ["tests/server/test_access.py"],
    "server/mlx_overlay_server/api/guard.py": ["tests/server/api/test_guard*.py"],
    "server/mlx_overlay_server/chat/prompt.py": ["tests/server/chat/test_prompt*.py"],
    "server/mlx_overlay_server/chat/reader.py": ["tests/server/chat/test_reader*.py"],
    "server/mlx_overlay_server/configuration.py": [
        "tests/server/test_configuration.py",
        "tests/server/test_server_table.py",
    ],
    "server/mlx_overlay_server/engine/disk/blocks.py": ["tests/server/engine/disk/test_blocks.py"],
    "server/mlx_overlay_server/engine/disk/store.py": ["tests/server/engine/disk/test_store.py"],
    "server/mlx_overlay_server/encoding/texts.py": ["tests/server/encoding/test_texts.py"],
    "server/mlx_overlay_server/engine/pace.py": ["tests/server/engine/test_pace.py"],
    "server/mlx_overlay_server/engine/prefix_cache.py": ["tests/server/engine/test_prefix*.py"],
    "server/mlx_overlay_server/engine/sampling.py": [
        "tests/server/engine/test_sampling*.py",
        "tests/server/engine/test_reasoning_budget.py",
    ],
    "server/mlx_overlay_server/live.py": ["tests/server/test_live.py", "tests/server/test_profiles.py"],
    "server/mlx_overlay_server/models/pool.py": ["tests/server/models/test_pool*.py"],
    "server/mlx_overlay_server/profiles.py": ["tests/server/test_profiles.py", "tests/server/test_server_table.py"],
    "server/mlx_overlay_server/recent.py": ["tests/server/test_recent.py"],
}
"""Module -> patterns of the fast tests that guard it. A module that moves is renamed here and nowhere else."""

# One or two other operators stand for all of their kind. `|` is mostly in annotations, `*` mostly in signatures.
_ARITHMETIC = "Add_Sub|Sub_Add|Div_Mul|FloorDiv_Mul|Mod_Add|Pow_Mul|BitAnd_BitOr"
_COMPARISONS = (
    "Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is|In_NotIn|NotIn_In"
)
LEFT_OUT = [
    f"core/ReplaceBinaryOperator_(?!({_ARITHMETIC})$).*",
    f"core/ReplaceComparisonOperator_(?!({_COMPARISONS})$).*",
]
COPIED = ("overlay", "server", "tests", "pyproject.toml")


def main(arguments: Sequence[str]) -> None:
    """Try every chosen module; the score and each fault that no test noticed go to standard output."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.mutants")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("words", nargs="*", metavar="WORD")
    options = parser.parse_args(arguments)
    words = options.words
    chosen = [path for path in MODULES if not words or any(word in path for word in words)]
    total = killed = 0
    with TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        for name in COPIED:
            _copy(Path(name), tree / name)
        _announce(tree / "tests.dist-info")
        for path in chosen:
            started = time.monotonic()
            faults = list(_try(tree, path, options.sample))
            survivors = [fault for fault in faults if fault]
            total, killed = total + len(faults), killed + len(faults) - len(survivors)
            print(f"{path}: {_score(len(faults) - len(survivors), len(faults))} in {time.monotonic() - started:.0f} s")
            print(*survivors, sep="\n", end="\n" * bool(survivors), flush=True)
    print(f"noticed: {_score(killed, total)}")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "e2e"))
    else:
        shutil.copy2(source, target)


def _announce(folder: Path) -> None:
    """Make an installed distribution of the copy, as far as Cosmic Ray looks: where more operators are."""
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: tests\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        "[cosmic_ray.operator_providers]\ndeletions = tests.support.deletions:Provider\n"
    )


def _try(tree: Path, path: str, sample: int | None) -> Iterator[str]:
    """One entry for each fault in a module: empty where a test noticed it, else the fault as a diff."""
    tests = sorted({str(found) for pattern in MODULES[path] for found in Path().glob(pattern)})
    if not tests or not Path(path).is_file():
        sys.exit(f"{path}: the module or its tests are gone; mend MODULES in {__file__}")
    command = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider {' '.join(tests)}"
    environ = {**os.environ, "PYTHONPATH": f"{tree}:{tree}/overlay:{tree}/server", "PYTHONDONTWRITEBYTECODE": "1"}
    started = time.monotonic()
    if subprocess.run(command.split(), cwd=tree, env=environ, stdout=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"{path}: its tests fail without any fault: {command}")
    seconds = 10 + 5 * (time.monotonic() - started)
    settings = {"module-path": path, "timeout": seconds, "excluded-modules": [], "test-command": command}
    lines = ["[cosmic-ray]", *(f"{name} = {json.dumps(value)}" for name, value in settings.items())]
    lines += ["[cosmic-ray.distributor]", 'name = "local"', "[cosmic-ray.filters.operators-filter]"]
    (tree / "settings.toml").write_text("\n".join([*lines, f"exclude-operators = {json.dumps(LEFT_OUT)}"]))
    bin_ = Path(sys.executable).parent
    session = f"{Path(path).stem}.sqlite"

    def do(command: str, *arguments: str) -> None:
        subprocess.run([bin_ / command, *arguments], cwd=tree, env=environ, check=True)

    do("cosmic-ray", "init", "settings.toml", session)
    do("cr-filter-operators", session, "settings.toml")
    if sample is not None:
        _leave_out_all_but(sample, tree / session)
    do("cosmic-ray", "exec", "settings.toml", session)
    dump = subprocess.run([bin_ / "cosmic-ray", "dump", session], cwd=tree, check=True, capture_output=True, text=True)
    for line in dump.stdout.splitlines():
        item, result = json.loads(line)
        if result is None or result["worker_outcome"] == "skipped":
            continue
        yield "" if result["test_outcome"] == "killed" else _described(item, result)


def _leave_out_all_but(sample: int, session: Path) -> None:
    """Take faults out of Cosmic Ray's list until so many are left to be tried, by lot with a fixed seed."""
    with closing(sqlite3.connect(session)) as base, base:
        query = (
            "SELECT job_id FROM mutation_specs WHERE job_id NOT IN (SELECT job_id FROM work_results) "
            "ORDER BY operator_name, occurrence"
        )
        left = [job for (job,) in base.execute(query)]
        gone = Random(0).sample(left, max(0, len(left) - sample))
        for table in ("mutation_specs", "work_items"):
            base.executemany(f"DELETE FROM {table} WHERE job_id = ?", [(job,) for job in gone])


def _described(item: dict[str, Any], result: dict[str, Any]) -> str:
    """A fault in two lines: where it is, what stood there, and what the tests did not notice in its place."""
    (fault,) = item["mutations"]
    changed = [
        line[1:].strip()
        for line in (result["diff"] or str(result)).splitlines()
        if line[:1] in "+-" and not line.startswith(("+++", "---"))
    ]
    return f"  line {fault['start_pos'][0]}: " + "\n    -> ".join(changed)


def _score(killed: int, total: int) -> str:
    return f"{killed} of {total} faults ({killed / max(total, 1):.0%})"


if __name__ == "__main__":
    main(sys.argv[1:])
