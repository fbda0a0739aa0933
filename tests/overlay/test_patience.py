"""A disk is given up on when it makes no progress, is not asked again meanwhile, and is back when it answers (P7)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from hf_overlay.helper import Helper
from hf_overlay.mounts import may_hang
from hf_overlay.patience import NoAnswer, Patience
from hf_overlay.progress import alive

from tests.support.processes import SECONDS


@pytest.fixture
def patience() -> Patience:
    return Patience(0.4)


def test_answers_and_errors_come_through(patience: Patience) -> None:
    assert patience.ask("/a", lambda: 5) == 5
    assert patience.ask("/a", lambda: None) is None
    with pytest.raises(FileNotFoundError):
        patience.ask("/a", partial(os.stat, "/nonexistent"))
    with pytest.raises(ZeroDivisionError):
        patience.ask("/a", lambda: 1 // 0)


def test_what_makes_progress_is_slow_and_not_given_up_on(patience: Patience) -> None:
    def slow() -> str:
        for _ in range(10):
            time.sleep(0.08)
            alive()
        return "done"

    assert patience.ask("/a", slow) == "done"


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells how long a thread has worked")
def test_what_uses_the_processor_is_not_given_up_on() -> None:
    """A busy machine takes seconds for what else takes a moment, and no disk hangs for that."""

    def work() -> str:
        began = time.thread_time()
        while time.thread_time() < began + 0.3:
            pass
        return "done"

    assert Patience(0.1).ask("/a", work) == "done"


def test_a_root_that_hangs_is_not_asked_again_until_it_answers(patience: Patience) -> None:
    release = threading.Event()
    with pytest.raises(NoAnswer):
        patience.ask("/a", release.wait)
    threads = threading.active_count()
    asked: list[str] = []
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(NoAnswer):
            patience.ask("/a", lambda: asked.append("again"))
    assert time.monotonic() - started < 100 * 0.4 / 2, "a disk that hangs is waited for again and again"
    assert (asked, threading.active_count() <= threads) == ([], True), "threads pile up behind a disk that hangs"
    assert patience.ask("/b", lambda: "other") == "other"
    release.set()
    while patience.is_waiting_for("/a"):
        time.sleep(0.01)
    assert patience.ask("/a", lambda: "back") == "back"


def test_many_that_hang_take_no_longer_than_one(patience: Patience) -> None:
    release = threading.Event()
    started = time.monotonic()
    answers = patience.ask_each({f"/{number}": release.wait for number in range(50)} | {"/ok": lambda: True})
    assert time.monotonic() - started < 50 * 0.4 / 2
    assert answers.pop("/ok") is True
    assert all(isinstance(answer, NoAnswer) for answer in answers.values())
    release.set()


def _slowly() -> str:
    for _ in range(25):
        time.sleep(0.02)
        alive()
    return "done"


def test_a_helper_answers_raises_reports_and_is_replaced_when_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # for `_slowly`
    reports: list[None] = []
    helper = Helper()

    def ask(function: object) -> object:
        return helper.call(function, lambda: reports.append(None))  # type: ignore[arg-type]

    here = ask(os.getpid)
    assert here != os.getpid()
    assert ask(os.getpid) == here
    with pytest.raises(FileNotFoundError):
        ask(partial(os.stat, "/nonexistent"))
    reports.clear()
    assert ask(_slowly) == "done"
    assert len(reports) > 2
    assert isinstance(here, int)
    os.kill(here, signal.SIGKILL)
    with pytest.raises(OSError, match="has ended"):
        ask(os.getpid)
    assert ask(os.getpid) not in (here, os.getpid())


def test_mounts_are_told_from_the_systems_list_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = {f"{tmp_path}/nas": False, f"{tmp_path}/local": True, f"{tmp_path}/nas/inner": True}
    for system in ("_linux_mounts", "_bsd_mounts"):
        monkeypatch.setattr(f"hf_overlay.mounts.{system}", lambda: mounts)
    (tmp_path / "link").symlink_to("here/../nas/models")
    (tmp_path / "here").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    found = {
        name: may_hang(f"{tmp_path}/{name}")
        for name in ("nas", "nas/models", "link", "link/x", "nas2", "local/x", "here", "loop", "nowhere/x")
    }
    assert {name for name, hangs in found.items() if hangs} == {"nas", "nas/models", "link", "link/x"}


def test_a_process_that_is_stopped_takes_no_disk_for_one_that_hangs(tmp_path: Path) -> None:
    done = tmp_path / "done"
    program = (
        "import sys, time\nfrom hf_overlay.patience import Patience\n"
        "def slow():\n    print('asked', flush=True)\n    time.sleep(1)\n    return 'answer'\n"
        f"open({str(done)!r}, 'w').write(Patience(2.0).ask('/a', slow))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"asked\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.2)
        process.send_signal(signal.SIGCONT)
        assert process.wait(SECONDS) == 0
    assert done.read_text() == "answer"
