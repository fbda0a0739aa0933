"""Half a model does not count as a whole one: weight files are as long as their headers say (P7, P12)."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hf_overlay.catalog.kinds import installed
from hf_overlay.catalog.scan import Scanner
from hf_overlay.catalog.weights import safetensors_problem

from tests.support.folders import lay_model, weights
from tests.support.models import make_model


def written(tmp_path: Path, header: object, nbytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    return path


def problem(path: Path, size: int | None = None) -> str:
    if size is not None:
        os.truncate(path, size)
    with path.open("rb", buffering=0) as file:
        return safetensors_problem(file.fileno(), path.stat().st_size)


def tensor(start: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


HEADERS: dict[str, tuple[object, int]] = {
    "in order": ({"a": tensor(0, 64), "b": tensor(64, 256)}, 256),
    "in another order": ({"b": tensor(64, 256), "a": tensor(0, 64)}, 256),
    "offsets first": ({"a": {"data_offsets": [0, 64], "dtype": "U8", "shape": [2, 32]}}, 64),
    "with blanks": (b'{ "a": { "dtype": "U8", "shape": [64], "data_offsets": [ 0 , 64 ] } }   ', 64),
    "an empty tensor at the end": ({"a": tensor(0, 64), "b": tensor(64, 64)}, 64),
    "a shape that looks like an end": ({"a": {"dtype": "U8", "shape": [2, 32], "data_offsets": [0, 64]}}, 64),
    "metadata that look like a tensor": ({"__metadata__": {"x": '"data_offsets":[0,999]'}, "a": tensor(0, 64)}, 64),
    "no tensors": ({"__metadata__": {"format": "mlx"}}, 0),
}


@pytest.mark.parametrize(("header", "nbytes"), HEADERS.values(), ids=HEADERS)
def test_a_file_is_whole_at_its_last_byte_and_at_none_before(tmp_path: Path, header: object, nbytes: int) -> None:
    path = written(tmp_path, header, nbytes)
    whole = path.stat().st_size
    assert problem(path) == ""
    for size in range(whole - 1, -1, -1):
        assert problem(path, size), f"{size} of {whole} bytes pass for all of them"


def test_more_bytes_than_the_tensors_take_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path, {"a": tensor(0, 64)}, 64)
    with path.open("ab") as file:
        file.write(b"more")
    assert problem(path) == ""


@pytest.mark.parametrize("length", [0, 2**27, 2**63, 2**64 - 1])
def test_a_length_that_no_header_has_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + bytes(1000))
    assert "is not a safetensors file" in problem(path)


def test_what_mlx_and_safetensors_write_is_whole_and_each_cut_is_seen(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "Whole.", shards=2)
    for path in model.glob("*.safetensors"):
        size = path.stat().st_size
        assert problem(path) == ""
        assert f"of {size} bytes" in problem(path, size // 4)


def test_a_good_copy_in_the_next_root_wins_over_a_cut_one(tmp_path: Path) -> None:
    for drive in "ab":
        lay_model(tmp_path / drive / "org/name")
    os.truncate(tmp_path / "a/org/name/model.safetensors", 40)
    first, second = Scanner((f"{tmp_path}/a", f"{tmp_path}/b"), "/nonexistent", installed()).scan()
    assert not first.models
    assert [model.id for model in second.models] == ["org/name"]


@pytest.mark.parametrize("settled", [False, True])
def test_unchanged_weights_are_read_once(models: Path, settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = lay_model(models / "org/name", settled=settled)
    os.truncate(folder / "model.safetensors", 40)
    reads: list[str] = []
    real = os.open

    def counted(path: Any, *arguments: Any, **options: Any) -> Any:
        reads.extend([path] if str(path).endswith(".safetensors") else [])
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    scanner = Scanner((str(models),), "/nonexistent", installed())
    for _ in range(3):
        assert not scanner.scan()[0].models
    assert len(reads) == 1, "a file that did not change was read again"
    (folder / "model.safetensors").write_bytes(weights(b"whole"))
    for _ in range(3):
        assert scanner.scan()[0].models
    assert len(reads) == 2
