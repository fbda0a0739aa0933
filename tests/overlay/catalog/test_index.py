"""What scans keep for later processes: it saves reading, and never changes what is found."""

from __future__ import annotations

import marshal
import os
import shutil
from binascii import crc32
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hf_overlay import config
from hf_overlay.catalog import kinds, reading
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.catalog.index import Index
from hf_overlay.models import Model, Reject
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.folders import lay_files, lay_model, settle, weights
from tests.support.hfcache import add_repo

FILES = {"sub/vocab.json": b"{}", "notes.txt": b"notes"}


def cataloged(root: Path, index: Path | None, environ: Mapping[str, str] | None = None) -> Catalog:
    given = config.load([str(root)], environ or {"HOME": str(root.parent)}, "/", kind="any")
    return Catalog(given, index=None if index is None else str(index))


def seen(catalog: Catalog) -> tuple[list[Model], list[Reject]]:
    sources = (*catalog.sources, catalog.real_cache.models())
    return [each for source in sources for each in source.models], [
        each for source in sources for each in source.rejects
    ]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "index"


def test_an_unchanged_model_is_not_read_again_by_a_later_process(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_model(models / "org/name", FILES, settled=True)
    hub = models.parent / ".cache/huggingface/hub"
    add_repo(hub, "org/cached", {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights(b"w")})
    for blob in (hub / "models--org--cached/blobs").iterdir():
        os.utime(blob, (1, 1))
    first = seen(cataloged(models, index))
    opened: list[str] = []
    opening = os.open

    def note(path: str, *arguments: int) -> int:
        opened.append(str(path))
        return opening(path, *arguments)

    monkeypatch.setattr(os, "open", note)
    monkeypatch.setattr(reading, "read_json", opened.append)
    assert seen(cataloged(models, index)) == first
    assert not [path for path in opened if path.startswith((str(models), str(hub)))]
    assert [model.id for model in first[0]] == ["org/name", "org/cached"]


@pytest.mark.mlx_lm
def test_the_source_of_mlx_lm_is_read_for_new_models_alone(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a start longer than all else, with a few models."""
    given = config.load([str(models)], {"HOME": str(models.parent)}, "/", kind="mlx")
    read: list[str] = []
    known = kinds._Known

    def note(mlx_lm: str) -> kinds._Known:
        read.append(mlx_lm)
        return known(mlx_lm)

    monkeypatch.setattr(kinds, "_Known", note)
    for new, times in (["org/first"], 1), ([], 0), (["org/second"], 1):
        for each in new:
            lay_model(models / each, settled=True)
        read.clear()
        found, _ = seen(Catalog(given, index=str(index)))
        assert (set(new) <= {model.id for model in found}, len(read)) == (True, times), new


def rewritten(model: Path, name: str, content: bytes) -> None:
    """A file written to in place, which changes nothing of its folder."""
    with (model / name).open("r+b") as file:
        file.write(content)
        file.truncate()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a small file is longer": lambda model: rewritten(model, "notes.txt", b"more notes"),
    "a small file is another, as long": lambda model: rewritten(model, "notes.txt", b"seton"),
    "a file in a folder of it is longer": lambda model: rewritten(model, "sub/vocab.json", b'{"a": 1}'),
    "its config names another type": lambda model: rewritten(model, "config.json", b'{"model_type": "qwen3"}'),
    "its config is broken": lambda model: rewritten(model, "config.json", b"{"),
    "its weights are cut off": lambda model: os.truncate(model / "model.safetensors", 20),
    "its weights are empty": lambda model: os.truncate(model / "model.safetensors", 0),
    "a file comes": lambda model: lay_files(model, {"new.txt": b"new"}),
    "a shard index comes": lambda model: lay_files(
        model, {"model.safetensors.index.json": b'{"weight_map": {"a": "model-2.safetensors"}}'}
    ),
    "a file goes": lambda model: (model / "notes.txt").unlink(missing_ok=True),
    "the tokenizer goes": lambda model: (model / "tokenizer.json").unlink(missing_ok=True),
    "a folder of it goes": lambda model: shutil.rmtree(model / "sub", ignore_errors=True),
    "all of it goes": lambda model: shutil.rmtree(model, ignore_errors=True),
    "a link takes the place of a file": lambda model: linked(model, "notes.txt"),
    "a model comes": lambda model: lay_model(model.with_name("another"), settled=True),
    "it is renamed": lambda model: model.rename(model.with_name(f"{model.name}-renamed")),
    "it becomes old": lambda model: settle(model.parent),
}


def linked(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/etc/hostname")


@settings(max_examples=25)
@given(st.lists(st.sampled_from([*CHANGES]), max_size=4))
def test_whatever_changed_meanwhile_the_same_is_found_as_without_it(changes: list[str]) -> None:
    with TemporaryDirectory() as folder:
        root, index = Path(folder, "models"), Path(folder, "index")
        model = lay_model(root / "org/name", FILES, settled=True)
        lay_model(root / "org/other", settled=True)
        assert seen(cataloged(root, index)) == seen(cataloged(root, None))
        for change in changes:
            if model.is_dir() or change in ("a model comes", "it becomes old"):
                try:
                    CHANGES[change](model)
                except FileNotFoundError:  # gone by an earlier one
                    pass
            assert seen(cataloged(root, index)) == seen(cataloged(root, None)), change


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"notes.txt", b"other.txt"),
        lambda content: b"\xff" * 100,
        lambda content: b"00000000\n[]",
        lambda content: b"%08x\n%s" % (crc32(marshal.dumps(5)), marshal.dumps(5)),
    ],
    ids=["empty", "cut off", "changed", "no text", "without its checksum", "of another kind"],
)
def test_a_damaged_one_counts_as_none_and_is_made_again(
    models: Path, index: Path, damage: Callable[[bytes], bytes]
) -> None:
    lay_model(models / "org/name", FILES, settled=True)
    first = seen(cataloged(models, index))
    (kept,) = index.iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    damaged = kept.read_bytes()
    assert seen(cataloged(models, index)) == first
    assert kept.read_bytes() != damaged
    made_again = kept.stat()
    assert seen(cataloged(models, index)) == first
    assert kept.stat() == made_again, "it was of use, or it would have been written once more"


def test_one_that_others_may_have_written_is_not_read(
    models: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_model(models / "org/name", settled=True)
    first = seen(cataloged(models, index))
    (kept,) = index.iterdir()
    index.chmod(0o777)
    before = kept.stat()
    read: list[object] = []
    monkeypatch.setattr(Index, "_decoded", lambda *given: read.append(given))
    assert seen(cataloged(models, index)) == first
    assert not read
    assert kept.stat().st_mtime_ns == before.st_mtime_ns, "and not written, either"


def test_it_is_private_and_old_files_in_it_go(models: Path, index: Path) -> None:
    lay_model(models / "org/name", settled=True)
    seen(cataloged(models, index.with_name("made")))
    assert index.with_name("made").stat().st_mode & 0o077 == 0
    index.mkdir()
    (index / "0.json").write_bytes(b"old")
    os.utime(index / "0.json", (1, 1))
    index.chmod(0o700)
    seen(cataloged(models, index))
    (kept,) = index.iterdir()
    assert kept.stat().st_mode & 0o077 == 0


def test_a_place_for_it_that_cannot_be_written_costs_nothing_but_time(models: Path, tmp_path: Path) -> None:
    lay_model(models / "org/name", settled=True)
    (tmp_path / "file").write_bytes(b"")
    assert seen(cataloged(models, tmp_path / "file/index")) == seen(cataloged(models, None))


def test_what_is_known_of_a_drive_outlives_the_time_it_is_away(models: Path, index: Path) -> None:
    lay_model(models / "org/name", settled=True)
    first = seen(cataloged(models, index))
    (kept,) = index.iterdir()
    known = kept.read_bytes()
    models.rename(models.with_name("away"))
    assert seen(cataloged(models, index))[0] == []
    models.mkdir()
    assert seen(cataloged(models, index))[0] == []
    assert kept.read_bytes() == known
    models.rmdir()
    models.with_name("away").rename(models)
    assert seen(cataloged(models, index)) == first


def test_results_for_another_installation_of_mlx_lm_do_not_count(models: Path, index: Path, tmp_path: Path) -> None:
    path = lay_model(models / "org/name", settled=True)
    catalog = cataloged(models, index)
    place = ("custom", str(models))
    mine, other = Index(str(index), ["any"]), Index(str(index), ["another"])
    assert mine.load(place)[0].knew(str(path))
    assert not other.load(place)[0].knew(str(path))
    assert not mine.load(("tier", str(models)))[0].knew(str(path))
    assert catalog.sources[0].models
