"""On PYTHONPATH, makes a Python program wait for a disk that does not answer, wherever there is no such disk.

Calls with a path below $HANG_BELOW do not return while the file $HANG_WHILE is there. Both may name several, with `:`.
"""

from __future__ import annotations

import builtins
import io
import os
import time
from collections.abc import Callable
from typing import Any

_DISKS = [*zip(os.environ["HANG_BELOW"].split(":"), os.environ["HANG_WHILE"].split(":"), strict=True)]
_lstat = os.lstat


def _hanging(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        if isinstance(path, (str, os.PathLike)):
            for below, flag in _DISKS:
                while f"{os.fspath(path)}/".startswith(f"{below}/") and _is_there(flag):
                    time.sleep(0.1)
        return real(path, *arguments, **options)

    return call


def _is_there(flag: str) -> bool:
    try:
        _lstat(flag)
    except OSError:
        return False
    return True


for _name in (
    *("access", "listdir", "lstat", "open", "readlink", "scandir", "stat", "statvfs"),
    *("link", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink", "utime"),
):
    setattr(os, _name, _hanging(getattr(os, _name)))
builtins.open = io.open = _hanging(open)
