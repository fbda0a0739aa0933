"""The files of kept KV caches: what they hold comes back to the bit, and whatever is damaged is not used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from mlx_overlay_server.engine.arrays import TYPES, Array
from mlx_overlay_server.engine.disk import blocks
from mlx_overlay_server.engine.disk.blocks import BLOCK, Content, Damaged, Gathered, chain, encode

_NAME = "a" * 40 + ".safetensors"
_ROOT = blocks.root("a model")


def decode(name: str, file: bytes | bytearray) -> Content:
    return blocks.decode(name, memoryview(file))


def _encoded(content: Content, name: str = _NAME) -> bytearray:
    return bytearray(b"".join(encode(name, content)))


def _same(one: Content, other: Content) -> bool:
    return one.outline == other.outline and {
        name: (array.type, array.values.shape, array.values.tobytes()) for name, array in one.arrays.items()
    } == {name: (array.type, array.values.shape, array.values.tobytes()) for name, array in other.arrays.items()}


@st.composite
def _contents(draw: st.DrawFn) -> Content:
    made: dict[str, Array] = {}
    for name in draw(st.sets(st.text("ab.0", min_size=1, max_size=4), max_size=4)):
        kind = draw(st.sampled_from(sorted(TYPES)))
        shape = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
        made[name] = Array(kind, draw(arrays.arrays(TYPES[kind], shape)))
    outline = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda each: st.lists(each, max_size=3))
    return Content(made, draw(outline))


@given(_contents())
@settings(max_examples=40)
def test_what_was_written_is_read(content: Content) -> None:
    assert _same(decode(_NAME, _encoded(content)), content)


def test_a_file_is_one_of_safetensors() -> None:
    from safetensors.numpy import load

    values = np.arange(6, dtype=np.float16).reshape(1, 2, 3)
    loaded = load(bytes(_encoded(Content({"0.0": Array("F16", values[:, :, 1:])}))))
    assert loaded["0.0"].tolist() == values[:, :, 1:].tolist()


_FILE = _encoded(Content({"0.0": Array("F32", np.arange(8, dtype=np.float32))}, [1, None]))


@given(st.integers(0, len(_FILE) - 1), st.integers(1, 255))
@settings(max_examples=150)
def test_no_changed_byte_goes_unnoticed(at: int, change: int) -> None:
    """Spaces that fill the header are the one thing that says nothing."""
    damaged = bytearray(_FILE)
    damaged[at] ^= change
    try:
        content = decode(_NAME, damaged)
    except Damaged:
        return
    assert _same(content, decode(_NAME, _FILE))
    assert chr(_FILE[at]).isspace()


@given(st.integers(0, len(_FILE) - 1))
@settings(max_examples=40)
def test_half_a_file_is_none(size: int) -> None:
    with pytest.raises(Damaged):
        decode(_NAME, _FILE[:size])


@pytest.mark.parametrize("file", [b"", b"\xff" * 100, _FILE + b"\0", b"\x02" + bytes(7) + b"{}", bytes(4096)])
def test_a_foreign_file_is_none(file: bytes) -> None:
    with pytest.raises(Damaged):
        decode(_NAME, file)


def test_a_file_under_the_name_of_another_is_none() -> None:
    with pytest.raises(Damaged):
        decode("b" + _NAME[1:], _FILE)


# Names --------------------------------------------------------------------------------------------------------------

_TOKENS = st.lists(st.integers(0, 3), min_size=0, max_size=4).map(
    lambda parts: np.repeat(np.asarray(parts, dtype=np.int64), BLOCK - 1)
)


@given(_TOKENS, _TOKENS)
@settings(max_examples=60)
def test_two_sequences_have_the_blocks_in_common_that_they_begin_with(one: Any, other: Any) -> None:
    names, others = chain(_ROOT, one), chain(_ROOT, other)
    assert (len(names.blocks), len(others.blocks)) == (len(one) // BLOCK, len(other) // BLOCK)
    for count, (name, another) in enumerate(zip(names.blocks, others.blocks, strict=False), 1):
        assert (name == another) == (one[: count * BLOCK].tolist() == other[: count * BLOCK].tolist())
    for size in range(0, min(len(one), len(other)) + 1, 97):
        assert (names.state(size) == others.state(size)) == (one[:size].tolist() == other[:size].tolist())


def test_models_have_no_blocks_in_common() -> None:
    tokens = np.zeros(BLOCK, dtype=np.int64)
    roots = [blocks.root(*parts) for parts in (["a", "b"], ["ab"], ["a", "b", ""], ["b", "a"])]
    assert len({chain(root, tokens).blocks for root in roots}) == len({chain(root, tokens).state(9) for root in roots})
    assert len(set(roots)) == len(roots)


# Putting blocks together --------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
@settings(max_examples=20)
def test_blocks_are_put_together_in_their_order(sizes: list[int]) -> None:
    whole = np.arange(2 * sum(sizes) * 3).reshape(1, 2, sum(sizes), 3)
    gathered = Gathered(sum(sizes))
    for number, size in enumerate(sizes):
        start = sum(sizes[:number])
        gathered.add({"0.0": Array("I64", whole[:, :, start : start + size])}, size)
    assert gathered.arrays()["0.0"].values.tolist() == whole.tolist()


@pytest.mark.parametrize(
    "other",
    [
        {"0.0": Array("F16", np.zeros((1, 2, 3, 4), np.float16))},
        {"0.0": Array("F32", np.zeros((1, 1, 3, 4), np.float32))},
        {"0.1": Array("F32", np.zeros((1, 2, 3, 4), np.float32))},
        {"0.0": Array("F32", np.zeros((1, 2, 2, 4), np.float32))},
        {"0.0": Array("F32", np.zeros((1, 2, 4, 4), np.float32))},
        {"0.0": Array("F32", np.zeros((1, 2), np.float32))},
        {},
    ],
)
def test_blocks_of_different_kinds_are_not_put_together(other: dict[str, Array]) -> None:
    gathered = Gathered(6)
    gathered.add({"0.0": Array("F32", np.zeros((1, 2, 3, 4), np.float32))}, 3)
    with pytest.raises(Damaged):
        gathered.add(other, 3)
