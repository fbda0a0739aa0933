"""Ownership of a session's folder, and the proof that its owner is dead.

The owner holds an flock on a file in the folder. The kernel drops the lock when the last process that holds it ends,
however it ends. So a lock that can be taken is proof that the owner is dead, and a folder whose lock cannot be taken is
left alone. The program that `hf-overlay run` starts inherits the lock; its tree outlives a killed `hf-overlay`.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from hf_overlay import hfcache
from hf_overlay.config import DIRECTORY_VARIABLE, OWNER_FILE, Settings, earlier_folders, own_folder
from hf_overlay.errors import SessionError
from hf_overlay.messages import Messages
from hf_overlay.tree import files
from hf_overlay.trust import why_untrusted

_PREFIX = "session-"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


def sessions_folder(environ: Mapping[str, str]) -> str:
    """The folder that holds all sessions: HF_OVERLAY_DIR, else one of the user's own (never a shared /tmp)."""
    if given := environ.get(DIRECTORY_VARIABLE):
        return os.path.abspath(given)
    return os.path.join(own_folder(environ), "sessions")


def all_sessions_folders(environ: Mapping[str, str]) -> list[str]:
    """The folder that holds all sessions, after those in which earlier versions may have left some."""
    earlier = () if environ.get(DIRECTORY_VARIABLE) else earlier_folders(environ)
    return [*(os.path.join(folder, "sessions") for folder in earlier), sessions_folder(environ)]


class Owner(NamedTuple):
    """What a session's owner recorded in the file it locks."""

    pid: int
    started: float
    """Seconds since 1970."""
    sources: tuple[str, ...]
    """The model paths."""
    hub_cache: str
    """The real cache, into which downloads are moved after the session's end."""
    service: dict[str, str | None]
    """Environment variables that other programs may take over: name -> value, None to unset it."""


def read_owner(path: str) -> Owner | None:
    """The record of a session's owner, living or dead; None when it died before it wrote one."""
    try:
        owner = Owner(**json.loads(files.read(os.path.join(path, OWNER_FILE))))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    is_usable = isinstance(owner.hub_cache, str) and os.path.isabs(owner.hub_cache) and "\0" not in owner.hub_cache
    return owner if is_usable and isinstance(owner.started, int | float) and isinstance(owner.service, dict) else None


