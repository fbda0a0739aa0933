"""P3: a refresh drops what it made itself, and no folder that holds a byte which a client downloaded into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hf_overlay
import pytest

from tests.support.folders import lay_model
from tests.support.sessions import unannounced

_REPO = "models--org--name"


class Replaced:
    """A session in which the repo that stood for a user's model was replaced by another, long ago."""

    def __init__(self, models: Path, session: hf_overlay.Session) -> None:
        self.folder = models / "org/name"
        self.session = session
        self.repo = (session.hub_cache / _REPO).resolve()

    def change(self) -> None:
        """The user's folder changes: its repo in the tree is another one from now on."""
        (self.folder / f"added-{len(os.listdir(self.folder))}.txt").write_text("changes the revision")
        self.session.refresh()
        assert (self.session.hub_cache / _REPO).resolve() != self.repo

    def refresh_later(self) -> None:
        """An hour later, when no load is in the older trees any more."""
        for hub in (self.session.path / "hubs").iterdir():
            os.utime(hub, (1, 1))
        self.change()


@pytest.fixture
def replaced(models: Path, sessions: Path) -> Iterator[Replaced]:
    lay_model(models / "org/name")
    with hf_overlay.open_session([models], environ=unannounced()) as session:
        yield Replaced(models, session)


def _write(repo: Path, name: str, content: bytes) -> Path:
    path = repo / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _revision(repo: Path) -> str:
    """The folder that a revision's links are in, relative to the repo."""
    (snapshot,) = (repo / "snapshots").iterdir()
    return snapshot.resolve().relative_to(repo).as_posix()


@pytest.mark.parametrize("name", ["blobs/" + "e" * 40, "blobs/" + "e" * 40 + ".incomplete", "{revision}/copy.txt"])
def test_a_repo_with_a_download_in_it_is_not_pruned(name: str, replaced: Replaced, hub: Path) -> None:
    payload = _write(replaced.repo, name.format(revision=_revision(replaced.repo)), b"downloaded")
    replaced.change()
    replaced.refresh_later()
    replaced.refresh_later()
    assert payload.read_bytes() == b"downloaded", "P3 is broken: a download was pruned"
    payload.unlink()


@pytest.mark.parametrize("name", [None, "blobs/empty"])
def test_a_repo_without_one_is_pruned(name: str | None, replaced: Replaced) -> None:
    if name is not None:
        _write(replaced.repo, name, b"")
    replaced.change()
    assert replaced.repo.is_dir(), "a load may still be going on in it"
    replaced.refresh_later()
    replaced.refresh_later()
    assert not replaced.repo.exists()


def test_a_repo_that_a_client_made_itself_outlives_every_refresh(replaced: Replaced, hub: Path) -> None:
    payload = _write(replaced.session.hub_cache.resolve(), "models--org--new/blobs/" + "e" * 40, b"downloaded")
    replaced.change()
    replaced.refresh_later()
    replaced.refresh_later()
    assert payload.read_bytes() == b"downloaded", "P3 is broken: a download was pruned"
    assert (replaced.session.hub_cache / "models--org--new").resolve() == payload.parents[1], "it is not shown any more"
