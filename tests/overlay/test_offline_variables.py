"""P9: a program that is offline outside of the overlay is offline in it, by whichever variable it says so."""

from __future__ import annotations

import runpy

import hf_overlay
import pytest
from hf_overlay import config
from huggingface_hub import constants

_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_ENVIRONMENTS: list[tuple[dict[str, str], bool]] = [
    ({}, False),
    *(({name: value}, True) for name in _VARIABLES for value in ("1", "on", "ON", "yes", "True")),
    *(({name: value}, False) for name in _VARIABLES for value in ("", "0", "off", "no", "false", "2")),
    ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "1"}, True),
    ({"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}, False),
    ({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0"}, True),
    ({"HF_DATASETS_OFFLINE": "1"}, False),
]


@pytest.mark.parametrize(("environ", "is_offline"), _ENVIRONMENTS, ids=str)
def test_offline_means_what_it_means_to_huggingface_hub(
    environ: dict[str, str], is_offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.is_offline(environ) is is_offline
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert runpy.run_path(constants.__file__)["HF_HUB_OFFLINE"] is is_offline


@pytest.mark.parametrize("name", _VARIABLES)
def test_a_session_hands_it_on_to_programs_that_are_started_elsewhere(
    name: str, home: object, sessions: object
) -> None:
    with hf_overlay.open_session([], environ={"HOME": str(home), name: "1"}) as session:
        assert session.is_offline
        assert session.variables["HF_HUB_OFFLINE"] == "1"
    with hf_overlay.open_session([], environ={"HOME": str(home)}) as session:
        assert not session.is_offline
