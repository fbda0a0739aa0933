"""The values of a JSON body are counted as they come, and text is no value (P13)."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.api.values import MAX_CONTAINERS, MAX_VALUES, ValueCount

_JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='ab,{[\\"é'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='a,{["\\'), inner),
    max_leaves=20,
)


def _counted(value: object) -> tuple[int, int]:
    """The containers and commas of a value, counted in what was decoded."""
    if not isinstance(value, (list, dict)):
        return 0, 0
    inner = [_counted(each) for each in (value.values() if isinstance(value, dict) else value)]
    containers, commas = (sum(column) for column in zip(*inner, strict=True)) if inner else (0, 0)
    return containers + 1, commas + max(0, len(value) - 1)


@given(value=_JSON, size=st.integers(1, 9))
def test_values_are_counted_however_the_body_is_cut(value: object, size: int) -> None:
    body = json.dumps(value).encode()
    count = ValueCount()
    for at in range(0, len(body), size):
        count.feed(body[at : at + size])
    assert (count._containers, count._commas) == _counted(value)


def test_text_may_hold_anything() -> None:
    count = ValueCount()
    count.feed(json.dumps({"text": ",{[" * MAX_VALUES}).encode())
    assert not count.is_too_many


def test_too_many_values_are_noticed() -> None:
    for body in (b"[" + b"0," * MAX_VALUES, b"[" * (MAX_CONTAINERS + 1)):
        count = ValueCount()
        count.feed(body)
        assert count.is_too_many
