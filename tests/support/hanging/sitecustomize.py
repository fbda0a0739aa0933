"""On PYTHONPATH, makes a Python program wait for a disk that does not answer, wherever there is no such disk.

Calls with a path below $HANG_BELOW do not return while the file $HANG_WHILE is there.
"""

from __future__ import annotations

import builtins
import io
import os
import time
from collections.abc import Callable
from typing import Any

_BELOW = os.environ["HANG_BELOW"]
_WHILE = os.environ["HANG_WHILE"]
_lstat = os.lstat


def _hanging(real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        if isinstance(path, (str, os.PathLike)) and f"{os.fspath(path)}/".startswith(f"{_BELOW}/"):
            while _is_hung():
                time.sleep(0.02)
        return real(path, *arguments, **options)

    return call


def _is_hung() -> bool:
    try:
        _lstat(_WHILE)
    except OSError:
        return False
    return True


for _name in (
    *("access", "listdir", "lstat", "open", "readlink", "scandir", "stat", "statvfs"),
    *("link", "mkdir", "rename", "replace", "rmdir", "symlink", "unlink", "utime"),
):
    setattr(os, _name, _hanging(getattr(os, _name)))
builtins.open = io.open = _hanging(open)
