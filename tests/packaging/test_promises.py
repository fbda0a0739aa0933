"""The table of promises names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (P\d+) \| .+ \| (.+) \|$", re.M)


def test_each_promise_names_tests_and_all_of_them_exist() -> None:
    rows = ROW.findall((ROOT / "docs/promises.md").read_text(encoding="utf-8"))
    assert [name for name, _ in rows] == [f"P{number}" for number in range(1, len(rows) + 1)]
    assert len(rows) >= 14
    for name, cell in rows:
        paths = re.findall(r"`([^`]+)`", cell)
        assert paths, f"{name} names no test"
        for path in paths:
            where = ROOT / "tests" / path
            files = sorted(where.rglob("test_*.py")) if path.endswith("/") else [where]
            assert files, f"{name}: no tests in tests/{path}"
            assert all("def test_" in file.read_text(encoding="utf-8") for file in files), f"{name}: tests/{path}"
