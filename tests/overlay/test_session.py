"""Opening, reading, refreshing and removing a session, in one process."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay.tree.clear import clear_dead
from huggingface_hub import scan_cache_dir, snapshot_download

from tests.support import hfcache
from tests.support.folders import lay_model, weights
from tests.support.sessions import new_name, unannounced

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"from the cache"),
    "tokenizer.json": b"{}",
}


def load(session: hf_overlay.Session, model_id: str) -> str:
    return str(snapshot_download(model_id, cache_dir=session.hub_cache, local_files_only=True))


def listed(session: hf_overlay.Session) -> list[str]:
    info = scan_cache_dir(session.hub_cache)
    assert not info.warnings
    return sorted(repo.repo_id for repo in info.repos)


def test_all_names_of_the_api_are_there_and_are_listed_for_help_and_completion() -> None:
    assert set(hf_overlay.__all__) < set(dir(hf_overlay))
    assert all(getattr(hf_overlay, name) is not None for name in hf_overlay.__all__)
    assert "annotations" not in dir(hf_overlay)


def test_the_folder_stands_in_front_of_the_cache_and_the_rest_is_there(models: Path, hub: Path, sessions: Path) -> None:
    mine = lay_model(models / "org/both")
    lay_model(models / "org/mine")
    hfcache.add_repo(hub, "org/both", FILES)
    cached = hfcache.add_repo(hub, "org/cached", FILES)
    hfcache.add_repo(hub, "org/data", FILES, repo_type="dataset")
    with hf_overlay.open_session([models]) as session:
        assert listed(session) == ["org/both", "org/cached", "org/data", "org/mine"]
        assert (
            Path(load(session, "org/both"), "model.safetensors").read_bytes()
            == (mine / "model.safetensors").read_bytes()
        )
        assert Path(load(session, "org/cached"), "model.safetensors").read_bytes() == FILES["model.safetensors"]
        assert [(model.id, model.source) for model in session.models] == [
            ("org/both", "custom"),
            ("org/cached", "cache"),
            ("org/mine", "custom"),
        ]
        assert session.resolve("org/both") == mine
        assert session.resolve("org/cached") == cached


def test_a_session_is_private_and_gone_at_its_end(models: Path, sessions: Path) -> None:
    lay_model(models / "org/name", {"sub/file.txt": b"x"})
    with hf_overlay.open_session([models]) as session:
        assert stat.S_IMODE(session.path.stat().st_mode) == 0o700
        assert session.path.parent == sessions
    assert not session.path.exists()


def test_the_environment_leads_to_the_overlay_and_leaves_the_rest_alone(
    models: Path, home: Path, sessions: Path
) -> None:
    environ = {
        "HOME": str(home),
        "PATH": "/bin",
        "TRANSFORMERS_CACHE": "/old",
        "LLAMA_CACHE": "/l",
        "HF_TOKEN": "secret",
    }
    with hf_overlay.open_session([models], environ=environ) as session:
        assert session.environment == {
            "HOME": str(home),
            "PATH": "/bin",
            "HF_TOKEN": "secret",
            "HF_HOME": str(home / ".cache/huggingface"),
            "HF_HUB_CACHE": str(session.hub_cache),
            "HUGGINGFACE_HUB_CACHE": str(session.hub_cache),
            "HF_HUB_DISABLE_SHARED_BLOBS": "1",
        }


def test_home_is_an_hf_home_with_the_users_token_and_datasets(models: Path, home: Path, sessions: Path) -> None:
    real = home / ".cache/huggingface"
    (real / "datasets").mkdir(parents=True)
    with hf_overlay.open_session([models]) as session:
        (session.home / "token").write_text("a new login")
        assert (session.home / "datasets").samefile(real / "datasets")
        assert (session.home / "hub").samefile(session.hub_cache)
    assert (real / "token").read_text() == "a new login", "a login in a session is the user's login"


def test_refresh_tells_and_shows_what_was_added_changed_and_removed(models: Path, sessions: Path) -> None:
    lay_model(models / "org/changed")
    removed = lay_model(models / "org/removed")
    with hf_overlay.open_session([models]) as session:
        assert session.refresh() == ((), (), ())
        lay_model(models / "org/added")
        (models / "org/changed/new.txt").write_text("new")
        removed.rename(models.parent / "removed")
        shown = os.listdir(session.hub_cache)
        assert [model.id for model in session.scan()] == ["org/added", "org/changed"]
        assert os.listdir(session.hub_cache) == shown, "a scan leaves the tree as it is"
        assert session.refresh() == (("org/added",), ("org/changed",), ("org/removed",))
        assert listed(session) == ["org/added", "org/changed"]
        assert Path(load(session, "org/changed"), "new.txt").read_text() == "new"


def test_a_load_that_has_begun_goes_on_in_the_tree_it_began_in(models: Path, sessions: Path) -> None:
    """snapshot_download hands out a path; what is read through it later must still be there after a refresh."""
    lay_model(models / "org/name", {"first.txt": b"1", "second.txt": b"2"})
    with hf_overlay.open_session([models]) as session:
        begun = Path(load(session, "org/name"))
        assert (begun / "first.txt").read_bytes() == b"1"
        (models / "org/name/added.txt").write_text("changes the commit")
        assert session.refresh().changed == ("org/name",)
        assert (begun / "second.txt").read_bytes() == b"2"
        assert not (begun / "added.txt").exists()
        assert Path(load(session, "org/name"), "added.txt").exists()


def test_an_unchanged_refresh_touches_nothing(models: Path, hub: Path, sessions: Path) -> None:
    lay_model(models / "org/name")
    hfcache.add_repo(hub, "org/cached", FILES)
    with hf_overlay.open_session([models]) as session:
        before = hfcache.listing(session.path)
        session.refresh()
        assert hfcache.listing(session.path) == before


def test_a_refresh_looks_again_only_for_folders_of_what_changed(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each such look takes a thread, since a disk may hang: a thousand of them took ten times the rest of a refresh."""
    for name in ("org/a", "org/b", "org/changed"):
        lay_model(models / name)
    looked: list[str] = []
    is_folder = hf_overlay.Session.is_folder

    def recorded(session: hf_overlay.Session, path: str, root: str) -> bool:
        looked.append(path)
        return is_folder(session, path, root)

    with hf_overlay.open_session([models]) as session:
        lay_model(models / "org/changed", {"config.json": b'{"model_type": "llama", "n": 1}'})
        monkeypatch.setattr(hf_overlay.Session, "is_folder", recorded)
        assert session.refresh().changed == ("org/changed",)
    assert looked == [str(models / "org/changed")]


