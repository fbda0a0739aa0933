"""A download's progress: a bar on a terminal alone, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.progress import Bar, drawn


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.floats(0, 1), st.integers(1, 40))
def test_a_bar_always_has_its_width(share: float, width: int) -> None:
    assert len(drawn(share, width)) == width + 2


def test_a_bar_is_empty_at_the_beginning_and_full_at_the_end() -> None:
    assert (drawn(0, 3), drawn(0.5, 3), drawn(1, 3)) == ("▕   ▏", "▕█▌ ▏", "▕███▏")


def test_on_a_terminal_one_line_changes_in_place() -> None:
    file = _Terminal()
    with Bar("org/m", file) as bar:
        bar.show(0, 4_000_000)
        bar.show(4_000_000, 4_000_000)
    assert file.getvalue().count("\n") == 1
    assert file.getvalue().count("\r") == 2
    assert "100% of 4.0 MB" in file.getvalue()


@pytest.mark.parametrize("is_dumb", [True, False])
def test_elsewhere_it_is_lines_that_nothing_steers(is_dumb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_dumb:
        monkeypatch.setenv("TERM", "dumb")
    file = _Terminal() if is_dumb else io.StringIO()
    with Bar("org/\x1bm", file) as bar:
        for done in range(101):
            bar.show(done * 10_000, 1_000_000)
    lines = file.getvalue().splitlines()
    assert lines[0] == "org/\\x1bm: 0 % of 1.0 MB"
    assert len(lines) == 11
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()
