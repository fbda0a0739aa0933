"""A signal that is caught ends nothing: whatever ran when it came, the exit code is the program's own."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment, finish

_PROGRAM = """
import os, signal, sys
from mlx_overlay_server import signals

number = int(sys.argv[1])
signals.raise_stopped()
try:
    exec("os.kill(os.getpid(), number)")
except KeyboardInterrupt:
    print("caught")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_that_comes_while_a_string_is_run_can_be_caught(tmp_path: Path, number: signal.Signals) -> None:
    done = finish([sys.executable, "-c", _PROGRAM, str(int(number))], environment(tmp_path))
    assert (done.status, done.out, done.err) == (0, "caught\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_program_that_was_started_to_ignore_one_still_does(tmp_path: Path, number: signal.Signals) -> None:
    ignores = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n{_PROGRAM}"
    done = finish([sys.executable, "-c", ignores, str(int(number))], environment(tmp_path))
    assert (done.status, done.out, done.err) == (0, "", "")
