"""A disk that can stop answering, or ignores case: a read-only FUSE file system that mirrors a folder, in a process.

It speaks the kernel's protocol itself (include/uapi/linux/fuse.h), so that no library is needed, only /dev/fuse and the
right to mount. A hung one takes requests and never replies, as a network file system whose server is gone: not even
SIGKILL ends a process that waits for it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import PYTHON, eventually

_LIBC = ctypes.CDLL(None, use_errno=True)
_HEADER = struct.Struct("<IIQQIIII")
_LOOKUP, _FORGET, _GETATTR, _READLINK, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR, _INTERRUPT, _BATCH_FORGET = 25, 26, 27, 28, 29, 36, 42
_DETACH = 2


class Disk:
    """A mounted mirror."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process that serves it, which hangs when it gets a SIGUSR1."""
        return self._process.pid

    def hang(self) -> None:
        """Answer nothing any more."""
        self._process.send_signal(signal.SIGUSR1)
        self._told()

    def hang_at_weights(self) -> None:
        """Hang as soon as the second MiB of a model's weights is read; `has_hung` waits for that."""
        self._process.send_signal(signal.SIGHUP)
        self._told()

    def has_hung(self) -> None:
        """Wait until it hangs."""
        self._told()

    def answer(self) -> None:
        """Answer again, also what was asked meanwhile."""
        self._process.send_signal(signal.SIGUSR2)
        self._told()

    def _told(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline()


def why_not() -> str | None:
    """Why no such disk can be mounted here; None when one can."""
    if sys.platform != "linux" or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no FUSE here"
    return None if os.geteuid() == 0 else "only root may mount without fusermount"


@contextmanager
def mounted(mirrored: Path, where: Path, *, ignores_case: bool = False) -> Iterator[Disk]:
    """A disk at `where` that shows the folder `mirrored`. At the end it goes, and whatever waits for it is let go."""
    where.mkdir(parents=True)
    command = [PYTHON, "-m", "tests.support.fuse_disk", str(mirrored), str(where), *["fold"][: int(ignores_case)]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"mounted\n", "it could not be mounted"
            yield Disk(process)
        finally:
            process.kill()  # closes the connection: every request that is open fails
            process.wait()
            eventually(lambda: _LIBC.umount2(os.fsencode(where), _DETACH) != 0, "the disk is unmounted")


class _Mirror:
    def __init__(self, folder: str, *, ignores_case: bool) -> None:
        self._ignores_case = ignores_case
        self._paths = {1: folder}
        self._numbers = {folder: 1}
        self._is_hung = self._is_armed = False
        self._waiting: list[bytes] = []

    def hang(self, *_: object) -> None:
        self._is_hung = True
        os.write(1, b"hangs\n")  # not `print`, in the middle of which the signal may have come

    def arm(self, *_: object) -> None:
        self._is_armed = True
        os.write(1, b"is armed\n")

    def resume(self, *_: object) -> None:
        self._is_hung = False
        os.write(1, b"answers\n")

    def serve(self, device: int) -> None:
        import select

        while True:
            readable, _, _ = select.select([device], [], [], 0.02)
            if not self._is_hung:
                waiting, self._waiting = self._waiting, []
                for request in waiting:
                    self._reply(device, request)
            if not readable:
                continue
            try:
                request = os.read(device, 2**17)
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.EAGAIN, errno.ENOENT, errno.EINTR):
                    if error.errno == errno.ENODEV:
                        return
                    continue
                raise
            if self._is_armed and self._is_of_weights(request):
                self._is_armed = False
                self.hang()
            if self._is_hung:
                self._waiting.append(request)
            else:
                self._reply(device, request)

    def _is_of_weights(self, request: bytes) -> bool:
        _, opcode, _, node, *_ = _HEADER.unpack_from(request)
        if opcode != _READ or not self._paths[node].endswith(".safetensors"):
            return False
        _, offset = struct.unpack_from("<QQ", request, _HEADER.size)
        return bool(offset >= 1 << 20)

    def _reply(self, device: int, request: bytes) -> None:
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        if opcode in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return
        number, body = 0, b""
        try:
            body = self._answer(opcode, node, request[_HEADER.size :])
        except OSError as error:
            number = error.errno or errno.EIO
        try:
            os.write(device, struct.pack("<IiQ", 16 + len(body), -number, unique) + body)
        except OSError as error:
            if error.errno != errno.ENOENT:  # whoever asked was interrupted
                raise

    def _answer(self, opcode: int, node: int, data: bytes) -> bytes:
        if opcode == _INIT:
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, 2**17, 0, 12, 9, 2**16, 1, 0, 0, 0, *[0] * 7)
        if opcode == _STATFS:
            return struct.pack("<5Q4I24x", 1000, 500, 500, 1000, 500, 4096, 255, 4096, 0)
        path = self._paths[node]
        if opcode == _LOOKUP:
            child = f"{path}/{self._spelled(path, os.fsdecode(data.rstrip(bytes(1))))}"
            attributes = self._attributes(child)
            number = self._numbers.setdefault(child, len(self._numbers) + 1)
            self._paths[number] = child
            return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + attributes
        if opcode == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(path)
        if opcode == _READLINK:
            return os.fsencode(os.readlink(path))
        if opcode in (_OPEN, _OPENDIR):
            return struct.pack("<QII", 0, 0, 0)
        if opcode == _READ:
            _, offset, size = struct.unpack_from("<QQI", data)
            with open(path, "rb") as file:
                return os.pread(file.fileno(), size, offset)
        if opcode == _READDIR:
            _, offset, size = struct.unpack_from("<QQI", data)
            return self._listing(path, offset, size)
        if opcode in (_RELEASE, _RELEASEDIR, _FLUSH):
            return b""
        raise OSError(errno.ENOSYS, "not needed")

    def _spelled(self, folder: str, name: str) -> str:
        names = os.listdir(folder) if self._ignores_case else [name]
        return next((each for each in sorted(names) if each.casefold() == name.casefold()), name)

    def _attributes(self, path: str) -> bytes:
        status = os.lstat(path)
        times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
        return struct.pack(
            "<6Q10I",
            status.st_ino,
            status.st_size,
            status.st_blocks,
            *(each // 10**9 for each in times),
            *(each % 10**9 for each in times),
            status.st_mode,
            status.st_nlink,
            status.st_uid,
            status.st_gid,
            0,
            4096,
            0,
        )

    def _listing(self, path: str, offset: int, size: int) -> bytes:
        listing = b""
        for number, name in enumerate(sorted(os.listdir(path))[offset:], offset + 1):
            encoded = os.fsencode(name)
            kind = os.lstat(f"{path}/{name}").st_mode >> 12
            entry = struct.pack("<QQII", number + 1000, number, len(encoded), kind) + encoded
            entry += bytes(-len(entry) % 8)
            if len(listing) + len(entry) > size:
                break
            listing += entry
        return listing


def main(folder: str, where: str, *fold: str) -> None:
    """Mount, say so, and serve until the end."""
    mirror = _Mirror(folder, ignores_case=bool(fold))
    signal.signal(signal.SIGHUP, mirror.arm)
    signal.signal(signal.SIGUSR1, mirror.hang)
    signal.signal(signal.SIGUSR2, mirror.resume)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = b"fd=%d,rootmode=40000,user_id=%d,group_id=%d,allow_other" % (device, os.getuid(), os.getgid())
    if _LIBC.mount(b"disk", os.fsencode(where), b"fuse.disk", 6, options) != 0:  # nosuid, nodev
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), where)
    print("mounted", flush=True)
    mirror.serve(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
