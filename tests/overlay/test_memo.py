"""The one rule for "unchanged since"."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_overlay.catalog.memo import Memo, stamps


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "size": lambda path: path.write_bytes(b"longer"),
    "time": lambda path: os.utime(path, (1, 1)),
    "mode": lambda path: path.chmod(0o600),
    "gone": lambda path: path.unlink(),
    "another file of the same size and time": replaced,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_value_holds_until_a_path_it_depends_on_looks_different(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    path.chmod(0o644)
    memo: Memo[str] = Memo()
    memo.remember("key", "value", stamps([str(path), str(tmp_path / "missing")]))
    memo = memo.next_round()
    assert memo.recall("key") == "value"
    memo = memo.next_round()
    assert memo.recall("key") == "value", "what a round recalled, the next can recall"
    change(path)
    assert memo.next_round().recall("key") is None


def test_a_value_holds_until_a_missing_path_appears(tmp_path: Path) -> None:
    memo: Memo[str] = Memo()
    memo.remember("key", "value", stamps([str(tmp_path / "missing")]))
    (tmp_path / "missing").mkdir()
    assert memo.next_round().recall("key") is None


def test_a_value_that_a_round_does_not_recall_is_forgotten() -> None:
    memo: Memo[str] = Memo()
    memo.remember("key", "value", ())
    assert memo.next_round().next_round().recall("key") is None
