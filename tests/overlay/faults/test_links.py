"""Links that lead nowhere, in circles or away hide themselves alone (P7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import hf_overlay
import pytest
from hf_overlay.config import Kind

from tests.overlay.faults.seen import WEIGHTS, ids, loaded, moment, said, scanned
from tests.support.folders import lay_model


@pytest.mark.mlx_lm
def test_dangling_links_hide_themselves_alone(models: Path, sessions: Path) -> None:
    lay_model(models / "org/mine")
    (models / "org/mine/notes.txt").symlink_to("/nonexistent/notes.txt")
    (models / "org/mine/folder").symlink_to("/nonexistent/folder")
    (models / "org/gone").symlink_to("/nonexistent/gone")
    (models / "gone").symlink_to("/nonexistent/gone")
    for name, reason in {"config.json": "no config.json", WEIGHTS: "broken link"}.items():
        folder = lay_model(models / "org" / f"without-{name}")
        (folder / name).unlink()
        (folder / name).symlink_to(f"/nonexistent/{name}")
        with hf_overlay.open_session([models]) as session:
            assert ids(session) == scanned(session) == ["org/mine"]
            with pytest.raises(hf_overlay.ModelNotFound, match=reason):
                session.resolve(f"org/without-{name}")


def test_a_model_path_that_is_a_dangling_link_is_a_drive_that_is_not_there(
    models: Path, tmp_path: Path, sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = tmp_path / "link"
    link.symlink_to(models / "later")
    with hf_overlay.open_session([link]) as session:
        assert [str(link) in warning for warning in said(caplog)] == [True]
        lay_model(models / "later/org/mine")
        session.refresh()
        assert session.resolve("org/mine") == link / "org/mine"


def self_loop(models: Path) -> None:
    (models / "loop").symlink_to("loop")
    (models / "org/mine/loop").symlink_to("loop")
    (models / "org/mine/loop.json").symlink_to("loop.json")


def mutual_loop(models: Path) -> None:
    (models / "one").symlink_to("two")
    (models / "two").symlink_to("one")


def link_to_parents(models: Path) -> None:
    (models / "group/deep").mkdir(parents=True)
    (models / "group/deep/up").symlink_to("..")
    (models / "group/top").symlink_to(models)
    (models / "org/mine/up").symlink_to("..")
    (models / "org/mine/top").symlink_to(models)
    (models / "here").symlink_to(".")


def dense_graph(models: Path) -> None:
    names = [f"folder-{number}" for number in range(20)]
    for name in names:
        (models / "graph" / name).mkdir(parents=True)
        (models / "org/mine/graph" / name).mkdir(parents=True)
    for name in names:
        for other in names:
            (models / "graph" / name / f"to-{other}").symlink_to(f"../{other}")
            (models / "org/mine/graph" / name / f"to-{other}").symlink_to(f"../{other}")


def links_between_chains(models: Path) -> None:
    """Each folder holds two links to the next: 2**20 ways to the last one."""
    for number in range(20):
        folder = models / "chain" / str(number)
        folder.mkdir(parents=True)
        for side in ("left", "right"):
            (folder / side).symlink_to(f"../{number + 1}")


@pytest.mark.mlx_lm
@pytest.mark.parametrize(
    "lay", [self_loop, mutual_loop, link_to_parents, dense_graph, links_between_chains], ids=lambda lay: lay.__name__
)
def test_link_loops_end_and_hide_no_model(models: Path, sessions: Path, lay: Callable[[Path], None]) -> None:
    lay_model(models / "org/mine")
    lay_model(models / "zoo/last")
    lay(models)
    for kind in get_args(Kind):
        with hf_overlay.open_session([models], kind=kind) as session:
            session.refresh()
            assert ids(session) == scanned(session) == ["org/mine", "zoo/last"]
            assert loaded(session, "org/mine") == (models / "org/mine" / WEIGHTS).read_bytes()


def test_a_link_in_a_model_to_what_holds_it_is_not_followed(models: Path, sessions: Path) -> None:
    """Else the whole disk would be files of that model."""

    def fail() -> None:
        raise AssertionError("the top of the disk is listed as a part of a model")

    lay_model(models / "org/mine")
    for name, target in {"parent": "..", "drive": os.fspath(models.parent), "disk": models.anchor}.items():
        link = models / "org/mine" / name
        link.symlink_to(target)
        with moment(("scandir",), link, 1, fail), hf_overlay.open_session([models]) as session:
            assert ids(session) == scanned(session) == ["org/mine"]
