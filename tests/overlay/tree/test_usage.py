"""P3: a tree is over only when no program uses it; what cannot be found out counts as use."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hf_overlay.config import OWNER_FILE
from hf_overlay.tree import announced, usage
from hf_overlay.tree.clear import clear_dead

from tests.support.processes import PYTHON, eventually
from tests.support.sessions import new_name

NAME = new_name()


@pytest.fixture
def session(tmp_path: Path) -> Path:
    """A session whose owner is dead."""
    path = tmp_path / "sessions" / NAME
    (path / "hubs/1").mkdir(parents=True)
    (path / "home").mkdir()
    (path / "home/hub").symlink_to("../hubs/1")
    (path / OWNER_FILE).write_text("{}")
    return path


def is_used(session: Path) -> bool:
    return usage.in_use([str(session)]) == {str(session)}


@contextmanager
def program(*command: str, cwd: Path | None = None, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """One that has said that it is up, and waits."""
    script = f"import sys\n{';'.join(command) or 'pass'}\nprint('up', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [PYTHON, "-c", script], cwd=cwd, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Programs ------------------------------------------------------------------------------------------------------------

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")


@ON_LINUX
def test_a_tree_that_no_program_uses_is_over(session: Path) -> None:
    with program():
        assert not is_used(session)


@ON_LINUX
def test_a_program_with_the_tree_in_its_environment_uses_it_until_it_ends(session: Path) -> None:
    with program(HF_HUB_CACHE=str(session / "home/hub")):
        assert is_used(session)
        assert clear_dead(str(session.parent)) == []
    assert [each.path for each in clear_dead(str(session.parent))] == [str(session)]


@ON_LINUX
def test_a_program_that_works_in_the_tree_or_has_a_file_of_it_open_uses_it(session: Path) -> None:
    with program(cwd=session / "hubs/1"):
        assert is_used(session)
    (session / "hubs/1/x").write_text("x")
    with program(f"file = open('{session}/home/hub/x')"):
        assert is_used(session)
    with program(f"import os; file = open('{session}/home/hub/x'); os.unlink(file.name)"):
        assert is_used(session)
    assert not is_used(session)


@ON_LINUX
def test_who_looks_whether_the_owner_is_alive_and_what_waits_for_a_program_do_not_use_the_tree(session: Path) -> None:
    with program(f"file = open('{session}/{OWNER_FILE}')"):
        assert not is_used(session)
    tracked = "from multiprocessing import resource_tracker; resource_tracker.ensure_running()"
    change = f"import os; os.environ['HF_HUB_CACHE'] = '{session}/home/hub'"  # as a server does with its own
    with program(change, tracked):
        assert not is_used(session)


@ON_LINUX
def test_a_chain_of_programs_that_start_the_next_and_end_is_never_missed(session: Path, tmp_path: Path) -> None:
    """Each is over before the list of processes can be read twice."""
    enough = tmp_path / "enough"
    chain = (
        "import os, sys, time\nend = time.time() + 60\n"
        f"while time.time() < end and not os.path.exists({str(enough)!r}):\n"
        "    if os.fork():\n        os._exit(0)\n    os.setsid()\n"
    )
    environ = {"HF_HUB_CACHE": str(session / "home/hub")}
    with subprocess.Popen([PYTHON, "-c", chain], env=environ):
        pass
    try:
        looks = [is_used(session) for _ in range(20)]
    finally:
        enough.touch()
    assert looks == [True] * 20
    eventually(lambda: not is_used(session), "they end")


def test_a_tree_that_another_session_takes_for_the_real_cache_is_in_use(session: Path) -> None:
    inner = session.parent / "session-2-def"
    inner.mkdir()
    record = f'{{"pid": 2, "started": 1, "sources": [], "hub_cache": "{session}/home/hub", "service": {{}}}}'
    (inner / OWNER_FILE).write_text(record)
    assert usage.in_use([str(session), str(inner)], processes=lambda: iter(())) == {str(session)}


def test_what_cannot_be_found_out_counts_as_use(session: Path, tmp_path: Path) -> None:
    def fail() -> usage.Processes:
        raise PermissionError

    assert usage.in_use([str(session)], processes=fail) == {str(session)}
    assert usage.in_use([], processes=fail) == set()
    for proc in (tmp_path / "none", tmp_path):
        assert usage.in_use([str(session)], processes=partial(usage.by_proc, str(proc))) == {str(session)}


# macOS ---------------------------------------------------------------------------------------------------------------


def by_ps_and_lsof(session: Path, ps: bytes, lsof: bytes) -> set[str]:
    def run(command: Sequence[str]) -> bytes:
        return ps if command[0].endswith("/ps") else lsof

    return usage.in_use([str(session)], processes=lambda: usage.by_ps_and_lsof(run))


def test_ps_tells_of_environments_and_lsof_of_files(session: Path) -> None:
    tree = os.fsencode(session / "home/hub")
    tracker = b"  3 python -c from multiprocessing.resource_tracker import main;main(5) HF_HUB_CACHE=" + tree
    owner = b"p4\nf5\nn" + os.fsencode(session / OWNER_FILE)
    assert by_ps_and_lsof(session, b"  1 /sbin/launchd\n" + tracker, b"p1\nfcwd\nn/\n" + owner) == set()
    assert by_ps_and_lsof(session, b"  7 python x.py A=b HF_HUB_CACHE=" + tree + b" C=d\n", b"") == {str(session)}
    assert by_ps_and_lsof(session, b"  7 python x.py\n", b"p7\nfcwd\nn" + tree + b"\n") == {str(session)}


@pytest.mark.parametrize("command", [("false",), ("no-such-program",), ("sleep", "60")])
def test_a_tool_that_fails_or_hangs_has_found_out_nothing(
    command: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "LOOK_SECONDS", 0.2)
    with pytest.raises(OSError):
        usage._output(command)


# Locks ---------------------------------------------------------------------------------------------------------------


def nobody() -> usage.Processes:
    return iter(())


def test_a_held_lock_of_what_was_written_into_the_tree_or_announced_keeps_it(session: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    (session / "hubs/1/models--org--written/blobs").mkdir(parents=True)
    (session / "hubs/1/models--org--linked").symlink_to(hub / "models--org--linked")
    (session / "hubs/1/.locks").symlink_to(hub / ".locks")
    announced.make(str(session), f"{hub}/models--org--announced/snapshots")
    for repo, keeps in [("written", True), ("announced", True), ("linked", False)]:
        lock = hub / f".locks/models--org--{repo}/{'a' * 64}.lock"
        with locked(lock):
            assert usage.in_use([str(session)], nobody) == ({str(session)} if keeps else set()), repo
        assert usage.in_use([str(session)], nobody) == set(), "a lock that nobody holds keeps nothing"


def test_the_trees_own_locks_keep_it(session: Path) -> None:
    """Those of a client where the real cache has none yet."""
    with locked(session / "hubs/1/.locks/models--org--new/x.lock"):
        assert usage.in_use([str(session)], nobody) == {str(session)}


def test_a_lock_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert not usage.is_held(str(tmp_path / "none/x.lock"))
    assert list(tmp_path.iterdir()) == []
    os.mkfifo(tmp_path / "fifo.lock")
    assert not usage.is_held(str(tmp_path / "fifo.lock"))
    (tmp_path / "folder.lock").mkdir()
    assert usage.is_held(str(tmp_path / "folder.lock"))