def test_refresh_brings_back_what_a_client_deleted(models: Path, hub: Path, sessions: Path) -> None:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models]) as session:
        (session.hub_cache / "models--org--name").unlink()
        session.refresh()
        assert listed(session) == ["org/name"]


def delete_files(repo: Path) -> None:
    """As `HFCacheInfo.delete_files` does it since 1.32."""
    path = next(repo.glob("snapshots/*/sub/file.txt"))
    blob = Path(os.path.normpath(path.parent / path.readlink()))
    path.unlink()
    blob.unlink()


def delete_snapshots(repo: Path) -> None:
    """With a user's rights only who does not mind modes gets so far."""
    (repo / "snapshots").chmod(0o700)
    shutil.rmtree(repo / "snapshots")


def delete_all(repo: Path) -> None:
    for sealed in ("refs", "snapshots"):
        (repo / sealed).chmod(0o700)
    shutil.rmtree(repo.resolve())


DAMAGE: dict[str, Callable[[Path], None]] = {
    "delete_files": delete_files,
    "a blob": lambda repo: next(repo.glob("blobs/*")).unlink(),
    "a file of the snapshot": lambda repo: next(repo.glob("snapshots/*/config.json")).unlink(),
    "a file in a folder of the snapshot": lambda repo: next(repo.glob("snapshots/*/sub/file.txt")).unlink(),
    "all blobs": lambda repo: shutil.rmtree(repo / "blobs"),
    "the snapshots": delete_snapshots,
    "everything": delete_all,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_refresh_mends_a_model_of_which_a_client_deleted_parts(
    models: Path, sessions: Path, damage: Callable[[Path], None]
) -> None:
    folder = lay_model(models / "org/name", {"sub/file.txt": b"x"})
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with hf_overlay.open_session([models]) as session:
        for _ in range(3):
            damage(session.hub_cache / "models--org--name")
            assert session.refresh() == ((), (), ()), "the user's folder is as it was"
            assert listed(session) == ["org/name"]
            begun = Path(load(session, "org/name"))
            assert {path.relative_to(begun): path.read_bytes() for path in begun.rglob("*") if path.is_file()} == files
            before = hfcache.listing(session.path)
            session.refresh()
            assert hfcache.listing(session.path) == before, "what is mended stays as it is"
    assert not session.path.exists()


def test_a_load_that_began_in_what_a_client_damaged_keeps_what_is_left(models: Path, sessions: Path) -> None:
    lay_model(models / "org/name", {"first.txt": b"1", "second.txt": b"2"})
    with hf_overlay.open_session([models]) as session:
        begun = Path(load(session, "org/name")).resolve()
        (begun / "first.txt").unlink()
        session.refresh()
        assert (begun / "second.txt").read_bytes() == b"2"
        assert Path(load(session, "org/name"), "first.txt").read_bytes() == b"1"
        assert not (begun / "first.txt").exists(), "made aside: whoever reads never meets half of one"


def test_what_a_program_writes_beside_a_models_files_is_no_damage(models: Path, sessions: Path) -> None:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models]) as session:
        begun = Path(load(session, "org/name")).resolve()
        (begun / "notes.txt").touch()
        for _ in range(2):
            session.refresh()
            assert Path(load(session, "org/name")).resolve() == begun
        (begun / "config.json").unlink()  # and is not overlooked afterwards
        session.refresh()
        assert Path(load(session, "org/name"), "config.json").exists()


