"""Each thing that will bite is found, with what to do; a healthy machine has no findings."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import hf_overlay
import pytest
from hf_overlay import config, doctor
from hf_overlay.catalog.catalog import Catalog
from hf_overlay.doctor import Finding
from hf_overlay.models import Code

from tests.support import hfcache
from tests.support.folders import lay_model, weights
from tests.support.sessions import new_name

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"w"),
    "tokenizer.json": b"{}",
}


def examine(*roots: Path) -> list[Finding]:
    settings = config.load([str(root) for root in roots], os.environ, os.getcwd())
    return doctor.examine(Catalog(settings), os.environ)


def found(kind: str, *roots: Path) -> Finding:
    [finding] = [each for each in examine(*roots) if each.kind == kind]
    assert finding.advice
    return finding


def test_a_healthy_machine_has_no_findings(models: Path, hub: Path) -> None:
    lay_model(models / "org/name")
    hfcache.add_repo(hub, "org/cached", FILES)
    assert examine(models) == []


def test_a_session_finds_the_same_on_its_own_folders(models: Path, sessions: Path) -> None:
    lay_model(models / "org/bad", {"model.safetensors": b""})
    with hf_overlay.open_session([models]) as session:
        assert session.findings() == [found("rejected", models)]


def test_missing_paths_and_rejected_folders(models: Path) -> None:
    lay_model(models / "org/bad", {"model.safetensors": b""})
    assert "still being copied" in found("rejected", models).what
    assert "Wait for the copy" in found("rejected", models).advice
    assert found("source", models / "gone").what == "does not exist"


def test_every_reason_to_leave_a_folder_out_has_advice() -> None:
    assert set(Code) - doctor.ADVICE.keys() == {Code.WINS, Code.SHADOWED, Code.NOT_LINKABLE}


@pytest.mark.mlx_lm
def test_a_model_of_another_kind_is_no_reason_to_copy_it_again(models: Path) -> None:
    lay_model(models / "org/name", {"config.json": b'{"model_file": "mine.py", "model_type": "x"}'})
    assert "--kind any" in found("rejected", models).advice


def test_links_that_do_not_count_are_named_with_the_reason(models: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    folder = lay_model(models / "org/name", {"sub/notes.txt": b"notes"})
    (folder / "chat_template.jinja").symlink_to(tmp_path / "private")
    (folder / "sub/vocab.json").symlink_to("/unplugged/vocab.json")
    away, broken = (each for each in examine(models) if each.kind == "link")
    assert away.where == f"{folder}/chat_template.jinja"
    assert away.what == f"is a link to a file that is not a model's ({tmp_path}/private)"
    assert "Copy the file here" in away.advice
    assert broken.where == f"{folder}/sub/vocab.json"
    assert broken.what == "is a broken link (/unplugged/vocab.json)"
    assert "Connect the drive" in broken.advice


@pytest.mark.mlx_lm
def test_links_of_folders_that_are_left_out_are_named_too(models: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret")
    folder = lay_model(models / "org/name")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "private")
    assert found("rejected", models).what.startswith("has no tokenizer (tokenizer.json is a link to a file that is not")
    assert found("link", models).where == f"{folder}/tokenizer.json"


def test_apple_double_files(models: Path) -> None:
    lay_model(models / "org/name", {"._config.json": b"", "._model.safetensors": b""})
    finding = found("appledouble", models)
    assert finding.what.startswith("2 AppleDouble files")
    assert "dot_clean" in finding.advice


@pytest.mark.parametrize(
    ("name", "why"), [("a--b", "`--`"), ("org/sub/name", "more than one `/`"), ("é", "letters, digits")]
)
def test_ids_that_no_hub_client_accepts(models: Path, name: str, why: str) -> None:
    lay_model(models / name)
    finding = found("id", models)
    assert why in finding.what
    assert f"hf-overlay path {shlex.quote(name)}" in finding.advice


def test_duplicates_across_paths_and_names_that_differ_in_case(models: Path, tmp_path: Path) -> None:
    first = lay_model(models / "org/name")
    second = lay_model(tmp_path / "b/org/name")
    finding = found("duplicate", models, tmp_path / "b")
    assert finding.where == str(second)
    assert str(first) in finding.what
    lay_model(tmp_path / "c/Org/name")
    assert "differ in case only" in found("case", models, tmp_path / "c").what


def test_a_volume_without_links(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    assert "HF_OVERLAY_DIR" in found("symlinks", models).advice


def test_a_cache_that_is_read_only_full_or_no_folder(models: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.parent.mkdir(parents=True)
    hub.write_text("")
    assert found("cache", models).what == "the Hugging Face cache is not a folder"
    hub.unlink()
    hub.mkdir()
    with monkeypatch.context() as full:
        full.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_flag=0, f_bavail=10, f_frsize=4096))
        assert "0 MB are free" in found("cache", models).what
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    assert "read-only" in found("cache", models).what


def test_a_cached_repo_that_makes_every_plain_scan_fail(models: Path, hub: Path) -> None:
    snapshot = hfcache.add_repo(hub, "org/name", FILES)
    (snapshot.parents[1] / "refs/broken").write_bytes(b"\xff\xfe")
    [finding] = [each for each in examine(models) if each.kind == "cache"]
    assert finding.where == str(hub / "models--org--name")


@pytest.mark.parametrize(("version", "count"), [("1.31.0", 1), ("0.36.2", 1), ("1.32.0", 0), ("2.4.0", 0)])
def test_a_hub_library_whose_deletions_follow_links(
    models: Path, version: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: version)
    assert len([each for each in examine(models) if each.kind == "deletions"]) == count


def test_a_cache_on_a_drive_that_is_away_is_named_with_what_to_do(models: Path, hub: Path) -> None:
    hub.parent.mkdir(parents=True)
    hub.symlink_to("/nowhere/hub")
    finding = found("cache", models)
    assert finding.where == str(hub)
    assert "/nowhere/hub, which is not there" in finding.what
    assert "Connect that drive" in finding.advice
    assert "nothing is downloaded" in finding.advice


def test_downloads_that_dead_sessions_hold_are_named_with_their_sizes(models: Path, sessions: Path) -> None:
    dead = sessions / new_name()
    hfcache.add_repo(dead / "hubs/1", "org/name", {"model.safetensors": bytes(2_500_000)})
    (dead / ".hf-overlay-session").write_text("{}")
    finding = found("held", models)
    assert finding.where == str(dead)
    assert "models--org--name (2.5 MB)" in finding.what
    assert "hf-overlay clean" in finding.advice
    shutil.rmtree(dead)


def test_commands_in_advice_can_be_pasted_whatever_a_path_holds(tmp_path: Path) -> None:
    root = tmp_path / "my $models; touch pwned"
    lay_model(root / "a--b's", {"._config.json": b""})
    advice = found("appledouble", root).advice
    assert shlex.split(advice.partition("Remove them: ")[2]) == ["dot_clean", "-m", str(root)]
    command = found("id", root).advice.partition("--model ")[2]
    said = subprocess.run(
        ["/bin/sh", "-c", f"printf %s {command.replace('hf-overlay', 'echo')}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "path a--b's"


@pytest.mark.mlx_lm
def test_gguf_is_not_to_be_copied_again(models: Path) -> None:
    (models / "org/name").mkdir(parents=True)
    (models / "org/name/model.Q4.gguf").write_bytes(b"GGUF")
    advice = found("rejected", models).advice
    assert "llama.cpp" in advice
    assert "again" not in advice


def test_links_that_lead_nowhere_are_named_wherever_a_model_might_be(models: Path) -> None:
    (models / "org").mkdir()
    for name in ("top", "org/inner"):
        (models / name).symlink_to("/nowhere/model")
    findings = [each for each in examine(models) if each.kind == "rejected"]
    assert [each.where for each in findings] == [str(models / "org/inner"), str(models / "top")]
    assert all("not there" in each.what and "Connect" in each.advice for each in findings)


@pytest.mark.parametrize("inner", ["", "ollama", "models"])
def test_a_store_of_ollama_is_named(models: Path, inner: str) -> None:
    store = models / inner
    (store / "manifests/registry").mkdir(parents=True)
    (store / "blobs").mkdir()
    (store / "blobs" / f"sha256-{'0' * 64}").write_bytes(b"GGUF")
    finding = found("ollama", models)
    assert finding.where == os.path.normpath(store)
    assert "llama.cpp" in finding.advice
