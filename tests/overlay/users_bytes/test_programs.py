"""No program changes a byte of the user's, nor what clients write into the tree (P1, P3)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from hf_overlay.tree import shared

from tests.overlay.users_bytes.world import World, download, held, kill_owner
from tests.support import hubs
from tests.support.folders import lay_model
from tests.support.hfcache import listing, repo_folder
from tests.support.hubs import HubProcess
from tests.support.processes import PYTHON, finish

# With real programs ---------------------------------------------------------------------------------------------


RELEASES = ["1.31.0", hubs.INSTALLED]
"""One whose deletions follow links, and one whose do not; test_operations.py runs the same commands with each release.

0.36.2 has none of them, and the transformers that mlx-lm needs do not work with it.
"""


@pytest.mark.parametrize("release", RELEASES)
def test_hf_cache_rm_deletes_nothing_of_the_users(world: World, release: str) -> None:
    with world.open() as session:
        command = [PYTHON, "-m", "huggingface_hub.cli.hf", "cache", "rm", "model/acme/tiny", "model/org/second", "-y"]
        done = finish(command, session.environment | hubs.environment(release))
        is_refused = "symbolic link" in done.out + done.err
        assert is_refused == (release in hubs.FOLLOWING_LINKS), done
        assert (done.status != 0) == is_refused, done
        world.check()
    world.check_over()


@pytest.mark.parametrize("release", RELEASES)
def test_hf_cache_prune_deletes_nothing_of_the_users(world: World, release: str) -> None:
    with world.open() as session:
        world.ask(session.hub_cache, world.is_detached, incomplete=True)
        command = [PYTHON, "-m", "huggingface_hub.cli.hf", "cache", "prune", "-y"]
        done = finish(command, session.environment | hubs.environment(release))
        assert "About to delete" in done.out, done
        world.check()
    world.check_over()


@pytest.mark.mlx_lm
@pytest.mark.parametrize("release", RELEASES)
def test_mlx_lm_manage_deletes_nothing_of_the_users(world: World, release: str) -> None:
    with world.open() as session:
        world.ask(session.hub_cache, lambda repo_id, _: "c" in repo_id.split("/", 1)[1])
        command = [PYTHON, "-m", "mlx_lm", "manage", "--delete", "--pattern", "c"]
        done = finish(command, session.environment | hubs.environment(release), stdin=b"y\n")
        assert "Found the following models" in done.out, done
        assert "acme/tiny" in done.out, done
        world.check()
    world.check_over()


# What clients wrote into the tree -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_killed", [False, True], ids=["ended", "killed"])
@pytest.mark.parametrize("model_id", ["org/new", "acme/tiny", "org/front"])
def test_a_download_that_cannot_come_home_stays_and_is_reported_at_each_start(
    world: World,
    hub_processes: Callable[[str], HubProcess],
    model_id: str,
    is_killed: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A new model's, or one into a repo of the user's; once what was in its way is gone, the next start moves it."""
    caplog.set_level(logging.WARNING, "hf_overlay")
    payload = b"downloaded"
    with ExitStack() as stack:
        if is_killed:
            assert kill_owner(world, hub_processes(hubs.INSTALLED), kill_at=0, refreshes=0)
            (session,) = world.sessions.glob("session-*")
            hub = session / "home/hub"
        else:
            hub = stack.enter_context(world.open()).hub_cache
        download(world, hub, model_id, payload)
        where = os.path.realpath(hub / repo_folder(model_id))
        if os.path.basename(os.path.dirname(where)) == shared.FOLDER:  # it becomes the session's own
            where = str(hub.resolve().parents[1] / "repos" / f"{repo_folder(model_id)}.{where[-16:]}")
        world.hub.rename(world.hub.with_name("away"))
        world.hub.write_bytes(b"in the way")
    for _ in range(2):
        assert world.recover() == [where], "P3 is broken: a download is not reported"
        assert where in caplog.text, "P3 is broken: nobody is told where a download is"
        assert held(world, [payload]), "P3 is broken: clearing a session deleted a download"
        caplog.clear()
    world.hub.unlink()
    world.hub.with_name("away").rename(world.hub)
    world.cache["."] = listing(world.hf_home)["."]
    world.check()
    assert world.recover() == []
    found = world.hub / repo_folder(model_id) / "snapshots"
    assert payload in [path.read_bytes() for path in found.glob("*/model.safetensors")], (
        "P3 is broken: not brought home"
    )
    world.check_over()


def test_a_download_into_a_users_repo_outlives_that_its_drive_goes_and_comes_back(world: World) -> None:
    payload = b"downloaded"
    with world.open() as session:
        download(world, session.hub_cache, "acme/tiny", payload)
        away = world.drive.rename(world.users / "away")
        session.refresh()
        assert held(world, [payload]), "P3 is broken: a refresh deleted a download"
        away.rename(world.drive)
        world.changed_by_the_user()
        session.refresh()
        assert held(world, [payload]), "P3 is broken: a refresh deleted a download"
    assert held(world, [payload]), "P3 is broken: the session's end deleted a download"
    world.check_over()


def test_a_download_in_place_of_a_users_repo_outlives_that_the_users_folder_goes(world: World) -> None:
    """A client deletes a user's model and downloads it again; later the drive goes away."""
    payload = b"downloaded"
    with world.open() as session:
        os.unlink(session.hub_cache / repo_folder("acme/tiny"))  # as `hf cache rm` does from 1.32 on
        download(world, session.hub_cache, "acme/tiny", payload)
        lay_model(world.roots[0] / "acme/added")
        session.refresh()
        world.drive.rename(world.users / "away")
        world.changed_by_the_user()
        session.refresh()
        assert held(world, [payload]), "P3 is broken: a refresh deleted a download"
    assert held(world, [payload]), "P3 is broken: the session's end deleted a download"
    world.check_over()