def test_rebuilding_gives_the_same_tree(models: Path, hub: Path, sessions: Path) -> None:
    lay_model(models / "org/name", {"sub/file.txt": b"x"})
    hfcache.add_repo(hub, "org/cached", FILES)
    trees = []
    for _ in range(2):
        with hf_overlay.open_session([models]) as session:
            trees.append(
                {name: (e[0], e[4]) for name, e in hfcache.listing(session.path).items() if "owner" not in name}
            )
    names = [{name for name in tree if not name.startswith(".hf-overlay")} for tree in trees]
    assert names[0] == names[1]
    assert all(trees[0][name] == trees[1][name] for name in names[0] if trees[0][name][0] != "folder")


def test_a_session_in_a_session_works(models: Path, tmp_path: Path, sessions: Path) -> None:
    lay_model(models / "org/outer")
    lay_model(tmp_path / "inner/org/inner")
    with (
        hf_overlay.open_session([models]) as outer,
        hf_overlay.open_session([tmp_path / "inner"], environ=outer.environment) as inner,
    ):
        assert listed(inner) == ["org/inner", "org/outer"]


def test_ids_from_outside_are_refused_before_the_disk_is_touched(
    models: Path, sessions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models / "org"]) as session:
        with monkeypatch.context() as no_disk:
            for name in ("stat", "open", "scandir", "listdir", "lstat", "readlink"):
                no_disk.setattr(os, name, None)
            for bad in ("..", "../org/name", "a/../b", "/etc", "", "a//b", "a/", "a\0b", "a\\b", ".", "./a"):
                with pytest.raises(hf_overlay.InvalidModelId):
                    session.resolve(bad)
        with pytest.raises(hf_overlay.ModelNotFound, match="did you mean name"):
            session.resolve("nam")


def test_start_up_logs_the_paths_or_that_there_are_none(
    models: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_overlay")
    with hf_overlay.open_session([models]):
        pass
    with hf_overlay.open_session(environ={"HOME": os.environ["HOME"]}):
        pass
    assert [record.message for record in caplog.records] == [f"model paths: {models}", "using HuggingFace cache only"]


def test_a_path_that_is_a_file_is_refused_and_leaves_nothing(tmp_path: Path, sessions: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(hf_overlay.UsageError, match="is a file"), hf_overlay.open_session([tmp_path / "file"]):
        pass


def download(session: hf_overlay.Session) -> None:
    """What a client leaves in the hub folder when no gateway saw it coming."""
    hfcache.add_repo(session.hub_cache, "org/downloaded", FILES, locks=True)


def test_what_clients_downloaded_stays_visible_and_comes_home_at_the_end(
    models: Path, hub: Path, sessions: Path, tmp_path: Path
) -> None:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models]) as session:
        download(session)
        session.refresh()
        lay_model(models / "org/new")
        session.refresh()
        assert listed(session) == ["org/downloaded", "org/name", "org/new"]
    plain = tmp_path / "plain"
    hfcache.add_repo(plain, "org/downloaded", FILES)
    assert contents(hub / "models--org--downloaded") == contents(plain / "models--org--downloaded")


