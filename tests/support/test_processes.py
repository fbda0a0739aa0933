"""How tests start processes: nothing of how the tests themselves were started reaches them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import PYTHON, environment, signals_reach_children, succeed

TELL = "import signal, sys; print(signal.getsignal(int(sys.argv[1])) == signal.SIG_IGN)"


@contextmanager
def ignoring(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_processes_do_not_ignore_what_the_tests_were_started_to_ignore(number: signal.Signals, tmp_path: Path) -> None:
    def is_ignored_by_a_child() -> bool:
        return succeed([PYTHON, "-c", TELL, str(int(number))], environment(tmp_path)).out == "True\n"

    with ignoring(number):
        assert is_ignored_by_a_child()
        with signals_reach_children():
            signal.raise_signal(number)  # which harms nobody here
            assert not is_ignored_by_a_child()
        assert signal.getsignal(number) is signal.SIG_IGN
