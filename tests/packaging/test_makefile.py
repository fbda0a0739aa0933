"""The Makefile's targets that do more than call one command."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


@pytest.mark.mlx_lm
@pytest.mark.parametrize("target", ["make", "server"])
def test_sigterm_to_make_serve_or_to_its_child_ends_both(target: str, models: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    variables = [f"BIN={Path(sys.executable).parent}", f"MODEL_PATH={models}", "ARGS=--port 0 --offline"]
    command = ["make", "-C", str(ROOT), "--assume-old=.venv/.ready", "serve", *variables]
    with log.open("wb") as output:
        make = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: "listening on" in log.read_text(), "the server does not listen")
        children = subprocess.run(["pgrep", "-P", str(make.pid)], capture_output=True, text=True, check=True)
        server = int(children.stdout)

        os.kill(make.pid if target == "make" else server, signal.SIGTERM)

        make.wait(SECONDS)
        wait_for(lambda: not is_alive(server), "the server outlived make")
        assert "stopping" in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(make.pid, signal.SIGKILL)
        make.wait()


def test_help_lists_each_target_where_sed_is_not_gnus(tmp_path: Path) -> None:
    """BSD's sed writes `t` for `\\t`; awk is the same everywhere."""
    (tmp_path / "sed").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "sed").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    listed = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "help"], env=environ, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "help        this list" in listed
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in listed] == targets


@pytest.mark.parametrize(
    ("version", "machine", "is_refused"),
    [("14.5", "arm64", False), ("", "x86_64", False), ("14.5", "x86_64", True), ("13.7", "arm64", True)],
    ids=["Apple silicon", "Linux", "Intel or Rosetta", "older macOS"],
)
def test_a_python_that_mlx_has_no_wheels_for_is_refused_before_anything_is_made(
    tmp_path: Path, version: str, machine: str, is_refused: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import platform\nplatform.mac_ver = lambda: ({version!r}, ('', '', ''), '')\n"
        f"platform.machine = lambda: {machine!r}\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntest "$1" = -c || exit 3\nexec {sys.executable} "$@"\n')  # makes no environment
    python.chmod(0o755)
    venv = tmp_path / "venv"
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={venv}", f"PYTHON={python}", f"{venv}/.ready"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert ("MLX needs an arm64 Python" in done.stderr) is is_refused
    assert ("Setting up" in done.stdout) is not is_refused


@pytest.mark.parametrize("folder", ["overlay/hf_overlay", "server/mlx_overlay_server", "docs"])
def test_every_python_that_is_started_keeps_the_working_folder_off_its_path(folder: str) -> None:
    """-P: else a file of the user's there, such as server.py or queue.py, runs in place of the module of that name."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                assert ast.unparse(node.elts[1]) == "'-P'", f"{path}:{node.lineno}"


def wait_for(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
