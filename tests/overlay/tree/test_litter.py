"""What an operating system leaves in a folder that somebody looked into is no download."""

from __future__ import annotations

import logging
from pathlib import Path

import hf_overlay
import pytest
from hf_overlay import hfcache as layout
from hf_overlay.tree import held
from hf_overlay.tree.clear import clear_dead

from tests.overlay.faults.seen import CACHED, said
from tests.support import hfcache
from tests.support.folders import lay_model
from tests.support.sessions import new_name

LITTER = {".DS_Store": b"Bud1", "._config.json": b"\0\5\26\7", "Icon\r": b"", "desktop.ini": b"[x]"}


def litter(folder: Path) -> None:
    """Have somebody look into a folder and those in it."""
    for each in [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]:
        mode = each.stat().st_mode
        each.chmod(0o700)
        for name, content in LITTER.items():
            (each / name).write_bytes(content)
        (each / ".Spotlight-V100").mkdir()
        (each / ".Spotlight-V100/store.db").write_bytes(b"index")
        each.chmod(mode)


def test_it_is_neither_kept_nor_warned_of_nor_moved_into_the_real_cache(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "org/mine", {"sub/tokenizer.json": b"{}"})
    hfcache.add_repo(hub, "org/cached", CACHED)
    before = hfcache.listing(hub)
    with caplog.at_level(logging.INFO, "hf_overlay"), hf_overlay.open_session([models]) as session:
        litter(session.path)
        session.refresh()
        assert held.payloads(str(session.path)) == []
        assert [model.id for model in session.models] == ["org/cached", "org/mine"]
    assert not session.path.exists()
    assert said(caplog) == []
    assert hfcache.listing(hub) == before


def test_what_was_downloaded_beside_it_comes_home_alone(
    models: Path, hub: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_model(models / "org/mine")
    hfcache.add_repo(hub, "org/there", CACHED)
    with hf_overlay.open_session([models]) as session:
        (session.hub_cache / "models--org--there").unlink()
        hfcache.add_repo(session.hub_cache, "org/there", {**CACHED, "more.json": b"{}"}, refs=["main"])
        hfcache.add_repo(session.hub_cache, "org/new", CACHED)
        litter(session.path)
    assert not session.path.exists()
    assert said(caplog) == []
    assert [path for path in hub.rglob("*") if layout.is_litter(path.name)] == []
    assert len(list((hub / "models--org--there/snapshots").iterdir())) == 2
    assert (hub / "models--org--new/refs/main").exists()


def test_a_session_that_was_killed_before_it_began_is_cleared_with_it(sessions: Path) -> None:
    folder = sessions / new_name()
    folder.mkdir(parents=True, mode=0o700)
    sessions.chmod(0o700)
    (folder / ".DS_Store").write_bytes(b"Bud1")
    assert [each.path for each in clear_dead(str(sessions))] == [str(folder)]
    assert not folder.exists()
