"""The rule for when a tree is over: no program uses it.

The lock of a session's owner (see lease) tells of the owner and of the programs that inherited it. Others use the tree
without it: programs that closed what they inherited, and those that got its variables from `hf-overlay env`. A tree
whose owner is dead is still in use while any of these holds:

- the lock of a download is held, for a repo that was written into the tree or announced through it;
- a program has the tree's path in the environment that it was started with;
- a program has a file open in the tree, or works in a folder of it;
- it is what another session takes for the real cache, which was opened by such a program.

What cannot be found out counts as use, so a tree is never removed on a guess. Programs of other users are not looked
at: the system does not show them, and a session's folder (0700) is closed to them. A tree whose owner is alive is
never looked at here.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain

from hf_overlay import hfcache
from hf_overlay.config import OWNER_FILE
from hf_overlay.progress import alive
from hf_overlay.tree import announced, files, lease, shared, store

LOOK_SECONDS = 10.0
"""The longest that `ps` or `lsof` may take (macOS). One that takes longer has found out nothing."""
_REPORT_SECONDS = 0.2
_PASSES = 50
"""How often the list of processes is read again, for those that were started meanwhile (Linux)."""
_EXEC_SECONDS = 0.002
"""Longer than the moment in which a program that is being started has no environment yet (Linux)."""

_OWNER_FILES = (f"/{OWNER_FILE}".encode(), f"/{OWNER_FILE} (deleted)".encode())
"""Ends of the names that the system shows for an owner's file: as it is, and once its session was cleared (Linux)."""
_USES_NOTHING = b"from multiprocessing.resource_tracker import main"
"""In the command of a process that Python (tqdm, for one) starts beside a program. It only waits for the program's end,
and has its environment; it would keep the tree of a server whose process goes on."""

Processes = Iterator[tuple[int, bytes]]
"""Each process by its id, with all that it may name a tree in: its environment, its folder, its open files."""


def in_use(
    sessions: Collection[str], processes: Callable[[], Processes] | None = None, *, asker: int | None = None
) -> set[str]:
    """The paths of those given sessions whose tree is still in use although their owner is dead.

    All processes are looked at once for all sessions, and not at all when there are none to ask about. `processes`
    replaces this system's way of listing them; it raises OSError when it cannot. `asker` is the id of the process that
    clears the sessions, of which this one may be a helper; without it, this one.
    """
    asker = os.getpid() if asker is None else asker
    used = {path for path in sessions if is_downloading(path)}
    # With a slash, since whoever clears a session, or looks whether it is empty, has the folder itself open.
    asked = {path: os.fsencode(f"/{os.path.basename(path)}/") for path in sessions if path not in used}
    if not asked:
        return used
    try:
        look = processes or partial(_processes, asker, [*asked.values()])
        for pid, text in chain(_caches(sessions), look()):
            alive()
            used |= {path for path, mark in asked.items() if mark in text and not _is_done(pid, path, asker)}
    except OSError:
        return set(sessions)
    return used


def _is_done(pid: int, session: str, asker: int) -> bool:
    """Whether a process opened the session itself and now clears it: its owner is dead, so it is done with it."""
    return pid == asker == lease.opener(session)


def _caches(sessions: Collection[str]) -> Processes:
    """The real caches of all sessions beside the given ones, each with the process that opened the session."""
    for folder in {os.path.dirname(path) for path in sessions}:
        for path in lease.sessions_in(folder):
            if (owner := lease.read_owner(path)) is not None:
                yield 0, os.fsencode(owner.hub_cache)


# Locks ---------------------------------------------------------------------------------------------------------------


def is_held(lock: str) -> bool:
    """Whether a program holds a lock file, or nobody can tell. A lock that is not there is not made."""
    try:
        fd = _open(lock)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def is_downloading(session: str) -> bool:
    """Whether the lock of a download is held, for a repo that was written into the tree or announced through it."""
    try:
        return any(holds_lock(folder) for folder in set(_lock_folders(session)))
    except OSError:
        return True


def holds_lock(folder: str) -> bool:
    """Whether any lock file in a folder is held. Raises OSError."""
    return any(is_held(entry.path) for entry in files.entries(folder) if entry.name.endswith(".lock"))


def _lock_folders(session: str) -> Iterator[str]:
    linked = [
        store.repo_folder(repo.name)
        for folder in store.FOLDERS
        for repo in files.entries(f"{session}/{folder}")
        if files.has_payload(repo.path)
    ]
    linked += shared.written(session).values()
    for hub in files.entries(f"{session}/hubs"):
        locks = f"{hub.path}/{hfcache.LOCKS}"
        written = [entry.name for entry in files.entries(hub.path) if not entry.is_symlink()]
        if not os.path.islink(locks):  # nobody else has these
            written += [entry.name for entry in files.entries(locks)]
        yield from (f"{locks}/{name}" for name in (*written, *linked) if hfcache.is_repo(name))
    for folder in announced.folders(session):
        if hfcache.is_repo(os.path.basename(folder)):
            yield f"{os.path.dirname(folder)}/{hfcache.LOCKS}/{os.path.basename(folder)}"


