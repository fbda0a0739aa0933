"""Permissions that are refused to root too, as they are to users: for tests that run as root."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION_3 = 0x20080522
_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_GET_SECUREBITS, _SET_SECUREBITS = 27, 28
_NO_SETUID_FIXUP = 1 << 2  # without it access(2) answers with the rights that root could take up again


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def respected() -> Iterator[None]:
    """In here, modes hold for this thread; programs it starts are root again. Skips where root cannot give that up."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root on this system cannot be refused anything: run the tests as a user")
    header, sets = _Header(_VERSION_3, 0), (_Set * 2)()
    _call("capget", ctypes.byref(header), sets)
    effective = sets[0].effective
    secure = _call("prctl", _GET_SECUREBITS)
    _call("prctl", _SET_SECUREBITS, secure | _NO_SETUID_FIXUP)
    sets[0].effective = effective & ~_OVERRIDES
    _call("capset", ctypes.byref(header), sets)
    try:
        yield
    finally:
        sets[0].effective = effective
        _call("capset", ctypes.byref(header), sets)
        _call("prctl", _SET_SECUREBITS, secure)


def as_a_user() -> tuple[str, ...]:
    """The beginning of a command for whose program modes hold, though tests run as root; nothing where they do not."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("nothing here takes root's rights from a program: run the tests as a user")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


def _call(name: str, *arguments: object) -> int:
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments)
    if result < 0:
        pytest.skip(f"{name}: {os.strerror(ctypes.get_errno())}: run the tests as a user")
    assert isinstance(result, int)
    return result
