"""Commands on the cache online, and several overlays at the same time (P10)."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.online.people import FILES, MINE, NEW, ask, folder_of
from tests.support import hubs
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.online import Client, Person, cached, contents, incomplete
from tests.support.processes import PYTHON

# The command hf ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", hubs.ALL)
def test_hf_download_prints_where_the_folders_files_are(person: Person, tmp_path: Path, release: str) -> None:
    """Of each release: a user's model, and a dataset that a tier holds, of which the Hub sends nothing."""
    tier = tmp_path / "shared/hub"
    commit = person.hub.add_repo("org/rows", FILES, repo_type="dataset")
    add_repo(tier, "org/rows", FILES, repo_type="dataset", commit=commit)
    environ = [f"{name}={value}" for name, value in hubs.environment(release).items()]
    copy = 'to=$1; shift; cp -RL "$("$@" | tail -n 1 | sed "s/^ *path: *//")" "$to"'
    hf = ("env", *environ, PYTHON, "-c", "from huggingface_hub.cli.hf import main; main()", "download")
    options = ("--quiet", "--below", str(tier))
    for arguments, files in (([MINE], folder_of(person)), (["org/rows", "--repo-type", "dataset"], FILES)):
        here = tmp_path / arguments[0]
        here.parent.mkdir()
        person.succeed("sh", "-c", copy, "sh", str(here), *hf, *arguments, options=options)
        assert contents(here) == files
    assert person.asked_about(MINE) == []
    assert person.hub.bytes_served() == 0


# Commands on the cache ------------------------------------------------------------------------------------------


def test_hf_cache_ls_lists_the_folder_and_what_was_downloaded(person: Person) -> None:
    person.succeed("hf", "download", NEW)
    rows = json.loads(person.succeed("hf", "cache", "ls", "--format", "json").out)
    assert sorted(row["repo_id"] for row in rows) == [MINE, NEW]


@pytest.mark.parametrize("command", [("rm", f"model/{MINE}", "--yes"), ("prune", "--yes")])
def test_hf_cache_rm_and_prune_leave_the_folder_and_the_cache_as_they_are(
    person: Person, command: tuple[str, ...]
) -> None:
    """P1; the model is there again in the next session, and nothing is asked of the Hub."""
    with person.plain_client() as plain:
        plain.get("snapshot_download", NEW)
    before = listing(person.models), listing(person.cache)
    person.succeed("hf", "cache", *command)
    assert (listing(person.models), listing(person.cache)) == before
    with person.client() as client:
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person)
    assert person.asked_about(MINE) == []


def test_hf_cache_verify_checks_what_is_the_hubs(person: Person) -> None:
    """Inside a session as without one: all is well, then a file is damaged."""
    person.succeed("hf", "download", NEW)
    person.succeed("hf", "cache", "verify", NEW)
    blob = (person.cache / repo_folder(NEW) / "refs/main").read_text()
    damaged = person.cache / repo_folder(NEW) / "snapshots" / blob / "config.json"
    damaged.write_bytes(b"damaged")
    assert person.finish("hf", "cache", "verify", NEW).status != 0


def test_hf_cache_verify_raises_no_false_alarm_about_the_users_model(person: Person) -> None:
    """P12: the folder's files are what they are."""
    done = person.finish("hf", "cache", "verify", MINE)
    assert "verification failed" not in (done.out + done.err).lower()
    assert f"{person.models / MINE} was not made by hf download, so there are no checksums" in done.err
    assert "501" not in done.err
    assert "http" not in done.err, "a message, and not a request's address"
    assert person.asked_about(MINE) == []


# Together with others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
def test_two_sessions_and_a_plain_program_download_one_repo_at_once(person: Person, release: str) -> None:
    """P10: one copy in the real cache, and nobody fails."""
    files = {f"model-{number:05d}-of-00006.safetensors": os.urandom(300_000) for number in range(1, 7)}
    person.hub.add_repo("org/large", {"config.json": b"{}", **files})
    with ExitStack() as stack:
        sessions = [stack.enter_context(person.client(release=release)) for _ in range(2)]
        clients = [*sessions, stack.enter_context(person.plain_client(release=release))]
        person.hub.slow(1_000_000)
        with ThreadPoolExecutor(len(clients)) as threads:
            for found in threads.map(lambda client: client.get("snapshot_download", "org/large"), clients):
                assert contents(found) == {"config.json": b"{}", **files}
    assert cached(person.cache, "org/large") == {"config.json": b"{}", **files}
    assert incomplete(person.cache) == []
    blobs = list((person.cache / repo_folder("org/large") / "blobs").iterdir())
    assert len(blobs) == 1 + len(files)
    assert person.downloads("org/large") == dict.fromkeys(["config.json", *files], 1)


def test_many_requests_at_once_are_answered(speaking: Person, session: Client) -> None:
    """More than a client's pool holds, to the folder and to the Hub in turns."""
    endpoint = session.environ["HF_ENDPOINT"]
    paths = [f"/api/models/{repo_id}/revision/main" for repo_id in (MINE, NEW)] * 100
    with ThreadPoolExecutor(50) as threads:
        replies = list(threads.map(lambda path: ask(endpoint, path), paths))
    assert {reply.status for reply in replies} == {200}
    assert [json.loads(reply.body)["id"] for reply in replies] == [MINE, NEW] * 100
