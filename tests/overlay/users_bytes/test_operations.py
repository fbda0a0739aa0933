"""No operation of a client, done once, changes a byte of the user's (P1)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.overlay.users_bytes.world import (
    BELOW,
    CACHED,
    CUSTOM,
    OPERATIONS,
    Operation,
    World,
    commits,
    model_files,
)
from tests.support import hubs
from tests.support.folders import unseal
from tests.support.hfcache import repo_folder
from tests.support.hubs import HubProcess
from tests.support.loopback_hub import LoopbackHub
from tests.support.processes import PYTHON, finish


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_no_operation_touches_a_users_file_or_another_cached_model(
    world: World, client: HubProcess, operation: Operation
) -> None:
    """On every model, and neither do a refresh, the session's end and the next start after it."""
    with world.open() as session:
        for model_id in (*CUSTOM, *CACHED, *BELOW):
            operation(world, client, session.hub_cache, model_id)
            session.refresh()
            world.check()
    world.check_over()
    assert world.recover() == []
    world.check_over()


def test_no_two_repos_of_an_overlay_have_the_same_commit(world: World, client: HubProcess) -> None:
    """A client deletes by commit, whichever repo it meets first: asked for one model it would take another."""
    with world.open() as session:
        scanned: dict[str, list[str]] = client.ask("scan", hub=str(session.hub_cache)).value
    owners: dict[str, list[str]] = {}
    for repo_id, found in scanned.items():
        for commit in found:
            owners.setdefault(commit, []).append(repo_id)
    shared = sorted(repo_ids for repo_ids in owners.values() if len(repo_ids) > 1)
    assert not shared, f"P1 is broken: deleting one of these may delete the other: {shared}"


@pytest.mark.parametrize("is_root", [False, True], ids=["as a user", "as root"])
@pytest.mark.parametrize(
    "operation", ["hf cache prune", "hf cache rm COMMIT", "delete_revisions of one", "mlx_lm.manage --delete"]
)
def test_a_newer_revision_that_a_client_downloads_does_not_lead_deletions_to_the_users(
    world: World, client: HubProcess, operation: str, is_root: bool
) -> None:
    """With two revisions in a repo, releases up to 1.31 delete the files of one where all links end."""
    model_id = "acme/tiny"
    world.may_come.add(repo_folder(model_id))
    with LoopbackHub() as newer, world.open() as session:
        newer.add_repo(model_id, model_files("the Hub's own"))
        hub = session.hub_cache
        (mine,) = commits(hub, model_id)
        environment = (
            session.environment
            | newer.environment(Path(world.environ["HOME"]))
            | {
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
                **hubs.environment(client.release),
            }
        )
        if is_root:
            unseal((hub / repo_folder(model_id)).resolve())
        download = (
            "import huggingface_hub; from tests.support.permissions import respected\n"
            f"with respected(): huggingface_hub.snapshot_download({model_id!r})"
        )
        done = finish([PYTHON, "-c", download], environment, cwd=Path(__file__).parents[3])
        if is_root:
            assert done.status == 0, done
            assert len(commits(hub, model_id)) == 2
        else:
            assert "Permission denied" in done.err, "a second revision beside a user's model was not refused"
            assert commits(hub, model_id) == [mine]
        OPERATIONS[operation](world, client, hub, model_id)
        world.check()
    world.check()
