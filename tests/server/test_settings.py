"""Sizes and ranks: what settings are read from."""

from __future__ import annotations

import pytest
from mlx_overlay_server.settings import rank, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000", 1000),
        ("24G", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("24GB", 24 * 10**9),
        ("1.5G", 15 * 10**8),
        (" 512M ", 512 * 10**6),
        ("512 MB", 512 * 10**6),
        ("1T", 10**12),
        ("100k", 10**5),
        ("100B", 100),
    ],
)
def test_a_size_is_what_people_write(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "B", "x", "-1", "-1G", "1X", "1 2", "24GG", "nan", "NaNG", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        size(text)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"MLX_RANK": "0"}, 0),
        ({"MLX_RANK": "1"}, 1),
        ({"OMPI_COMM_WORLD_RANK": "2"}, 2),
        ({"PMI_RANK": "3"}, 3),
        ({"MLX_RANK": ""}, None),
        ({"MLX_RANK": "x", "PMI_RANK": "1"}, 1),
    ],
)
def test_a_rank_is_the_launcher_s(environ: dict[str, str], expected: int | None) -> None:
    assert rank(environ) == expected
