"""What the system says of memory, in files as Linux writes them."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.engine import system

_MB = 2**20


def _files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


_NEW = {
    "proc/self/cgroup": "0::/pod/box\n",
    "sys/fs/cgroup/pod/memory.max": f"{900 * _MB}\n",
    "sys/fs/cgroup/pod/memory.current": f"{850 * _MB}\n",
    "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {30 * _MB}\n",
    "sys/fs/cgroup/pod/box/memory.max": "max\n",
    "sys/fs/cgroup/pod/box/memory.current": f"{700 * _MB}\n",
}
_OLD = {
    "proc/self/cgroup": "5:devices:/\n4:memory:/box\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{900 * _MB}\n",
    "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{850 * _MB}\n",
    "sys/fs/cgroup/memory/box/memory.stat": f"total_inactive_file {30 * _MB}\n",
}
_MACHINE = {"proc/meminfo": f"MemTotal: {2048 * 1024} kB\nMemAvailable: {500 * 1024} kB\n"}


@pytest.mark.parametrize("files", [_NEW, _OLD], ids=["version 2", "version 1"])
def test_a_container_has_what_its_control_groups_leave(tmp_path: Path, files: dict[str, str]) -> None:
    root = _files(tmp_path, files | _MACHINE)
    assert system.limit(root) == 900 * _MB
    assert system.free(root) == 80 * _MB


def test_without_a_container_what_the_machine_has_is_free(tmp_path: Path) -> None:
    root = _files(tmp_path, {"proc/self/cgroup": "0::/\n"} | _MACHINE)
    assert system.limit(root) is None
    assert system.free(root) == 500 * _MB


def test_where_the_system_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert (system.limit(tmp_path), system.free(tmp_path)) == (None, None)


# Numbers such as a Mac with 16 GB has. The kernel counts speculative pages as free; `vm_stat` prints them apart.
_PAGES = {"free": 28_048, "active": 367_417, "inactive": 358_731, "wired": 187_256}


class _Library:
    """The C library of macOS, as far as it is asked."""

    def __init__(self, error: int = 0) -> None:
        self._error = error
        self.references = 0
        """References to the port of the host that are held."""

    def mach_host_self(self) -> int:
        self.references += 1
        return 2563

    def mach_port_deallocate(self, task: int, port: int) -> int:
        assert (task, port) == (515, 2563)
        self.references -= 1
        return 0

    def host_statistics64(self, host: int, flavor: int, statistics: Any, count: Any) -> int:
        assert (host, flavor, count._obj.value) == (2563, 4, 38), "38 numbers are what every macOS gives"
        ctypes.memmove(statistics, struct.pack("=4I", *_PAGES.values()), 16)
        return self._error


def test_on_macos_what_nobody_has_used_lately_is_free() -> None:
    library = _Library()
    assert system.mac_free(library, 515, 16384) == (28_048 + 358_731) * 16384
    assert library.references == 0


def test_where_macos_says_nothing_nothing_is_known() -> None:
    library = _Library(error=5)
    assert system.mac_free(library, 515, 16384) is None
    assert library.references == 0
