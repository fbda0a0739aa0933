"""Client libraries that people use, each installed aside by `make clients`, and how one of them is run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.processes import PYTHON, Finished, environment, finish
from tests.support.server import Server

_ASIDE = Path(sys.prefix, "clients")
_SUITES = Path(__file__).parent / "suites"
_SECONDS = 280


def run(name: str, server: Server, home: Path, *, tests: str | None = None) -> Finished:
    """Run a client's suite against a server, and return how it ended; the test is skipped where the client is not.

    `tests`: the class whose tests pytest runs, where a suite consists of those.
    """
    folder = _ASIDE / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not installed in {folder}, where `make clients` puts it")
    home.mkdir(parents=True, exist_ok=True)
    suite = str(_SUITES / f"{name.replace('-', '_')}_suite.py")
    scope = "asyncio_default_test_loop_scope=session"
    options = ["-q", "-n", "0", "-c", os.devnull, "--rootdir", str(home), "-p", "no:cacheprovider", "-o", scope]
    options += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=session", "--tb", "short"]
    command = [PYTHON, suite] if tests is None else [PYTHON, "-m", "pytest", *options, f"{suite}::{tests}"]
    environ = environment(
        home,
        SERVER_URL=server.url,
        PYTHONPATH=str(folder),
        LANGSMITH_TRACING="false",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
        NO_PROXY="*",
    )
    return finish(command, environ, cwd=home, seconds=_SECONDS)
