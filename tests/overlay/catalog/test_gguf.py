"""Half a GGUF file does not count as a whole one (P7, P12): its header says how long it must be."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hf_overlay.catalog import gguf
from hf_overlay.catalog.kinds import installed
from hf_overlay.catalog.scan import Scanner
from hf_overlay.models import Code, Source

from tests.support.folders import lay_model

F32, Q4_K, UNHEARD_OF = 0, 12, 999
U8, U32, STRING, ARRAY, U64 = 0, 4, 8, 9, 10


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def written(*, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int, alignment: int = 32) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join((*pairs, *tensors))
    return header + bytes(-len(header) % alignment + data)


TENSORS = (tensor(b"a", (8, 2), F32, 0), tensor(b"b", (256, 3), Q4_K, 64))
WHOLE: Mapping[str, bytes] = {
    "no metadata": written(tensors=TENSORS, data=64 + 3 * 144),
    "the last tensor is described first": written(tensors=TENSORS[::-1], data=64 + 3 * 144),
    "every sort of metadata": written(
        pairs=(
            pair(b"general.name", STRING, string(b"tiny")),
            pair(b"one", U8, b"\1"),
            pair(b"eight", U64, bytes(8)),
            pair(b"tokens", ARRAY, array(STRING, 3, string(b"a") + string(b"") + string(b"ccc"))),
            pair(b"scores", ARRAY, array(U32, 5, bytes(20))),
        ),
        tensors=TENSORS,
        data=64 + 3 * 144,
    ),
    "another alignment": written(
        pairs=(pair(b"general.alignment", U32, struct.pack("<I", 128)),), tensors=TENSORS, data=496, alignment=128
    ),
    "a tensor of a type of which only the begin is known": written(
        tensors=(tensor(b"a", (512, 9), UNHEARD_OF, 96),), data=97
    ),
    "a scalar": written(tensors=(tensor(b"a", (), F32, 0),), data=4),
    "no tensors": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair(b"k", STRING, string(b"v")),
}


def problem(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return gguf.problem(file.fileno(), path.stat().st_size)


@pytest.mark.parametrize("content", WHOLE.values(), ids=WHOLE)
def test_a_file_is_whole_at_its_last_byte_and_at_none_before(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content + b"more")
    assert problem(path) == "", "more bytes than the tensors take do no harm"
    for size in range(len(content), -1, -1):
        os.truncate(path, size)
        assert bool(problem(path)) == (size < len(content)), f"{size} of {len(content)} bytes: {problem(path)!r}"
        assert "still being copied" in problem(path) or size == len(content)


def test_a_vocabulary_of_megabytes_is_read_to_its_end_and_quickly(tmp_path: Path) -> None:
    count = 300_000
    tokens = pair(b"tokens", ARRAY, array(STRING, count, string(b"a token") * count))
    path = tmp_path / "model.gguf"
    path.write_bytes(content := written(pairs=(tokens,), tensors=TENSORS, data=496))
    started = time.process_time()
    assert problem(path) == ""
    assert time.process_time() - started < 0.5
    for size in (len(content) - 1, len(content) // 2):
        os.truncate(path, size)
        assert f"holds {size}" in problem(path)


@pytest.mark.parametrize(
    "content",
    {
        "an old version": b"GGUF" + struct.pack("<III", 1, 1, 1) + bytes(9),
        "for big-endian machines": b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
        "a type of value": written(pairs=(pair(b"k", 77, bytes(9)),), tensors=TENSORS, data=9),
        "arrays in an array": written(pairs=(pair(b"k", ARRAY, array(ARRAY, 1, bytes(9))),), tensors=TENSORS, data=9),
        "many dimensions": written(tensors=(tensor(b"a", (1,) * 9, F32, 0),), data=0),
        "no alignment": written(pairs=(pair(b"general.alignment", U32, bytes(4)),), tensors=TENSORS, data=9),
    }.items(),
    ids=lambda each: each[0],
)
def test_what_a_later_version_may_hold_is_not_called_incomplete(tmp_path: Path, content: tuple[str, bytes]) -> None:
    (tmp_path / "model.gguf").write_bytes(content[1])
    assert problem(tmp_path / "model.gguf") == ""


@pytest.mark.parametrize("count", [2**32, 2**62, 2**63, 2**64 - 1])
def test_absurd_counts_and_lengths_end_at_once(tmp_path: Path, count: int) -> None:
    path = tmp_path / "model.gguf"
    for content in (
        b"GGUF" + struct.pack("<IQQ", 3, count, count) + bytes(1000),
        b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, count) + bytes(1000),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair(b"k", ARRAY, array(STRING, count, bytes(1000))),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair(b"k", ARRAY, array(U64, count, bytes(1000))),
        written(tensors=(tensor(b"a", (count, count), F32, count),), data=1000),
    ):
        path.write_bytes(content)
        assert "still being copied" in problem(path)


def test_what_is_no_gguf_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"<html>" + bytes(100))
    assert "is not a GGUF file" in problem(tmp_path / "model.gguf")


def test_the_longest_header_that_is_read_takes_less_than_a_disk_is_given(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    count = gguf.MAX_HEADER // 8
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair(b"k", ARRAY, array(STRING, count, bytes(8 * count))))
    started = time.process_time()
    assert problem(path) == ""
    assert time.process_time() - started < 3


def scan(tmp_path: Path, kind: str) -> Source:
    (source,) = Scanner((f"{tmp_path}",), "/nonexistent", installed() if kind == "mlx" else None).scan()
    return source


def lay(folder: Path, content: bytes, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name in names:
        (folder / name).write_bytes(content)


def test_a_cut_gguf_and_one_of_which_a_part_is_missing_are_incomplete(tmp_path: Path) -> None:
    whole = WHOLE["every sort of metadata"]
    lay(tmp_path / "org/whole", whole, "q4.gguf", "q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf")
    lay(tmp_path / "org/cut", whole[:-1], "q4.gguf")
    lay(tmp_path / "org/part", whole, "q8-00001-of-00002.gguf")
    source = scan(tmp_path, "any")
    assert [model.id for model in source.models] == ["org/whole"]
    assert {reject.reason.code for reject in source.rejects} == {Code.INCOMPLETE}
    cut, part = (reject.reason.text for reject in source.rejects)
    assert cut == f"q4.gguf holds {len(whole) - 1} of {len(whole)} bytes: still being copied?"
    assert "q8-00002-of-00002.gguf is missing" in part


@pytest.mark.mlx_lm
def test_for_mlx_lm_a_cut_gguf_beside_whole_weights_does_not_matter(tmp_path: Path) -> None:
    lay_model(tmp_path / "org/name", {"q4.gguf": WHOLE["no metadata"][:-1]})
    assert [model.id for model in scan(tmp_path, "mlx").models] == ["org/name"]