def _open(lock: str) -> int:
    flags = os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(lock, os.O_RDWR | flags)  # on NFS, to lock a file takes the right to write to it
    except PermissionError:
        return os.open(lock, os.O_RDONLY | flags)


# Processes -----------------------------------------------------------------------------------------------------------


def _processes(asker: int, marks: Collection[bytes]) -> Processes:
    return by_ps_and_lsof() if sys.platform == "darwin" else by_proc(asker=asker, marks=marks)


def by_proc(proc: str = "/proc", asker: int | None = None, marks: Collection[bytes] = (b"",)) -> Processes:
    """The processes that name one of the `marks`, as /proc tells of them (Linux).

    Raises OSError when it is not there, or never comes to rest.

    Meanwhile processes start others and end. So the list is read again until each one in it has been looked at: a
    process that ended before its turn left its environment to one that comes later in the list.
    """
    done: set[str] = set()
    for _ in range(_PASSES):
        new = {name for name in os.listdir(proc) if name.isdigit()} - done
        if not new:
            if not done:  # we are always there
                raise FileNotFoundError(f"{proc} shows no process")
            return
        for pid in new:
            # Of this process only the environment counts: other threads of it may be clearing the same sessions.
            is_ours = int(pid) in (os.getpid(), asker)
            named = _environment(f"{proc}/{pid}") if is_ours else _named_by(f"{proc}/{pid}")
            if not any(mark in named for mark in marks):
                continue
            if _USES_NOTHING not in _read(f"{proc}/{pid}/cmdline"):  # last: a program that is being started has none
                yield int(pid), named
        done |= new
    raise InterruptedError(f"{proc} never came to rest")


def _named_by(process: str) -> bytes:
    """The environment, working folder and open files of a process; nothing where it is over, or not ours to see."""
    named = [_environment(process)]
    folder = os.fsencode(process)
    for link in (b"cwd", *(b"fd/" + number for number in _listed(folder + b"/fd"))):
        try:
            named.append(os.readlink(folder + b"/" + link))
        except OSError:
            continue
    # Whoever asks whether a session is dead has its owner's file open. Those that own it are told by the lock.
    return b"\0".join(each for each in named if not each.endswith(_OWNER_FILES))


def _environment(process: str) -> bytes:
    for _ in range(3):
        if (content := _read(f"{process}/environ")) or not _is_program(process):
            return content
        time.sleep(_EXEC_SECONDS)  # it may be just being started
    return b""


def _is_program(process: str) -> bool:
    """Whether it is ours to look at, no part of the kernel, and has not ended."""
    try:
        return bool(os.readlink(f"{process}/exe"))
    except OSError:
        return False


def _read(path: str) -> bytes:
    """The content of a file of /proc; empty where it cannot be read. There are hundreds, so by few system calls."""
    content = b""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while piece := os.read(fd, 2**17):
                content += piece
        finally:
            os.close(fd)
    except OSError:
        return b""
    return content


def _listed(folder: bytes) -> list[bytes]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def by_ps_and_lsof(run: Callable[[Sequence[str]], bytes] | None = None) -> Processes:
    """The processes as `ps` and `lsof` tell of them (macOS). Raises OSError when one of them cannot.

    `run` runs a command and returns its output.
    """
    run = run or _output
    for line in run(("/bin/ps", "-xwwE", "-o", "pid=,command=")).splitlines():
        if (match := re.match(rb"\s*(\d+) (.*)", line)) and _USES_NOTHING not in line:
            yield int(match[1]), match[2]
    pid = 0
    for line in run(("/usr/sbin/lsof", "-wnP", "-u", str(os.getuid()), "-F", "pn")).splitlines():
        if line[:1] == b"p":
            pid = int(line[1:])
        elif line[:1] == b"n" and not line.endswith(_OWNER_FILES):
            yield pid, line[1:]


def _output(command: Sequence[str]) -> bytes:
    import subprocess  # only here, and it takes a while

    # An environment of its own, or it would find itself. lsof exits 1 where it was not shown everything.
    with subprocess.Popen(
        command, env={"LC_ALL": "C"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + LOOK_SECONDS
        while True:
            try:
                out = process.communicate(timeout=_REPORT_SECONDS)[0]
                break
            except subprocess.TimeoutExpired:
                alive()  # it is no disk that takes so long
            if time.monotonic() > until:
                process.kill()
                raise TimeoutError(f"{command[0]} took longer than {LOOK_SECONDS:.0f} seconds")
    if not out:
        raise OSError(f"{command[0]} found out nothing: exit status {process.returncode}")
    return out
