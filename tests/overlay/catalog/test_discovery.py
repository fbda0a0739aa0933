"""Which folders are models, and why each other one is not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_overlay.catalog import reading
from hf_overlay.catalog.kinds import ModelTypes, installed
from hf_overlay.catalog.scan import Scanner
from hf_overlay.models import Code, Source

from tests.support import hfcache
from tests.support.folders import lay_model, settle, weights

TYPES = installed()
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"w"),
    "tokenizer.json": b"{}",
}


def scan(root: Path, *, types: ModelTypes | None = TYPES, hub: Path = Path("/nonexistent")) -> Source:
    [source] = Scanner((str(root),), str(hub), types).scan()
    return source


def ids(source: Source) -> list[str]:
    return [model.id for model in source.models]


def reasons(source: Source) -> dict[str | None, str]:
    return {reject.id: reject.reason.text for reject in source.rejects}


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"layer.{n}": shard for n, shard in enumerate(shards)}}).encode()


def test_flat_nested_and_deeper_folders_keep_their_whole_path_as_id(models: Path) -> None:
    for name in ("flat", "org/name", "org/sub/name"):
        lay_model(models / name)
    assert ids(scan(models)) == ["flat", "org/name", "org/sub/name"]


def test_folders_inside_a_model_are_its_own_and_not_models(models: Path) -> None:
    lay_model(models / "org/name", {f"original/{name}": content for name, content in FILES.items()})
    [model] = scan(models).models
    assert [file.name for file in model.files] == sorted([*FILES, *(f"original/{name}" for name in FILES)])


def test_a_model_tells_its_type_size_and_files(models: Path) -> None:
    folder = lay_model(models / "org/name", {"tokenizer.json": b"{}"}, model_type="qwen3")
    [model] = scan(models).models
    assert (model.path, model.model_type, model.source, model.root) == (str(folder), "qwen3", "custom", str(models))
    assert model.size_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_junk_is_no_part_of_a_model_and_is_counted(models: Path) -> None:
    junk = ["._config.json", ".DS_Store", "Thumbs.db", "a.incomplete", "b.lock", ".cache/huggingface/x", ".git/HEAD"]
    lay_model(models / "org/name", dict.fromkeys(junk, b"junk"))
    lay_model(models / "org/._name")
    lay_model(models / ".Trashes/org/name")
    source = scan(models)
    assert [[file.name for file in model.files] for model in source.models] == [list(FILES)]
    assert source.junk == 2, "AppleDouble files are counted for doctor: one beside the folder, one in it"


@pytest.mark.mlx_lm
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}", "no model_type"),
        (b'{"model_type": "bert"}', "model type 'bert' is not one"),
        (b'{"model_type": ["llama"]}', "is not one"),
        (b'{"model_type": "../llama"}', "is not one"),
        (b'{"model_type": "cache"}', "is not one"),
        (b'{"model_type": "llama", "model_file": "evil.py"}', "its own code"),
    ],
)
def test_a_config_that_mlx_lm_cannot_load_is_rejected_with_its_reason(models: Path, config: bytes, reason: str) -> None:
    lay_model(models / "org/bad", {"config.json": config})
    lay_model(models / "org/good")
    source = scan(models)
    assert ids(source) == ["org/good"], "one broken folder hides only itself"
    assert reason in reasons(source)["org/bad"]


@pytest.mark.mlx_lm
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"model.safetensors": None}, "no weights"),
        ({"model.safetensors": b""}, "model.safetensors is empty"),
        ({"model.safetensors": None, "weights.safetensors": weights(b"w")}, "no weights"),
        ({"model.safetensors.index.json": index("model-1.safetensors")}, "model-1.safetensors is missing"),
        ({"model.safetensors.index.json": b'{"weight_map'}, "not valid JSON"),
        ({"model.safetensors.index.json": b"{}"}, "no weight_map"),
        ({"model.safetensors.index.json": index("../other/model.safetensors")}, "is missing"),
        ({"model-00001-of-00002.safetensors": weights(b"w"), "model.safetensors": None}, "1 of 2 shards not there"),
        (
            {"model-00001-of-00002.safetensors": weights(b"w"), "model-00002-of-00002.safetensors": b""},
            "model-00002-of-00002.safetensors is empty",
        ),
    ],
)
def test_weights_still_being_copied_are_rejected(models: Path, files: dict[str, bytes | None], reason: str) -> None:
    folder = lay_model(models / "org/name", {name: content for name, content in files.items() if content is not None})
    for name in (name for name, content in files.items() if content is None):
        (folder / name).unlink()
    source = scan(models)
    assert not source.models
    assert reason in reasons(source)["org/name"]


def test_a_copy_that_completes_is_picked_up_by_the_same_scanner(models: Path) -> None:
    folder = lay_model(models / "org/name", {"model.safetensors.index.json": index("model-1.safetensors")})
    scanner = Scanner((str(models),), "/nonexistent", TYPES)
    assert not scanner.scan()[0].models
    (folder / "model-1.safetensors").write_bytes(weights(b"w"))
    assert ids(scanner.scan()[0]) == ["org/name"]


@pytest.mark.parametrize("settled", [False, True])
def test_scanning_again_sees_every_change_of_a_folder(models: Path, settled: bool) -> None:
    """The cheap second look must not miss a file added, removed, renamed, or a rewritten config.json."""
    folder = lay_model(models / "org/name", {"sub/a.txt": b"a"}, settled=settled)
    scanner = Scanner((str(models),), "/nonexistent", TYPES)

    def names() -> list[str]:
        if settled:
            for path in folder.rglob("*"):
                if path.is_file() and path.name != "config.json":
                    os.utime(path, (1, 1))
        return [file.name for model in scanner.scan()[0].models for file in model.files]

    assert names() == ["config.json", "model.safetensors", "sub/a.txt", "tokenizer.json"]
    (folder / "b.txt").write_bytes(b"b")
    assert "b.txt" in names()
    (folder / "b.txt").rename(folder / "c.txt")
    assert names() == ["c.txt", "config.json", "model.safetensors", "sub/a.txt", "tokenizer.json"]
    (folder / "sub/d.txt").write_bytes(b"d")
    assert "sub/d.txt" in names()
    (folder / "config.json").write_bytes(b'{"model_type": "qwen3"}')
    assert [model.model_type for model in scanner.scan()[0].models] == ["qwen3"]
    (folder / "config.json").unlink()
    assert not scanner.scan()[0].models


def test_an_unchanged_settled_model_is_not_listed_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_model(models / "org/name", settled=True)
    scanner = Scanner((str(models),), "/nonexistent", TYPES)
    [before] = scanner.scan()[0].models
    listed: list[str] = []
    scandir = os.scandir

    def spy(path: str) -> object:
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", spy)
    [after] = scanner.scan()[0].models
    assert after is before
    assert listed == [str(models), str(models / "org")]


@pytest.mark.mlx_lm
def test_a_stray_config_does_not_hide_the_models_below_it(models: Path) -> None:
    lay_model(models / "org/name")
    (models / "config.json").write_text('{"model_type": "llama"}')
    (models / "org/config.json").write_text("{}")
    source = scan(models)
    assert ids(source) == ["org/name"]
    assert "no model_type" in reasons(source)["org"]


@pytest.mark.mlx_lm
def test_weights_without_config_are_rejected_and_named(models: Path) -> None:
    (models / "pub/model-GGUF").mkdir(parents=True)
    (models / "pub/model-GGUF/model-Q4.gguf").write_bytes(b"GGUF")
    lay_model(models / "pub/model-MLX")
    source = scan(models)
    assert ids(source) == ["pub/model-MLX"]
    assert [each.reason.code for each in source.rejects if each.id == "pub/model-GGUF"] == [Code.GGUF]
    assert reasons(source)["pub/model-GGUF"] == "has no config.json (only .gguf files)"


@pytest.mark.mlx_lm
def test_all_kinds_drops_the_rule_of_model_types_only(models: Path) -> None:
    lay_model(models / "org/bert", model_type="bert")
    (models / "org/pipe/unet").mkdir(parents=True)
    (models / "org/pipe/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (models / "org/pipe/unet/config.json").write_text("{}")
    (models / "org/sentence").mkdir()
    (models / "org/sentence/modules.json").write_text("[]")
    lay_model(models / "org/half", {"model-00001-of-00002.safetensors": weights(b"w")}, model_type="bert")
    assert ids(scan(models)) == []
    every = scan(models, types=None)
    assert ids(every) == ["org/bert", "org/pipe", "org/sentence"]
    assert "shards not there" in reasons(every)["org/half"]


def test_a_model_path_that_is_itself_a_model_is_told_so(models: Path) -> None:
    lay_model(models / "name")
    source = scan(models / "name")
    assert not source.models
    assert "give the folder above it" in source.rejects[0].reason.text


def test_a_second_cache_is_a_source_with_its_main_revision_and_true_commit(models: Path) -> None:
    other = {**FILES, "new.txt": b"n"}
    snapshot = hfcache.add_repo(models / "hf/hub", "org/name", FILES)
    hfcache.add_repo(models / "hf/hub", "org/name", other, refs=("dev",))
    hfcache.add_repo(models / "hf/hub", "org/data", FILES, repo_type="dataset")
    hfcache.add_repo(models / "hf/hub", "org/single", FILES, refs=())
    hfcache.add_repo(models / "hf/hub", "org/many", FILES, refs=())
    hfcache.add_repo(models / "hf/hub", "org/many", other, refs=())
    source = scan(models)
    assert ids(source) == ["org/name", "org/single"]
    model = source.models[0]
    assert (model.path, model.commit) == (str(snapshot), snapshot.name)
    assert all(file.etag == hfcache.etag(file.name, FILES[file.name]) for file in model.files)
    assert reasons(source) == {"org/many": "has no refs/main; it holds 2 revisions by commit only"}


def test_what_hf_download_recorded_gives_the_true_commit_while_it_is_true(models: Path) -> None:
    folder = lay_model(models / "org/name", settled=True)
    commit = "c" * 40
    for name in FILES:
        record = folder / ".cache/huggingface/download" / f"{name}.metadata"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{commit}\n{'e' * 40}\n{(folder / name).stat().st_mtime + 1}\n")
    [model] = scan(models).models
    assert model.commit == commit
    (folder / "model.safetensors").write_bytes(weights(b"changed since"))
    [model] = scan(models).models
    assert model.commit is None, "a file newer than its record proves nothing"
    settle(folder)
    (folder / "added.txt").write_text("not in the record")
    [model] = scan(models).models
    assert model.commit is None, "a file without a record proves nothing"


def test_the_real_cache_and_sessions_under_a_model_path_are_not_the_users_models(models: Path) -> None:
    hub = models / "huggingface/hub"
    hfcache.add_repo(hub, "org/cached", FILES)
    session = models / "hf-overlay/sessions/session-1"
    lay_model(session / "hubs/x")
    (session / ".hf-overlay-session").write_text("{}")
    lay_model(models / "org/name")
    assert ids(scan(models, hub=hub)) == ["org/name"]
    own = scan(hub, hub=hub)
    assert not own.models
    assert "is the Hugging Face cache itself" in own.rejects[0].reason.text


def test_links_to_models_are_followed_and_loops_end(models: Path, tmp_path: Path) -> None:
    elsewhere = lay_model(tmp_path / "elsewhere/name")
    (models / "org").mkdir()
    (models / "org/linked").symlink_to(elsewhere)
    (models / "org/again").symlink_to(elsewhere)
    (models / "alias").symlink_to(models / "org")
    (models / "org/loop").symlink_to(models)
    (models / "self").symlink_to("self")
    (models / "up").symlink_to(models.parent)
    source = scan(models)
    assert ids(source) == ["alias/again", "alias/linked", "org/again", "org/linked"]
    by_path = {reject.path: reject.reason.text for reject in source.rejects}
    assert "back to a folder above it" in by_path[str(models / "org/loop")]
    assert "back to a folder above it" in by_path[str(models / "up")]


@pytest.mark.mlx_lm
def test_links_inside_a_model_are_followed_unless_they_lead_to_what_holds_it(models: Path, tmp_path: Path) -> None:
    big = tmp_path / "elsewhere.safetensors"
    big.write_bytes(weights(b"weights"))
    folder = lay_model(models / "org/name")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(big)
    (folder / "gone.txt").symlink_to(tmp_path / "gone")
    (folder / "up").symlink_to(models)
    (folder / "me").symlink_to(".")
    [model] = scan(models).models
    assert [file.name for file in model.files] == list(FILES)
    big.unlink()
    assert "model.safetensors is a broken link" in reasons(scan(models))["org/name"]


@pytest.mark.mlx_lm
def test_the_cache_lists_what_mlx_lm_load_finds_there(hub: Path) -> None:
    snapshot = hfcache.add_repo(hub, "org/name", FILES)
    hfcache.add_repo(hub, "org/pinned", FILES, refs=("v1",))
    hfcache.add_repo(hub, "org/bert", {**FILES, "config.json": b'{"model_type": "bert"}'})
    hfcache.add_repo(hub, "org/data", FILES, repo_type="dataset")
    source = Scanner((), str(hub), TYPES).scan_cache()
    assert [(model.id, model.path, model.source) for model in source.models] == [("org/name", str(snapshot), "cache")]
    assert "no refs/main" in reasons(source)["org/pinned"]
    assert "bert" in reasons(source)["org/bert"]


@pytest.mark.mlx_lm
@pytest.mark.parametrize("settled", [False, True])
def test_scanning_the_cache_again_sees_every_change_of_a_repo(hub: Path, settled: bool) -> None:
    """A new main revision, a blob that is gone, a repo that is gone; and what is as it was is found again."""
    scanner = Scanner((), str(hub), TYPES)
    first = hfcache.add_repo(hub, "org/name", FILES)
    other = hfcache.add_repo(hub, "org/other", FILES)

    def look() -> list[str]:
        if settled:
            settle(hub)
            scanner.scan_cache()
        return [model.path for model in scanner.scan_cache().models]

    assert look() == look() == [str(first), str(other)]
    second = hfcache.add_repo(hub, "org/name", {**FILES, "model.safetensors": weights(b"newer")})
    assert [model.path for model in scanner.scan_cache().models] == [str(second), str(other)]
    look()
    (second / "model.safetensors").resolve().unlink()
    assert [model.path for model in scanner.scan_cache().models] == [str(other)]
    look()
    (other.parents[1] / "refs" / "main").unlink()
    assert scanner.scan_cache().models == ()


@pytest.mark.parametrize(
    "lack",
    [*(pytest.param(each, marks=pytest.mark.mlx_lm) for each in ("weights", "type")), "main", "snapshot", "drive"],
)
def test_a_cached_repo_that_is_no_model_is_not_read_again_until_it_changes(
    hub: Path, lack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: it comes back by itself. Caches hold many such repos: of some models only the config was ever asked for."""
    scanner = Scanner((), str(hub), TYPES)
    snapshot = hfcache.add_repo(hub, "org/name", FILES)
    repo, config, weights_ = snapshot.parents[1], snapshot / "config.json", snapshot / "model.safetensors"
    drive, aside = hub.parent / "drive", hub.parent / "aside"
    if lack == "drive":
        lay_model(drive)
        snapshot.rename(hub.parent / "first")
        snapshot.symlink_to(drive)
    blob = weights_.resolve()
    spoil: dict[str, Callable[[], object]] = {
        "weights": weights_.unlink,
        "type": lambda: config.resolve().write_text('{"model_type": "bert"}'),
        "main": lambda: (repo / "refs/main").rename(aside),
        "snapshot": lambda: snapshot.rename(aside),
        "drive": lambda: drive.rename(aside),
    }
    repair: dict[str, Callable[[], object]] = {
        "weights": lambda: weights_.symlink_to(blob),
        "type": lambda: config.resolve().write_bytes(FILES["config.json"]),
        "main": lambda: aside.rename(repo / "refs/main"),
        "snapshot": lambda: aside.rename(snapshot),
        "drive": lambda: aside.rename(drive),
    }
    spoil[lack]()
    first = scanner.scan_cache().rejects
    assert [reject.id for reject in first] == ["org/name"]
    assert scanner.scan_cache().rejects == first
    with monkeypatch.context() as patched:
        patched.setattr(reading, "read_cached_repo", None)
        assert scanner.scan_cache().rejects == scanner.scan_cache().rejects == first
    repair[lack]()
    assert scanner.scan_cache().rejects == ()


def test_a_cached_repo_of_plain_files_is_a_model_however_old_it_is(hub: Path) -> None:
    """As copied to a volume without links: there is no `blobs`."""
    snapshot = hub / "models--org--name/snapshots" / ("a" * 40)
    lay_model(snapshot, settled=True)
    (hub / "models--org--name/refs").mkdir()
    (hub / "models--org--name/refs/main").write_text("a" * 40)
    scanner = Scanner((), str(hub), TYPES)
    for _ in range(2):
        assert [model.path for model in scanner.scan_cache().models] == [str(snapshot)]
