"""The folder of files that hold kept KV caches: each is written whole or not at all, and all of them fit below a cap.

Files are only ever added and removed, never changed. The least recently used go first; a file's modification time says
when it was used. Several servers may share the folder: who writes holds a lock, counts what is there, makes room, and
writes. So the cap holds at every moment, whoever is killed when. Readers need no lock: a file that is not there any
more, or is damaged, is one that was never kept.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

logger = logging.getLogger("mlx_overlay_server")

SUFFIX = ".safetensors"
_UNFINISHED = ".unfinished"
_LOCK = "lock"
_OWN = re.compile(rf"([0-9a-f]{{40}})(?:-\d+-[0-9a-f]{{40}})?{re.escape(SUFFIX)}")
"""Names of blocks, and of states, whose first part is the name of the block before them."""
_SECTOR = 4096
"""Files are counted in whole sectors, as `du` counts them."""
_LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.02
_SPARE = 64
"""Where files must go, this part of the cap is made free as well."""
FLOOR = 1 / 10
"""The part of the disk that stays free, whatever the cap says."""
MAX_FLOOR = 20 * 10**9


class File(NamedTuple):
    """A file of the folder."""

    size: int
    """Bytes on the disk."""
    used: int
    """When it was used last, in nanoseconds."""


def victims(files: Mapping[str, File], excess: int, before: int, now: int) -> list[str] | None:
    """Return which files must go to free so many bytes, least recently used first; None where there are not enough.

    Only files that were used before a time may go, and those of a time to come: the clock was set back since.
    """
    times = {name: file.used if file.used <= now else 0 for name, file in files.items()}
    chosen: list[str] = []
    for name in sorted((name for name in files if times[name] < before), key=lambda name: times[name]):
        if excess <= 0:
            break
        chosen.append(name)
        excess -= files[name].size
    return chosen if excess <= 0 else None


def rounded(size: int) -> int:
    """Return the bytes that a file takes on the disk."""
    return -(-size // _SECTOR) * _SECTOR


class Store:
    """The files in one folder. One thread may write; others may ask and read meanwhile."""

    def __init__(self, folder: str, cap: int, *, floor: int | None = None) -> None:
        """`cap`: bytes that all files may take; `floor`: bytes of the disk that stay free, None: a part of it."""
        self._folder = folder
        self.cap = cap
        self._floor = floor
        self._files: dict[str, File] = {}
        self._states: dict[str, tuple[str, ...]] = {}
        """The name of a block -> the states that come after it."""
        self._others = 0
        """Bytes of files that are not ours: they count, but are never removed."""
        self._counter: bytes | None = None
        """What the lock's file said after our last change; another server has changed something if it differs."""
        self.nbytes = 0

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def size(self, name: str) -> int:
        """Return the bytes that a file takes; 0 for one that is not there."""
        file = self._files.get(name)
        return 0 if file is None else file.size

    def states(self, block: str) -> tuple[str, ...]:
        """Return the names of the states that come after a block."""
        return self._states.get(block, ())

    def open(self) -> None:
        """Make the folder, which only its user may read, and see what is in it. Raises OSError."""
        self._make_folder()
        self.refresh()
        with suppress(OSError), self._locked():  # a folder that cannot be written can be read
            self._make_room(0, self.cap, time.time_ns())

    def refresh(self) -> None:
        """See what other servers have added or removed. Raises OSError."""
        self._note(self._listed()[0])

    def read(self, name: str) -> memoryview:
        """Return a file's bytes. Raises OSError."""
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise OSError(f"{name} is not a file")
            data = np.empty(facts.st_size, dtype=np.uint8).data  # not zeroed first
            view = data
            while view and (count := file.readinto(view)):
                view = view[count:]
        return data[: len(data) - len(view)]

    def write(self, name: str, parts: Sequence[memoryview | bytes], used: int) -> bool:
        """Add a file. Returns whether it is there now: not where the cap or the disk leaves no room. Raises OSError.

        `used`: when it was used last, in nanoseconds.
        """
        size = rounded(sum(len(part) for part in parts))
        with self._locked():
            if name in self._files:
                return True
            facts = os.statvfs(self._folder)
            floor = self._floor
            if floor is None:
                floor = min(int(facts.f_blocks * facts.f_frsize * FLOOR), MAX_FLOOR)
            free = facts.f_bavail * facts.f_frsize
            if not self._make_room(size, min(self.cap, self.nbytes + free - floor), used):
                return False
            unfinished = self._path(name) + _UNFINISHED
            try:
                _write(unfinished, parts)
                os.utime(unfinished, ns=(used, used))
                os.rename(unfinished, self._path(name))
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
            self._add(name, File(size, used))
        return True

    def touch(self, name: str, used: int) -> None:
        """Note when a file was used last, in nanoseconds."""
        if (file := self._files.get(name)) is not None:
            self._files[name] = File(file.size, used)
            with suppress(OSError):
                os.utime(self._path(name), ns=(used, used), follow_symlinks=False)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files; those that cannot be removed are not used any more. Raises OSError."""
        for name in names:
            self._drop(name)
        self._counter = None  # whatever becomes of them, the folder is looked at again before anything is written
        with self._locked():
            self._remove(names)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(self._path(name))
            self._drop(name)

    def _make_room(self, size: int, limit: int, before: int) -> bool:
        """Remove files that were used before a time, until `size` more bytes fit below a limit. Call it under the lock.

        Returns whether they fit. It removes some more than it must, so that not every new file costs a search.
        """
        while (excess := self.nbytes + size - limit) > 0:
            spare = self.cap // _SPARE // _SECTOR * _SECTOR
            now = time.time_ns()
            chosen = victims(self._files, excess + spare, before, now) or victims(self._files, excess, before, now)
            if chosen is None:
                return False
            for name in chosen:
                file = self._looked_at(name)
                if file == self._files[name]:
                    os.unlink(self._path(name))
                    file = None
                self._drop(name)
                if file is not None:  # another server has used it: its turn comes later
                    self._add(name, file)
        return True

    def _looked_at(self, name: str) -> File | None:
        """Return a file as it is now: another server may have used it. None: it is gone."""
        try:
            facts = os.stat(self._path(name), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return File(rounded(facts.st_size), facts.st_mtime_ns)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder, and know what is in it. Raises OSError."""
        descriptor = self._lock()
        try:
            if self._counter is None or os.pread(descriptor, 8, 0) != self._counter:
                files, unfinished = self._listed()
                for name in unfinished:  # of a server that was killed: who writes holds the lock
                    os.unlink(self._path(name))
                    self._others -= rounded(unfinished[name])
                self._note(files)
            self._counter = None  # until this change is complete
            counter = os.urandom(8)
            os.pwrite(descriptor, counter, 0)  # first, so that others look again if we are killed
            yield
            self._counter = counter
        finally:
            os.close(descriptor)

    def _lock(self) -> int:
        path = os.path.join(self._folder, _LOCK)
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            self._make_folder()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # nobody has removed the folder meanwhile
                    return descriptor
            except FileNotFoundError:
                pass
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            time.sleep(_LOCK_POLL_SECONDS)

    def _listed(self) -> tuple[dict[str, File], dict[str, int]]:
        """Return the files in the folder, and the sizes of those that are not finished. Counts all that is not ours."""
        files: dict[str, File] = {}
        unfinished: dict[str, int] = {}
        others = _SECTOR  # the lock's file, which may not be there yet
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    facts = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(facts.st_mode) and _OWN.fullmatch(entry.name):
                    files[entry.name] = File(rounded(facts.st_size), facts.st_mtime_ns)
                    continue
                others += rounded(facts.st_size) if entry.name != _LOCK else 0
                if stat.S_ISREG(facts.st_mode) and _OWN.fullmatch(entry.name.removesuffix(_UNFINISHED)):
                    unfinished[entry.name] = facts.st_size
        self._others = others
        return files, unfinished

    def _note(self, files: Mapping[str, File]) -> None:
        """Take a listing as what is there."""
        for name in self._files.keys() - files.keys():
            self._drop(name)
        for name, file in files.items():
            self._add(name, file)
        self.nbytes = self._others + sum(file.size for file in self._files.values())

    def _add(self, name: str, file: File) -> None:
        self._drop(name)
        self._files[name] = file
        self.nbytes += file.size
        if (block := _block_before(name)) is not None:
            self._states[block] = (*self._states.get(block, ()), name)

    def _drop(self, name: str) -> None:
        if (file := self._files.pop(name, None)) is None:
            return
        self.nbytes -= file.size
        if (block := _block_before(name)) is not None:
            self._states[block] = tuple(each for each in self._states[block] if each != name)
            if not self._states[block]:
                del self._states[block]

    def _make_folder(self) -> None:
        """Make the folder, for this user alone. Raises OSError, PermissionError for one that is another user's."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        facts = os.stat(self._folder)
        if facts.st_uid != os.geteuid():
            raise PermissionError(f"{self._folder} belongs to another user")
        if facts.st_mode & 0o077:
            os.chmod(self._folder, 0o700)

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)


def _block_before(name: str) -> str | None:
    """Return the name of the block that a state comes after; None for the name of a block."""
    block, separator, _ = name.partition("-")
    return block + SUFFIX if separator else None


def _write(path: str, parts: Iterable[memoryview | bytes]) -> None:
    """Write a new file. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
