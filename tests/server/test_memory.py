"""How a machine's memory is divided: by pure rules, on facts about machines of all sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.memory import Machine, advice, shares

_GB = 10**9
# What Metal recommends for Macs of 8 to 512 GB.
_RECOMMENDED = (5.7, 11.4, 17.2, 22.9, 38.6, 51.5, 77.3, 115.4, 498.2)


@given(st.integers(0, 2 * 10**12), st.none() | st.integers(0, 10**12))
def test_all_shares_together_are_what_metal_recommends(usable: int, prefixes: int | None) -> None:
    divided = shares(Machine(usable, is_metal=True), prefixes=prefixes)
    parts = (divided.pool, divided.running, divided.prefixes, divided.weights)
    assert min(parts) >= 0
    fixed = sum(parts[:3])
    assert sum(parts) == max(usable, fixed)


@pytest.mark.parametrize("recommended", _RECOMMENDED)
def test_weights_do_not_get_what_other_uses_need(recommended: float) -> None:
    divided = shares(Machine(int(recommended * _GB), is_metal=True))
    assert 0.6 * divided.usable < divided.weights < 0.9 * divided.usable
    assert divided.running >= divided.usable / 16


def test_the_buffer_pool_is_small_also_on_large_machines() -> None:
    assert shares(Machine(498 * _GB, is_metal=True)).pool <= 2 * _GB


def test_weights_get_what_kept_prefixes_leave() -> None:
    machine = Machine(100 * _GB, is_metal=True)
    few, many = shares(machine, prefixes=0), shares(machine, prefixes=20 * _GB)
    assert few.weights - many.weights == 20 * _GB
    assert shares(machine, prefixes=200 * _GB).weights == 0


def test_on_macos_the_advice_names_the_limit_of_the_system() -> None:
    assert "iogpu.wired_limit_mb" in advice("darwin")
    assert "--memory-budget" in advice("darwin")
    assert advice("linux") == "raise --memory-budget"
