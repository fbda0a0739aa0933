"""The folder of kept KV caches: never a byte above its cap, whoever writes, and whatever fails or is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_overlay_server.engine.disk import store as store_
from mlx_overlay_server.engine.disk.store import SUFFIX, File, Store, rounded, victims

from tests.support.processes import PYTHON

_SECTOR = 4096


def _name(number: int) -> str:
    return f"{number:040x}{SUFFIX}"


def _state(block: int, tail: int, number: int) -> str:
    return f"{block:040x}-{tail}-{number:040x}{SUFFIX}"


def _opened(folder: Path, cap: int = 1 << 30, **options: Any) -> Store:
    made = Store(str(folder), cap, **options)
    made.open()
    return made


def _on_disk(folder: Path) -> int:
    """Bytes that all files take, as `du` counts them."""
    return sum(rounded(path.stat().st_size) for path in folder.iterdir())


def _write(store: Store, number: int, size: int = 100, used: int | None = None) -> bool:
    return store.write(_name(number), [bytes(size)], time.time_ns() if used is None else used)


# What is kept -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_found_by_the_next_start(tmp_path: Path) -> None:
    store = _opened(tmp_path / "kv")
    assert store.write(_name(1), [b"ab", b"", b"c"], 5)
    assert store.write(_state(1, 3, 2), [b"d"], 5)
    later = _opened(tmp_path / "kv")
    assert _name(1) in later
    assert bytes(later.read(_name(1))) == b"abc"
    assert later.states(_name(1)) == (_state(1, 3, 2),)
    assert (len(later), later.states(_name(2))) == (2, ())
    assert store.nbytes == later.nbytes == _on_disk(tmp_path / "kv")


def test_only_its_user_may_read_the_folder(tmp_path: Path) -> None:
    """The files hold what users have written."""
    folder = tmp_path / "kv"
    folder.mkdir(mode=0o755)
    store = _opened(folder)
    _write(store, 1)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    store = _opened(folder)
    _write(store, 1)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert _write(store, 2)
    assert [path.name for path in sorted(folder.iterdir())] == [_name(2), "lock"]
    assert _name(1) not in store


# The cap ------------------------------------------------------------------------------------------------------------


@given(
    writes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9 * _SECTOR), st.booleans()), max_size=40),
    sectors=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_cap_holds_whatever_two_servers_write(
    writes: list[tuple[int, int, bool]], sectors: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where they have different ones, the larger always holds, and each one's own when it has written."""
    folder = tmp_path_factory.mktemp("kv")
    both = [_opened(folder, each * _SECTOR) for each in sectors]
    least = _SECTOR
    """Of the lock's file, which alone may be more than a cap."""
    for number, size, is_second in writes:
        store = both[is_second]
        was_there = (folder / _name(number)).exists()
        wrote = _write(store, number, size)
        assert wrote == (folder / _name(number)).exists()
        assert _on_disk(folder) <= max(least, *(each.cap for each in both))
        assert was_there or not wrote or _on_disk(folder) <= max(least, store.cap)
        assert store.nbytes == _on_disk(folder)


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(1, 9), st.integers(0, 5))), st.integers(-3, 30)
)
def test_who_goes_is_the_least_recently_used_and_no_more_than_it_takes(
    files: dict[str, tuple[int, int]], excess: int
) -> None:
    made = {name: File(*each) for name, each in files.items()}
    chosen = victims(made, excess, 4, now=5)
    may_go = {name for name, file in made.items() if file.used < 4}
    if chosen is None:
        assert sum(made[name].size for name in may_go) < excess
        return
    assert set(chosen) <= may_go
    assert sum(made[name].size for name in chosen) >= excess
    assert sum(made[name].size for name in chosen[:-1]) < max(1, excess)
    assert all(made[name].used <= made[other].used for name in chosen for other in may_go - set(chosen))


def test_the_least_recently_used_goes_first_also_where_another_server_used_it(tmp_path: Path) -> None:
    one, other = (_opened(tmp_path, 5 * _SECTOR) for _ in range(2))
    for number in range(4):
        _write(one, number, used=number + 1)
    one.touch(_name(0), 100)
    other.refresh()
    other.touch(_name(1), 100)
    assert _write(one, 9, used=50)
    assert {name for name in map(_name, range(10)) if name in one} == {_name(0), _name(1), _name(3), _name(9)}


def test_nothing_goes_for_what_was_used_before_it(tmp_path: Path) -> None:
    """The end of a conversation never takes the place of its beginning, without which it is of no use."""
    store = _opened(tmp_path, 4 * _SECTOR)
    for number in range(3):
        assert _write(store, number, used=100 - number)
    assert not _write(store, 3, used=97)
    assert len(store) == 3


def test_what_a_clock_that_was_set_back_has_left_goes_first(tmp_path: Path) -> None:
    """Files of a time to come are not kept until that time, and hold up neither a smaller cap nor what is new."""
    later = time.time_ns() + 10**18
    store = _opened(tmp_path, 8 * _SECTOR)
    for number in range(7):
        assert _write(store, number, used=later + number)
    assert _write(store, 10)
    smaller = _opened(tmp_path, 4 * _SECTOR)
    assert _on_disk(tmp_path) == 4 * _SECTOR
    assert _write(smaller, 11)
    assert {_name(10), _name(11)} <= {path.name for path in tmp_path.iterdir()}


