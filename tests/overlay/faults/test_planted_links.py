"""Links to private files, planted in a model's folder: they are not listed, not linked, not served (P12)."""

from __future__ import annotations

import os
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.catalog import links
from hf_overlay.gateway import routes
from hf_overlay.gateway.exchange import Request

from tests.support.folders import lay_model


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A user's files, none of which is model data."""
    home = tmp_path / "private"
    (home / ".ssh").mkdir(parents=True)
    for name in (".netrc", "passwords", "account.json", "notes.txt", ".ssh/id_rsa"):
        (home / name).write_text("secret")
    return home


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model on another drive."""
    return lay_model(tmp_path / "other-drive/base")


def _files(models: Path) -> set[str]:
    with hf_overlay.open_session([models]) as session:
        (model,) = session.models
        in_tree = {path.name for path in Path(session.resolve("org/mine")).iterdir()}
        hub = Path(session.environment["HF_HUB_CACHE"])
        linked = {path.name for path in hub.glob("models--org--mine/snapshots/*/*")}
        assert in_tree >= linked
        return {file.name for file in model.files}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("notes.txt", "passwords"),
        ("passwords", "passwords"),
        ("account.json", "account.json"),
        ("notes.txt", "notes.txt"),
        ("x.netrc", ".netrc"),
        ("more", ".ssh"),
        ("extra.safetensors", "passwords"),
    ],
)
def test_links_to_private_files_are_left_out(
    name: str, target: str, models: Path, private: Path, sessions: Path
) -> None:
    folder = lay_model(models / "org/mine")
    own = _files(models)
    (folder / name).symlink_to(private / target)
    assert _files(models) == own


def test_a_config_that_is_a_link_to_a_private_file_is_a_reason_to_leave_the_model_out(
    models: Path, private: Path, sessions: Path
) -> None:
    folder = lay_model(models / "org/mine")
    (folder / "config.json").rename(private / "config.json")
    (folder / "config.json").symlink_to(private / "config.json")
    with hf_overlay.open_session([models]) as session:
        assert session.models == ()
        with pytest.raises(hf_overlay.ModelNotFound, match=r"config\.json is a link to a file that is not a model's"):
            session.resolve("org/mine")


def test_links_to_model_data_stay(models: Path, other: Path, private: Path, sessions: Path) -> None:
    folder = lay_model(models / "org/mine")
    own = _files(models)
    weights = next(other.glob("*.safetensors"))
    (other / "tokenizer_config.json").write_text("{}")
    (private / ("a" * 64)).write_text("blob")
    (private / f"sha256-{'b' * 64}").write_text("blob")
    links_ = {
        "model-more.safetensors": weights,
        "tokenizer_config.json": other / "tokenizer_config.json",
        "merges.txt": private / ("a" * 64),
        "params.txt": private / f"sha256-{'b' * 64}",
        "inside.md": folder / "config.json",
        "folder": other,
    }
    for name, target in links_.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    inside = {f"folder/{path.name}" for path in other.iterdir()}
    assert _files(models) == own | (links_.keys() - {"folder"}) | inside


def test_a_whole_model_that_is_a_link_stays(models: Path, other: Path, sessions: Path) -> None:
    (models / "org").mkdir(parents=True)
    (models / "org/mine").symlink_to(other)
    assert _files(models) == {path.name for path in other.iterdir()}


def status(session: hf_overlay.Session, model: hf_overlay.Model, name: str) -> int:
    """The status of the gateway's answer to a request for a file."""
    request = Request("HEAD", "", [], iter(()))
    return routes._file(request, model, "c" * 40, name, session.ask).status


def test_a_link_that_took_a_files_place_after_the_scan_is_not_served(
    models: Path, private: Path, sessions: Path
) -> None:
    folder = lay_model(models / "org/mine")
    with hf_overlay.open_session([models]) as session:
        (model,) = session.models
        for name, expected in (("config.json", 200), ("no", 404)):
            assert status(session, model, name) == expected
        os.replace(private / "account.json", private / "config.json")
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(private / "config.json")
        assert status(session, model, "config.json") == 404


def test_a_folder_named_snapshots_makes_nothing_else_a_models_own(tmp_path: Path) -> None:
    model = lay_model(tmp_path / "user/snapshots/mine")
    assert links.home_of(str(model)) == os.path.realpath(model)
