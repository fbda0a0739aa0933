"""Tells whether a path is on a disk that may stop answering: from the system's mounts, without looking at it."""

from __future__ import annotations

import os
import re
import sys

_LOCAL = frozenset(
    {
        *("apfs", "bcachefs", "btrfs", "devtmpfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "hfsplus"),
        *("iso9660", "msdos", "ntfs3", "overlay", "ramfs", "rootfs", "squashfs", "tmpfs", "ubifs", "udf"),
        *("vfat", "xfs", "zfs"),
    }
)
"""The kernel's own file systems for disks of this machine. All others are asked through a helper process."""
_ESCAPED = r"\\([0-7]{3})"
_MAX_LINKS = 40


def may_hang(path: str) -> bool:
    """Return whether an absolute path leads to a network mount, or to one that a program serves (FUSE)."""
    mounts = _linux_mounts() if sys.platform == "linux" else _bsd_mounts() if sys.platform == "darwin" else {}
    if all(mounts.values()):
        return False
    at = ""
    parts = path.split("/")[:0:-1]
    links = 0
    while parts:
        name = parts.pop()
        if name in ("", "."):
            continue
        at = os.path.dirname(at).rstrip("/") if name == ".." else f"{at}/{name}"
        if not mounts.get(at, True):
            return True
        # only now, when all folders above are known to be on disks that answer
        try:
            target = os.readlink(at or "/")
        except OSError:
            continue
        links += 1
        if links > _MAX_LINKS:
            return False
        at = "" if target.startswith("/") else os.path.dirname(at).rstrip("/")
        parts += target.split("/")[::-1]
    return False


def _linux_mounts() -> dict[str, bool]:
    """Return mount points, and whether each is local. Of several at one place, the last one is seen."""
    mounts: dict[str, bool] = {}
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                where = before.split(" ", 5)[4]
                if "\\" in where:
                    where = re.sub(_ESCAPED, lambda match: chr(int(match[1], 8)), where)
                mounts[where.rstrip("/")] = after.split(" ", 1)[0] in _LOCAL
    except (OSError, IndexError):  # without /proc, nothing is known
        return {}
    mounts.pop("", None)  # the system's own root: if it did not answer, nothing would
    return mounts


def _bsd_mounts() -> dict[str, bool]:
    """Return the same on macOS, from getfsstat(MNT_NOWAIT), which asks no mount."""
    import ctypes

    class Statfs(ctypes.Structure):
        _fields_ = (
            ("numbers", ctypes.c_uint8 * 64),
            ("flags", ctypes.c_uint32),
            ("subtype", ctypes.c_uint32),
            ("type_name", ctypes.c_char * 16),
            ("mounted_on", ctypes.c_char * 1024),
            ("mounted_from", ctypes.c_char * 1024),
            ("reserved", ctypes.c_uint32 * 8),
        )

    libc = ctypes.CDLL(None)
    # On Intel, this name is the variant with 64-bit inodes; on Apple silicon, there is no other.
    getfsstat = getattr(libc, "getfsstat$INODE64", None) or libc.getfsstat
    nowait, is_local = 2, 0x1000
    found = (Statfs * 256)()
    count = getfsstat(found, ctypes.sizeof(found), nowait)
    return {
        os.fsdecode(each.mounted_on).rstrip("/"): bool(each.flags & is_local)
        for each in found[: max(count, 0)]
        if each.mounted_on != b"/"
    }
