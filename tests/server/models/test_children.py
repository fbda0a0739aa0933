"""Programs that the server starts: never by a fork, which a library may block for ever, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from mlx_overlay_server import children

from tests.support.processes import PYTHON, SECONDS, environment, succeed

FORKS_BLOCK = """
import ctypes, sys, time
_HANDLER = ctypes.CFUNCTYPE(None)(lambda: time.sleep(3600))
_libc = ctypes.CDLL(None)
if sys.platform == "darwin":
    _libc.pthread_atfork(_HANDLER, None, None)
else:
    _libc.__register_atfork(_HANDLER, None, None, None)
"""
"""Python code after which any fork waits for ever, as OpenBLAS's handler does once its threads are gone."""

_SCRIPT = f"""
{FORKS_BLOCK}
import asyncio, os, uvloop
from mlx_overlay_server import children

async def main():
    async with children.running("child", "a word", environ=os.environ) as child:
        child.write(b"hello\\n")
        print([line async for line in child.lines()], await child.wait())

uvloop.run(main())
"""

_CHILD = "import sys; print(sys.argv[1], sys.stdin.readline(), end=''); sys.exit(3)"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_a_program_starts_where_forks_block(modules: Path, tmp_path: Path) -> None:
    (modules / "child.py").write_text(_CHILD)
    done = succeed([PYTHON, "-c", _SCRIPT], environment(tmp_path, PYTHONPATH=str(modules)))
    assert done.out == "[b'a word hello\\n'] 3\n"


def test_the_working_folder_shadows_no_module(modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "child.py").write_text("import json; print(json.__file__)")
    monkeypatch.chdir(tmp_path)
    for name in ("child.py", "json.py"):
        Path(name).write_text("print('mine')")

    async def main() -> list[bytes]:
        async with children.running("child", environ=os.environ) as child:
            return [line async for line in child.lines()]

    (line,) = asyncio.run(main())
    assert b"json/__init__.py" in line


@pytest.mark.parametrize("ignores", [False, True])
def test_a_program_ends_with_its_context_even_one_that_ignores_signals(
    modules: Path, monkeypatch: pytest.MonkeyPatch, ignores: bool
) -> None:
    monkeypatch.setattr(children, "TERMINATE_SECONDS", 0.3)
    (modules / "child.py").write_text(
        f"import os, signal, time\nif {ignores}: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\ntime.sleep(3600)"
    )

    async def main() -> tuple[int, int]:
        async with children.running("child", environ=os.environ) as child:
            async for line in child.lines():
                return int(line), await _ended(child)
        raise AssertionError("it said nothing")

    async def _ended(child: children.Child) -> int:
        await child.end()
        return await child.wait()

    pid, status = asyncio.run(asyncio.wait_for(main(), SECONDS))
    assert status == -(signal.SIGKILL if ignores else signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_program_holds_what_it_inherits_and_nothing_else(modules: Path, tmp_path: Path) -> None:
    (modules / "child.py").write_text(
        "import os, sys\n"
        "def found():\n"
        "    for number in range(3, 5000):\n"
        "        try: yield os.fstat(number).st_ino\n"
        "        except OSError: pass\n"
        "print(*found())"
    )
    held = (tmp_path / "held").open("w")
    other = (tmp_path / "other").open("w")

    async def main() -> list[bytes]:
        async with children.running("child", environ=os.environ, inherit=[held.fileno()]) as child:
            return [line async for line in child.lines()]

    with held, other:
        (line,) = asyncio.run(main())
        found = [int(each) for each in line.split()]
        assert os.fstat(held.fileno()).st_ino in found
        assert os.fstat(other.fileno()).st_ino not in found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_programs_leave_no_descriptor_behind(modules: Path) -> None:
    (modules / "child.py").write_text("print('x')")

    async def main() -> tuple[int, int]:
        counts = []
        for _ in range(3):
            async with children.running("child", environ=os.environ) as child:
                assert [line async for line in child.lines()] == [b"x\n"]
            await asyncio.sleep(0.01)
            counts.append(len(os.listdir("/proc/self/fd")))
        return counts[0], counts[-1]

    first, last = asyncio.run(main())
    assert first == last


def test_writing_to_a_program_that_has_ended_is_no_error(modules: Path) -> None:
    (modules / "child.py").write_text("")

    async def main() -> int:
        async with children.running("child", environ=os.environ) as child:
            status = await child.wait()
            child.write(b"\n")
            return status

    assert asyncio.run(main()) == 0
