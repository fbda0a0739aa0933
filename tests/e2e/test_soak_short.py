"""A few seconds of each campaign of `make soak`, always with the same seed (P1, P3, P4, P7, P12, P13)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import soak

SECONDS = 2.0
"""For each campaign, without the start of its servers."""


@pytest.mark.slow
@pytest.mark.parametrize("campaign", soak.SHORT)
def test_no_promise_is_broken_in_a_short_campaign(campaign: str, tmp_path: Path) -> None:
    row = soak.run(campaign, tmp_path / campaign, SECONDS, seed=1)
    assert row.tried > 0, "nothing was tried: the test shows nothing"
    assert row.broken == (), "\n".join(row.broken)