def test_a_smaller_cap_holds_from_the_start(tmp_path: Path) -> None:
    store = _opened(tmp_path)
    for number in range(8):
        _write(store, number, used=number)
    assert len(_opened(tmp_path, 4 * _SECTOR)) == 3
    assert _on_disk(tmp_path) == 4 * _SECTOR


def test_the_disk_keeps_free_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10]

    class _Disk:
        f_blocks, f_frsize = 1000, _SECTOR

        @property
        def f_bavail(self) -> int:
            return free[0] - len(list(tmp_path.iterdir()))

    monkeypatch.setattr(os, "statvfs", lambda _: _Disk())
    store = _opened(tmp_path, floor=6 * _SECTOR)
    assert [_write(store, number, used=number) for number in range(5)] == [True] * 5
    assert _on_disk(tmp_path) == 4 * _SECTOR, "three files, and the lock's"
    free[0] = 8  # somebody else fills the disk: what is kept makes room, and no more is written than that
    assert _write(store, 9)
    assert _on_disk(tmp_path) == 2 * _SECTOR
    free[0] = 5
    assert not _write(store, 10)


def test_files_of_others_count_and_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(bytes(3 * _SECTOR))
    store = _opened(tmp_path, 6 * _SECTOR)
    for number in range(5):
        _write(store, number)
    assert (len(store), (tmp_path / "mine.txt").stat().st_size) == (2, 3 * _SECTOR)
    assert _on_disk(tmp_path) == 6 * _SECTOR


# Faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "utime", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_write_that_fails_leaves_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _opened(tmp_path, 4 * _SECTOR)
    _write(store, 1)
    real = getattr(os, call)

    def fails(*arguments: Any, **options: Any) -> Any:
        if call == "write":
            real(arguments[0], arguments[1][:10])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(OSError, match=os.strerror(code)):
            _write(store, 2, 5000)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [_name(1), "lock"]
    assert _name(2) not in store
    assert _write(store, 2)
    assert store.nbytes == _on_disk(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_read(tmp_path: Path) -> None:
    _write(_opened(tmp_path), 1)
    tmp_path.chmod(0o500)
    try:
        store = _opened(tmp_path)
        assert bytes(store.read(_name(1))) == bytes(100)
        with pytest.raises(PermissionError):
            _write(store, 2)
    finally:
        tmp_path.chmod(0o700)


def test_where_nothing_can_be_written_what_is_there_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is read-only to root as well."""
    _write(_opened(tmp_path), 1)
    real = os.open

    def refuses(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuses)
    store = _opened(tmp_path)
    assert bytes(store.read(_name(1))) == bytes(100)
    with pytest.raises(OSError, match="Read-only"):
        _write(store, 2)


def test_another_user_s_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="another user"):
        _opened(tmp_path)


def _replaced(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "link":
        (file.parent / "mine.txt").write_bytes(b"mine")
        os.utime(file.parent / "mine.txt", ns=(1, 1))
        file.symlink_to("mine.txt")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_any_more_is_not_read_nor_changed_and_not_asked_for_again(kind: str, tmp_path: Path) -> None:
    store = _opened(tmp_path)
    _write(store, 1)
    _replaced(tmp_path / _name(1), kind)
    store.touch(_name(1), 5)
    with pytest.raises(OSError, match=r"symbolic|not a file|a directory"):
        store.read(_name(1))
    with suppress(OSError):
        store.remove([_name(1)])
    assert _name(1) not in store
    assert _write(store, 2)
    assert store.nbytes >= _on_disk(tmp_path)
    if kind == "link":
        assert (tmp_path / "mine.txt").stat().st_mtime_ns == 1


_KILLED = """
import sys, time
from mlx_overlay_server.engine.disk.store import SUFFIX, Store
store = Store(sys.argv[1], 40 * 4096)
store.open()
for number in range(10**6):
    store.write(f"{number:040x}{SUFFIX}", [bytes(3000)] * 4, time.time_ns())
    if number == 20:
        print(flush=True)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A folder whose server was killed while it wrote."""
    with subprocess.Popen([PYTHON, "-P", "-c", _KILLED, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    return tmp_path


def test_after_a_kill_the_cap_holds_and_all_is_whole(killed: Path) -> None:
    assert _on_disk(killed) <= 40 * _SECTOR
    (killed / (_name(10**7) + ".unfinished")).write_bytes(bytes(30 * _SECTOR))  # as if the kill had come just then
    store = _opened(killed, 40 * _SECTOR)
    assert _on_disk(killed) == store.nbytes <= 40 * _SECTOR
    assert len(store) > 0
    assert {path.suffix for path in killed.iterdir() if path.name != "lock"} == {SUFFIX}
    for path in killed.glob(f"*{SUFFIX}"):
        assert len(store.read(path.name)) == 12000


def test_who_holds_the_lock_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_, "_LOCK_SECONDS", 0.05)
    one, other = _opened(tmp_path), _opened(tmp_path)
    with one._locked(), pytest.raises(BlockingIOError):
        _write(other, 1)
    assert _write(other, 1)


def test_two_servers_write_at_once(tmp_path: Path) -> None:
    cap = 30 * _SECTOR
    seen: list[int] = []

    def work(start: int) -> None:
        store = _opened(tmp_path, cap)
        for number in range(start, start + 40):
            _write(store, number, 9000)
            seen.append(store.nbytes)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) <= cap
    assert _on_disk(tmp_path) <= cap
    assert len(seen) == 80
