"""No operation of a client, done once, changes a byte of the user's (P1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.overlay.users_bytes.world import (
    BELOW,
    CACHED,
    CUSTOM,
    OPERATIONS,
    REMOVALS,
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


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in REMOVALS])
def test_no_operation_touches_a_users_file_or_another_cached_model(
    world: World, client: HubProcess, operation: str
) -> None:
    operate_on_every_model(world, client, OPERATIONS[operation])


@pytest.mark.parametrize("operation", REMOVALS)
def test_no_removal_without_a_client_touches_a_users_file_or_another_cached_model(
    world: World, hub_processes: Callable[[str], HubProcess], operation: str
) -> None:
    operate_on_every_model(world, hub_processes(hubs.INSTALLED), OPERATIONS[operation])


def operate_on_every_model(world: World, client: HubProcess, operation: Operation) -> None:
    """No operation takes anything that it should not, and neither do a refresh, the end and the next start after it."""
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


MODEL_ID = "acme/tiny"
DELETIONS = ["hf cache prune", "hf cache rm COMMIT", "delete_revisions of one", "mlx_lm.manage --delete"]


@contextmanager
def hub_with_another_revision(world: World) -> Iterator[LoopbackHub]:
    world.may_come.add(repo_folder(MODEL_ID))
    with LoopbackHub() as newer:
        newer.add_repo(MODEL_ID, model_files("the Hub's own"))
        yield newer


def test_a_client_cannot_download_another_revision_into_a_users_model(
    world: World, client: HubProcess, online_processes: Callable[[str], HubProcess]
) -> None:
    with hub_with_another_revision(world) as newer, world.open() as session:
        hub = session.hub_cache
        mine = commits(hub, MODEL_ID)
        answer = online_processes(client.release).ask(
            "download", hub=str(hub), model_id=MODEL_ID, endpoint=newer.endpoint
        )
        assert "Permission denied" in (answer.error or ""), "a second revision beside a user's model was not refused"
        assert commits(hub, MODEL_ID) == mine
        for operation in DELETIONS:
            OPERATIONS[operation](world, client, hub, MODEL_ID)
            world.check()
    world.check()


@pytest.mark.parametrize("operation", DELETIONS)
def test_another_revision_that_root_downloads_does_not_lead_deletions_to_the_users(
    world: World, client: HubProcess, online_processes: Callable[[str], HubProcess], operation: str
) -> None:
    """With two revisions in a repo, releases up to 1.31 delete the files of one where all links end."""
    with hub_with_another_revision(world) as newer, world.open() as session:
        hub = session.hub_cache
        unseal((hub / repo_folder(MODEL_ID)).resolve())
        answer = online_processes(client.release).ask(
            "download", hub=str(hub), model_id=MODEL_ID, endpoint=newer.endpoint
        )
        assert answer.error is None
        assert len(commits(hub, MODEL_ID)) == 2
        OPERATIONS[operation](world, client, hub, MODEL_ID)
        world.check()
    world.check()
