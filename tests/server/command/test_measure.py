"""What `bench` makes of the streams that it has seen."""

from __future__ import annotations

import pytest
from mlx_overlay_server.command.bench import table
from mlx_overlay_server.command.measure import Stream, summary


def test_streams_add_up() -> None:
    round_ = summary([Stream(1.0, 3.0, 100, 21), Stream(2.0, 4.0, 100, 11), Stream(2.0, 4.0, 120, 11)])
    assert (round_.streams, round_.prompt) == (3, 120)
    assert (round_.first_p50, round_.first_max) == (2.0, 2.0)
    assert round_.prefill == 160
    assert round_.decode == 5
    assert round_.total == pytest.approx(42 / 3)


def test_an_answer_of_one_token_has_no_speed() -> None:
    round_ = summary([Stream(1.0, 1.0, 10, 1)])
    assert (round_.decode, round_.total) == (0, 0)


def test_the_table_is_markdown() -> None:
    head, rule, row = table([summary([Stream(0.5, 1.5, 100, 11)])])
    assert [len(line.split("|")) for line in (head, rule, row)] == [9, 9, 9]
    assert set(rule) == set("|-:")
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("1", "100 tokens", "0.50 s", "0.50 s", "200 tokens/s", "10.0 tokens/s", "10 tokens/s"),
    ]
