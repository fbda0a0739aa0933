"""The frame of `make soak`: each campaign is there, and a broken promise is a row and an exit status."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import soak
from tests.support.soak.__main__ import main


def test_every_campaign_is_a_module_with_one_signature() -> None:
    for name in soak.CAMPAIGNS:
        campaign = importlib.import_module(f"tests.support.soak.{name}")
        assert [*inspect.signature(campaign.run).parameters] == ["place", "seconds", "random"], name
    assert set(soak.SHORT) <= set(soak.CAMPAIGNS)


def run_one(monkeypatch: pytest.MonkeyPatch, row: soak.Row | AssertionError) -> int:
    """`make soak` with one campaign, which ends like that."""

    def run(place: Path, seconds: float, random: object) -> soak.Row:
        assert [*place.iterdir()] == []
        if isinstance(row, AssertionError):
            raise row
        return row._replace(waited=seconds)

    module = ModuleType("a campaign")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests.support.soak.one", module)
    monkeypatch.setattr(soak, "CAMPAIGNS", ("one",))
    return main(["--seconds", "7", "--seed", "5", "--json"])


def test_a_row_says_what_was_tried_and_the_seed_to_try_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_one(monkeypatch, soak.Row(tried=3, lost=0, held=1)) == 0
    said = {"campaign": "one", "seed": 5, "tried": 3, "lost": 0, "waited": 7.0, "held": 1, "broken": []}
    assert json.loads(capsys.readouterr().out) == said


@pytest.mark.parametrize("row", [soak.Row(tried=1, broken=("P3: lost",)), AssertionError("P3: lost")], ids=str)
def test_a_broken_promise_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], row: soak.Row | AssertionError
) -> None:
    assert run_one(monkeypatch, row) == 1
    assert "P3: lost" in json.loads(capsys.readouterr().out)["broken"][0]
