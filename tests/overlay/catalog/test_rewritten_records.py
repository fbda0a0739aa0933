"""The cheap second look at a folder made by `hf download --local-dir` notices that the download moved on (P5)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hf_overlay.catalog.scan import Scanner
from hf_overlay.models import Model

from tests.support.folders import lay_model, settle

_OLD, _NEW = "a" * 40, "b" * 40
_ETAG, _NEW_ETAG = "c" * 40, "d" * 40


@pytest.fixture
def folder(models: Path) -> Path:
    """A user's folder that has been at rest for a day, with records of where it came from."""
    path = lay_model(models / "org/name")
    _record(path, _OLD, _ETAG)
    settle(path)
    return path


@pytest.fixture
def scanner(models: Path, folder: Path) -> Scanner:
    made = Scanner((str(models),), "/nonexistent", None)
    assert _found(made).commit == _OLD
    return made


def _record(folder: Path, commit: str, etag: str) -> None:
    """What a download of a commit writes, also for files that are in it as they were."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        record = folder / ".cache/huggingface/download" / f"{name}.metadata"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{commit}\n{etag}\n{int((folder / name).stat().st_mtime) + 10}\n")


def _found(scanner: Scanner) -> Model:
    [source] = scanner.scan()
    [model] = source.models
    return model


def test_as_long_as_the_records_are_the_same_so_is_the_model(scanner: Scanner) -> None:
    assert _found(scanner) is _found(scanner), "every look reads the whole folder: the tests below show nothing"


def test_a_newer_commit_of_the_same_files_is_noticed(scanner: Scanner, folder: Path) -> None:
    _record(folder, _NEW, _NEW_ETAG)
    model = _found(scanner)
    assert (model.commit, {file.etag for file in model.files}) == (_NEW, {_NEW_ETAG})
    assert _found(scanner).commit == _NEW


def test_records_that_are_taken_away_prove_nothing_any_more(scanner: Scanner, folder: Path) -> None:
    for record in (folder / ".cache/huggingface/download").iterdir():
        record.unlink()
    assert _found(scanner).commit is None


def test_a_record_rewritten_in_place_with_the_same_size_and_time_is_noticed(scanner: Scanner, folder: Path) -> None:
    """As a synchronising tool writes it, which sets the times of the original."""
    record = folder / ".cache/huggingface/download/config.json.metadata"
    before = record.stat()
    _record(folder, _NEW, _ETAG)
    os.utime(record, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert record.stat().st_size == before.st_size
    assert _found(scanner).commit == _NEW