class Lease:
    """A session folder with the lock that its living owner holds."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        """File descriptor of the locked file; a child that inherits it keeps the session alive."""

    @classmethod
    def acquire(cls, sessions: str, settings: Settings) -> "Lease":
        """Make a new session folder (0700) and own it.

        Raises OSError, or SessionError for an untrusted folder, or one on a volume without locks.
        """
        os.makedirs(sessions, mode=0o700, exist_ok=True)
        check_trusted(sessions)
        with _exclusive(sessions):  # so that nobody takes the folder for dead before it is locked
            path = os.path.join(sessions, f"{_PREFIX}{os.getpid()}-{time.time_ns():x}")
            os.mkdir(path, 0o700)
            try:
                lease = cls(path, os.open(os.path.join(path, OWNER_FILE), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
                try:
                    _lock(lease.fd, sessions)
                    lease.record(settings, {})
                except (OSError, SessionError):
                    os.close(lease.fd)
                    raise
            except (OSError, SessionError):
                remove(path)
                raise
        return lease

    def record(self, settings: Settings, service: Mapping[str, str | None]) -> None:
        """Write the owner's record. Raises OSError.

        `service` is the environment that other programs may take over while the owner lives: name -> value, None to
        unset it.
        """
        owner = Owner(os.getpid(), time.time(), settings.roots, settings.hub_cache, dict(service))
        content = json.dumps(owner._asdict()).encode()
        if os.pwrite(self.fd, content, 0) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(self.fd, len(content))

    def is_intact(self) -> bool:
        """Whether the locked file is still in the session's folder, which a program that cleans up may have removed."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(os.path.join(self.path, OWNER_FILE)))
        except OSError:
            return False

    def renew(self) -> None:
        """Make the session's folder and its locked file again, in the same place, after they were removed.

        `fd` is the same number as before. Programs that were started hold the lock of the file that is gone; what
        keeps their tree if this process is killed is that it is named in their environment. Raises OSError.
        """
        record = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        sessions = os.path.dirname(self.path)
        os.makedirs(sessions, mode=0o700, exist_ok=True)
        check_trusted(sessions)
        with _exclusive(sessions):
            os.makedirs(self.path, mode=0o700, exist_ok=True)  # a client may have made it again
            fd = os.open(os.path.join(self.path, OWNER_FILE), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                _lock(fd, sessions)
                os.pwrite(fd, record, 0)
                os.dup2(fd, self.fd, inheritable=os.get_inheritable(self.fd))
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give up the lock. The session is over unless a child still holds it, which `dead` tells."""
        if os.path.isdir(self.path) and not self.is_intact():  # a client wrote into it since it was removed
            with suppress(OSError, SessionError):
                self.renew()
        os.close(self.fd)


@contextmanager
def dead(sessions: str, path: str) -> Iterator[bool]:
    """A context with True if the session at `path` has no living owner; nobody else clears it while it lasts."""
    owner = os.path.join(path, OWNER_FILE)
    try:
        with _exclusive(sessions):
            fd = os.open(owner, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(fd), os.stat(owner)):
                    raise BlockingIOError  # cleared by somebody else since it was opened
            except OSError as error:
                os.close(fd)
                raise BlockingIOError from error
    except FileNotFoundError:
        # Killed between making the folder and the lock, both under the sessions' lock: nothing is in it. Nothing is
        # in it, either, where somebody else has cleared it and is about to remove it.
        yield _is_empty(path)
        return
    except (OSError, SessionError):  # held, or a file system that cannot say: no proof
        yield False
        return
    try:
        yield True
    finally:
        os.close(fd)


def has_ended(hub_cache: str) -> bool:
    """Whether the overlay with this hub cache is over. Its tree may still be there, for a program that uses it."""
    if not os.path.isdir(hub_cache):
        return True
    session = os.path.dirname(os.path.dirname(hub_cache))
    with dead(os.path.dirname(session), session) as is_dead:
        return is_dead


def opener(path: str) -> int | None:
    """The id of the process that opened the session at `path`, which is in its name; None for other names."""
    match = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", os.path.basename(path), re.ASCII)
    return int(match[1]) if match else None


def share(sessions: str, path: str) -> int | None:
    """Keep a dead session from being cleared, together with others who do: the file descriptor to close at the end.

    None when its owner may be alive, or when it is being cleared. Programs that are started inherit the descriptor.
    """
    try:
        with _exclusive(sessions):
            fd = os.open(os.path.join(path, OWNER_FILE), os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise
    except (OSError, SessionError):
        return None
    os.set_inheritable(fd, True)
    return fd


def sessions_in(sessions: str, messages: Messages | None = None) -> list[str]:
    """The paths of all session folders, living or dead, without those that another user may have put there.

    `messages` gets a warning for each of the latter. Raises OSError, or SessionError when `sessions` itself may not be
    read, or other users may write to it.
    """
    try:
        paths = sorted(entry.path for entry in os.scandir(sessions) if entry.name.startswith(_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        raise SessionError(
            f"{sessions} cannot be read: permission denied; set {DIRECTORY_VARIABLE} to a folder of your own"
        ) from error
    check_trusted(sessions)
    trusted = []
    for path in paths:
        if (why := why_untrusted(path)) is None:
            trusted.append(path)
        elif messages is not None:
            messages.warning(f"the session at {path} {why}; it is ignored: look at it, and remove it")
    return trusted


def check_trusted(sessions: str) -> None:
    """Raise SessionError when the folder of all sessions belongs to another user, or other users may write there.

    Its sessions hold what is moved, removed, and evaluated by shells.
    """
    if (why := why_untrusted(os.path.realpath(sessions))) is not None:
        raise SessionError(
            f"{sessions} {why}, so sessions in it cannot be trusted; set {DIRECTORY_VARIABLE} to a folder of your own"
        )


def _is_empty(folder: str) -> bool:
    try:
        return all(map(hfcache.is_litter, os.listdir(folder)))
    except OSError:
        return False


def remove(path: str) -> None:
    """Remove what is left of a session once its tree is gone: the owner's file and the folder. Raises OSError."""
    if set(os.listdir(path)) - {OWNER_FILE}:  # without that file nobody could ever prove the owner dead
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
    try:
        os.unlink(os.path.join(path, OWNER_FILE))
    except FileNotFoundError:
        pass
    os.rmdir(path)


def _lock(fd: int, sessions: str, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> None:
    """Lock a file in the folder of all sessions. Raises OSError, or SessionError where its volume has no locks."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise SessionError(
            f"{sessions} is on a volume without file locks ({error.strerror}), as some network mounts are; "
            f"set {DIRECTORY_VARIABLE} to a folder on another volume"
        ) from error


@contextmanager
def _exclusive(sessions: str) -> Iterator[None]:
    """A context that nobody else is in, for one folder of all sessions. Raises as `_lock`."""
    fd = os.open(os.path.join(sessions, "sessions.lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        _lock(fd, sessions, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