def test_a_download_that_cannot_come_home_stays_is_named_and_comes_at_a_later_start(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hf_overlay.open_session([models]) as session:
        download(session)
        hub.parent.mkdir(parents=True)
        hub.write_text("in the way")
    [kept] = session.path.glob("hubs/1/*")
    assert f"a download stays in {kept}" in caplog.text
    before = contents(kept)
    [cleared] = clear_dead(str(sessions))
    assert cleared.kept == (str(kept),)
    assert contents(kept) == before, "what could not be moved is not touched"
    hub.unlink()
    [cleared] = clear_dead(str(sessions))
    assert cleared.kept == ()
    assert contents(hub / kept.name) == before


def contents(folder: Path) -> dict[str, tuple[str, str]]:
    return {name: (entry[0], entry[4]) for name, entry in hfcache.listing(folder).items()}


def test_a_load_goes_on_after_a_refresh_however_old_its_tree_is(models: Path, sessions: Path) -> None:
    lay_model(models / "org/name", {"file.txt": b"1"})
    with hf_overlay.open_session([models], environ=unannounced()) as session:
        begun = Path(load(session, "org/name"))
        os.utime(session.path / "hubs/1", (1, 1))
        (models / "org/name/added.txt").write_text("changes the commit")
        session.refresh()
        assert (begun / "file.txt").read_bytes() == b"1"
        os.utime(session.path / "hubs/1", (1, 1))
        (models / "org/name/more.txt").write_text("changes the commit again")
        session.refresh()
        assert not (session.path / "hubs/1").exists(), "an hour after it was replaced, a tree goes"
        assert len(list((session.path / "repos").iterdir())) == 2


def test_a_model_that_is_being_copied_is_shown_once_it_rests(models: Path, sessions: Path) -> None:
    """Looked at every two seconds, a copy that grows must not make a tree each time."""
    lay_model(models / "org/old")
    with hf_overlay.open_session([models]) as session:
        assert session.refresh(only_settled=True) == ((), (), ())
        new = lay_model(models / "org/new")
        for _ in range(5):
            with (
                (new / "model.safetensors").open("ab") as file,
                (models / "org/old/model.safetensors").open("ab") as old,
            ):
                file.write(b"more")
                old.write(b"more")
            assert session.refresh(only_settled=True) == ((), (), ())
            assert listed(session) == ["org/old"]
        assert session.refresh(only_settled=True) == (("org/new",), ("org/old",), ())
        assert session.refresh(only_settled=True) == ((), (), ())
        assert len(list((session.path / "hubs").iterdir())) == 2


def test_a_folder_that_is_again_as_it_was_keeps_its_readers(models: Path, sessions: Path) -> None:
    lay_model(models / "org/name", {"file.txt": b"1"})
    with hf_overlay.open_session([models]) as session:
        begun = Path(load(session, "org/name"))
        added = models / "org/name/added.txt"
        added.write_text("new")
        session.refresh()
        added.unlink()
        session.refresh()
        assert (begun / "file.txt").read_bytes() == b"1"
        assert load(session, "org/name").endswith(begun.name)


def test_dead_sessions_are_cleared_and_living_ones_are_not(models: Path, sessions: Path) -> None:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models]) as living:
        dead, empty = sessions / new_name(), sessions / new_name()
        (dead / "hubs/1").mkdir(parents=True)
        (dead / ".hf-overlay-session").write_text("{}")
        (dead / "hubs/1/models--x").symlink_to(models)
        empty.mkdir()
        (sessions / "not-ours").mkdir()
        assert [cleared.path for cleared in clear_dead(str(sessions))] == [str(dead), str(empty)]
        assert {path.name for path in sessions.iterdir()} == {"sessions.lock", "shared", "not-ours", living.path.name}
        assert listed(living) == ["org/name"]
    assert (models / "org/name/config.json").exists()
