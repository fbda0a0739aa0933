"""Where the server takes models from: folders first, the Hugging Face cache next, the Hub last."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import fuse_disk
from tests.support.folders import weights
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model
from tests.support.processes import PYTHON, SECONDS, due, environment, eventually, finish
from tests.support.server import Server, serving

MINE, CACHED, HUBS = "From the folder.", "From the cache.", "From the Hub."


def files_of(folder: Path, says: str) -> dict[str, bytes]:
    """A model's files, for a cache or a Hub."""
    return {path.name: path.read_bytes() for path in make_model(folder, says).iterdir()}


def lay_cache(home: Path, made: Path) -> Path:
    """A real cache that holds `acme/both` and `acme/cached`."""
    hub = home / ".cache" / "huggingface" / "hub"
    for name in ("both", "cached"):
        add_repo(hub, f"acme/{name}", files_of(made / name, CACHED), tree=True)
    return hub


def lay_drive(drive: Path) -> Path:
    """A folder that holds `acme/both` and `acme/mine`."""
    for name in ("both", "mine"):
        make_model(drive / "acme" / name, MINE)
    return drive


@pytest.fixture
def cache(home: Path, tmp_path: Path) -> Path:
    return lay_cache(home, tmp_path / "made")


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    return lay_drive(tmp_path / "drive")


class Shared(NamedTuple):
    """A server that tests share, which add models of their own to its folder, to its Hub, or to its tier."""

    server: Server
    drive: Path
    cache: Path
    hub: LoopbackHub
    tier: Path
    mapped: Path
    """The folder of `acme/mapped`."""


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """With the cache and the folder above, and no network."""
    top = tmp_path_factory.mktemp("offline")
    drive, cache = lay_drive(top / "drive"), lay_cache(top / "home", top / "made")
    with LoopbackHub() as hub, serving(top / "home", drive, options=["--log-level", "debug"]) as server:
        yield Shared(server, drive, cache, hub, top / "no tier", top / "no map")
        assert not hub.requests


@pytest.fixture(scope="module")
def _online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    top = tmp_path_factory.mktemp("online")
    drive, tier = lay_drive(top / "drive"), top / "shared/hub"
    tier.mkdir(parents=True)
    mapped = make_model(top / "elsewhere/experiment 3", "From the mapped folder.")
    options = ["--below", str(tier), "--map", f"acme/mapped={mapped}", "--trust-remote-code"]
    with LoopbackHub() as hub:
        environ = hub.environment(top / "home") | {"HF_HUB_OFFLINE": "0"}
        with serving(top / "home", drive, options=options, environ=environ) as server:
            yield Shared(server, drive, top / "home/.cache/huggingface/hub", hub, tier, mapped)


@pytest.fixture
def online(_online: Shared) -> Shared:
    """With the folder above, a cache and a tier that are empty, and a Hub, which nobody has asked for anything yet."""
    _online.hub.heal()
    _online.hub.reset_counts()
    return _online


def said(server: Server, model: str) -> str:
    return server.chat_answer(model, "Where are you?", stream=False).content


def ids(server: Server) -> list[str]:
    return [model.id for model in server.openai.models.list()]


def refused(server: Server, model: str) -> tuple[int, dict[str, str]]:
    """Status and error of a chat that does not come about."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    response = server.http.post("/v1/chat/completions", json=body)
    return response.status_code, response.json()["error"]


def test_without_a_model_path_the_cache_alone_answers(home: Path, cache: Path) -> None:
    with serving(home) as server:
        assert ids(server) == ["acme/both", "acme/cached"]
        assert said(server, "acme/cached") == CACHED
    assert "using HuggingFace cache only" in server.log()


def test_folders_stand_before_the_cache_and_nothing_is_written_to_either(offline: Shared) -> None:
    server, drive, cache = offline.server, offline.drive, offline.cache
    before = listing(drive), listing(cache)
    ours = [id_ for id_ in ids(server) if id_ in ("acme/both", "acme/cached", "acme/mine")]
    assert ours == ["acme/both", "acme/cached", "acme/mine"], "one entry an id, sorted by id"
    assert [said(server, f"acme/{name}") for name in ("both", "mine", "cached")] == [MINE, MINE, CACHED]
    assert (listing(drive), listing(cache)) == before, "P1: the user's bytes changed"
    log = server.log()
    assert f"acme/both comes from the model path {drive}: {drive}/acme/both" in log
    assert f"acme/cached: {drive}/acme/cached does not exist" in log, "a fallback is not logged"


def test_the_list_is_in_openais_format_and_tells_no_source(offline: Shared) -> None:
    listed = offline.server.http.get("/v1/models").json()
    assert listed.keys() == {"object", "data"}
    assert all(
        model.keys() == {"id", "object", "created", "owned_by", "kind", "context_length", "max_model_len"}
        for model in listed["data"]
    )
    owners = {(model["object"], model["owned_by"]) for model in listed["data"] if model["id"].startswith("acme/")}
    assert owners == {("model", "acme")}


def test_the_flag_wins_over_the_variable_and_a_missing_model_path_is_a_warning(
    home: Path, cache: Path, drive: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "other" / "acme" / "others", "From the variable.")
    variable = {"MLX_OMNI_MODEL_PATH": str(tmp_path / "other")}
    with serving(home, drive, tmp_path / "unplugged", environ=variable) as server:
        assert ids(server) == ["acme/both", "acme/cached", "acme/mine"]
        assert [said(server, f"acme/{name}") for name in ("mine", "cached")] == [MINE, CACHED]
    assert f"{tmp_path / 'unplugged'}" in server.log()


def test_a_model_path_that_is_a_file_is_a_usage_error(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = finish([PYTHON, "-m", "mlx_overlay_server", "--model-path", str(tmp_path / "file")], environment(home))
    assert (done.status, done.err) == (
        2,
        f"mlx-omni-server: error: model path {tmp_path}/file is a file; give the folder that holds your models\n",
    )


def test_a_port_that_is_taken_is_an_error_of_one_line(home: Path, offline: Shared) -> None:
    port = offline.server.url.rpartition(":")[2]
    done = finish([PYTHON, "-m", "mlx_overlay_server", "--port", port], environment(home))
    assert (done.status, done.err.splitlines()[-1]) == (
        1,
        f"mlx-omni-server: error: cannot listen on 127.0.0.1:{port}: Address already in use; try --port 0",
    )


def test_folders_that_are_no_models_are_left_out(offline: Shared) -> None:
    (offline.drive / "acme" / "empty").mkdir()
    made = make_model(offline.drive / "acme" / "no-config", MINE)
    assert "acme/no-config" in ids(offline.server)
    (made / "config.json").unlink()
    assert {"acme/empty", "acme/no-config"}.isdisjoint(ids(offline.server))
    assert refused(offline.server, "acme/no-config")[0] == 404


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything: run the tests as a user")
def test_an_unreadable_model_path_is_a_warning(home: Path, drive: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    make_model(closed / "model", MINE)
    closed.chmod(0)
    try:
        with serving(home, closed, drive) as server:
            assert "acme/mine" in ids(server)
        assert f"{closed}" in server.log()
    finally:
        closed.chmod(0o755)


def test_linked_flat_and_nested_folders_answer_to_their_ids(offline: Shared, tmp_path: Path) -> None:
    server, drive = offline.server, offline.drive
    elsewhere = make_model(tmp_path / "elsewhere", "Through a link.")
    (drive / "acme" / "linked").symlink_to(elsewhere)
    make_model(drive / "flat", "Flat.")
    make_model(drive / "a" / "b" / "c", "Nested.")
    for name, text in (("acme/linked", "Through a link."), ("flat", "Flat."), ("a/b/c", "Nested.")):
        assert said(server, name) == text
        assert server.openai.models.retrieve(name).id == name


@pytest.mark.parametrize("model", ["../drive/acme/mine", "/etc", "acme/../acme/mine", "a\\b", "."])
def test_an_id_cannot_lead_out_of_the_folders(offline: Shared, model: str) -> None:
    status, error = refused(offline.server, model)
    assert (status, error["param"]) == (400, "model")


def test_new_and_changed_models_are_there_at_the_next_list_and_load(offline: Shared) -> None:
    server, drive = offline.server, offline.drive
    assert said(server, "acme/mine") == MINE
    make_model(drive / "acme" / "new", "New.")
    assert "acme/new" in ids(server)
    assert said(server, "acme/new") == "New."


def test_an_unplugged_drive_is_named_and_works_again_when_it_is_back(offline: Shared) -> None:
    server, drive = offline.server, offline.drive
    away = drive.with_name("unplugged")
    for name in ("leaves", "twice"):
        make_model(drive / "acme" / name, MINE)
    add_repo(offline.cache, "acme/twice", files_of(drive.with_name("twice"), CACHED), tree=True)
    assert {"acme/leaves", "acme/twice"} <= set(ids(server))
    drive.rename(away)
    try:
        assert ids(server) == ["acme/both", "acme/cached", "acme/twice"]
        assert said(server, "acme/twice") == CACHED, "the cache has a copy"
        status, error = refused(server, "acme/leaves")
        assert (status, error["code"]) == (503, "model_away")
        assert str(drive) in error["message"], "the error does not name the drive"
    finally:
        away.rename(drive)
    assert said(server, "acme/leaves") == MINE


def test_what_is_nowhere_else_is_downloaded_once_into_the_real_cache(online: Shared, tmp_path: Path) -> None:
    server, hub = online.server, online.hub
    files = files_of(tmp_path / "made", HUBS)
    hub.add_repo("acme/hubs", files)
    hub.add_repo("acme/mine", files_of(tmp_path / "newer", "The Hub's newer one."))
    assert said(server, "acme/mine") == MINE
    assert not hub.requests, "P2: the Hub was asked about a model that a folder has"
    assert said(server, "acme/hubs") == HUBS
    assert refused(server, "acme/nowhere")[1]["code"] == "model_not_found"
    assert refused(server, "no such id!")[0] in (400, 404)
    assert hub.bytes_served("acme/hubs") > 0
    (snapshot,) = (online.cache / repo_folder("acme/hubs") / "snapshots").iterdir()
    there = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    assert there == files, "P3: the download is not in the real cache"
    hub.reset_counts()
    assert server.http.post("/manage/v1/models/unload", json={"model": "acme/hubs"}).status_code == 200
    assert said(server, "acme/hubs") == HUBS
    assert not hub.requests, "it is downloaded once more"


def test_ids_that_the_hub_does_not_know_leave_nothing_in_the_real_cache(online: Shared) -> None:
    unknown = ("acme/nowhere", "gpt-4o", "a/b/c", "no such id!")
    for model in unknown:
        assert refused(online.server, model)[0] == 404
    there = {path.name for path in online.cache.glob("models--*")}
    assert not there & {repo_folder(model) for model in unknown}, "any client could fill the user's cache"


def test_a_gated_model_is_an_error_that_says_what_to_do(online: Shared, tmp_path: Path) -> None:
    online.hub.add_repo("acme/gated", files_of(tmp_path / "made", HUBS), gated=True)
    status, error = refused(online.server, "acme/gated")
    assert (status, error["code"]) == (403, "model_gated")
    assert "hf auth login" in error["message"]


def test_a_stream_tells_how_far_a_download_is(online: Shared, tmp_path: Path) -> None:
    online.hub.add_repo("acme/slow", files_of(tmp_path / "made", HUBS))
    online.hub.slow(60_000)  # it takes longer than a stream waits for its first event
    body = {"model": "acme/slow", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    text = online.server.http.post("/v1/chat/completions", json=body).text
    assert ": downloading acme/slow" in text.partition("data: ")[0], "nothing kept the client waiting"
    assert "data: [DONE]" in text


def test_a_failure_after_waiting_is_told_in_the_responses_own_events(online: Shared) -> None:
    online.hub.hang(60)
    body = {"model": "acme/nobody", "input": "hi", "stream": True}
    with online.server.http.stream("POST", "/v1/responses", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": ")  # the stream has begun: its status can no longer tell
        online.hub.heal()
        told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [(event["type"], event["sequence_number"]) for event in told] == [
        ("response.created", 0),
        ("response.in_progress", 1),
        ("response.failed", 2),
    ]
    assert told[-1]["response"]["status"] == "failed"
    assert "acme/nobody" in told[-1]["response"]["error"]["message"]


def test_a_hub_that_is_down_is_a_503_and_an_unknown_model_offline_a_404(online: Shared, offline: Shared) -> None:
    online.hub.fail(500)
    assert refused(online.server, "acme/any")[1]["code"] == "download_failed"
    assert refused(offline.server, "acme/any")[1]["code"] == "model_not_found"


def test_a_model_that_cannot_be_loaded_is_an_error_and_no_other_suffers(offline: Shared) -> None:
    broken = make_model(offline.drive / "acme" / "broken", MINE)
    (broken / "model.safetensors").write_bytes(weights(b"of another model"))
    status, error = refused(offline.server, "acme/broken")
    assert (status, error["code"]) == (503, "model_load_failed")
    assert said(offline.server, "acme/mine") == MINE


def test_an_incomplete_model_is_refused_with_the_reason_and_not_downloaded(online: Shared, tmp_path: Path) -> None:
    cut = make_model(online.drive / "acme/cut", MINE) / "model.safetensors"
    os.truncate(cut, cut.stat().st_size // 4)
    online.hub.add_repo("acme/cut", files_of(tmp_path / "made", HUBS))
    status, error = refused(online.server, "acme/cut")
    assert (status, error["code"]) == (503, "model_incomplete")
    assert "acme/cut is here, but cannot be loaded: model.safetensors holds " in error["message"]
    assert str(online.drive) not in error["message"], "a client is told of the server's folders"
    assert "acme/cut" not in ids(online.server)
    assert not online.hub.requests, "the Hub's answers for a folder that is half there"
    assert "--exclude acme/cut" in online.server.log(), "whoever runs the server is not told what to do"


def test_the_nearest_id_is_suggested(online: Shared, offline: Shared) -> None:
    for server in (online.server, offline.server):
        assert "did you mean acme/mine?" in refused(server, "acme/mime")[1]["message"]


def test_code_that_comes_with_a_model_is_run_by_a_flag_only(online: Shared, offline: Shared, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for drive in (offline.drive, online.drive):
        tricky = make_model(drive / "acme" / "tricky", MINE)
        config = (tricky / "config.json").read_text()
        (tricky / "config.json").write_text(config.replace("{", '{"model_file": "own.py",', 1))
        architecture = "from mlx_lm.models.llama import Model, ModelArgs"
        (tricky / "own.py").write_text(f"{architecture}\nopen({os.fspath(ran)!r}, 'w').close()\n")
    assert refused(offline.server, "acme/tricky")[0] == 404
    assert "acme/tricky" not in ids(offline.server)
    assert not ran.exists(), "a model's code was run"
    assert said(online.server, "acme/tricky") == MINE, "the other server has the flag"
    assert ran.exists()


@pytest.mark.slow
def test_a_disk_that_hangs_hides_its_own_models_and_signals_still_end_the_server(home: Path, tmp_path: Path) -> None:
    """P7: local models are listed and loaded, `/health` answers, and the disk's models are back by themselves."""
    if (reason := fuse_disk.why_not()) is not None:
        pytest.skip(reason)
    make_model(tmp_path / "behind" / "acme" / "slow", "From the network.")
    make_model(tmp_path / "local" / "acme" / "mine", MINE)
    with fuse_disk.mounted(tmp_path / "behind", tmp_path / "nas") as disk:  # noqa: SIM117 - in this order
        with serving(home, tmp_path / "nas", tmp_path / "local") as server:
            assert ids(server) == ["acme/mine", "acme/slow"]
            disk.hang()
            began = time.monotonic()
            assert ids(server) == ["acme/mine"]
            assert time.monotonic() - began < due(5), "the list waits for the disk"
            assert said(server, "acme/mine") == MINE, "a model that was not in memory"
            status, error = refused(server, "acme/slow")
            assert (status, error["code"]) == (503, "model_away")
            assert "does not answer" in error["message"]
            assert server.http.get("/health").status_code == 200
            disk.answer()
            eventually(lambda: "acme/slow" in ids(server), "the disk's models are listed again")
            assert said(server, "acme/slow") == "From the network."
            disk.hang()
            assert ids(server) == ["acme/mine"]
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(SECONDS)
            assert time.monotonic() - began < due(5), "the server waits for the disk"


def test_tiers_stand_behind_the_cache_and_a_mapped_folder_in_front_of_all(online: Shared, tmp_path: Path) -> None:
    """P1, P2, P11: a tier answers for what nothing before it has, and nothing is written there."""
    server, tier = online.server, online.tier
    for name in ("both", "older", "mapped", "tiers"):
        add_repo(tier, f"acme/{name}", files_of(tmp_path / "tier" / name, "From the tier."))
    for name in ("both", "older", "mapped"):
        add_repo(online.cache, f"acme/{name}", files_of(tmp_path / "cache" / name, CACHED), tree=True)
    make_model(online.drive / "acme/mapped", MINE)
    before = listing(tier), listing(online.mapped)
    expected = {"both": MINE, "mapped": "From the mapped folder.", "older": CACHED, "tiers": "From the tier."}
    assert [id_ for id_ in ids(server) if id_.partition("/")[2] in expected] == [f"acme/{name}" for name in expected]
    assert {name: said(server, f"acme/{name}") for name in expected} == expected
    assert not online.hub.requests
    assert (listing(tier), listing(online.mapped)) == before


def test_of_a_model_that_a_tier_holds_in_part_only_the_rest_is_downloaded(online: Shared, tmp_path: Path) -> None:
    """P2, P4: somebody has fetched a tokenizer only; the whole model is found where the overlay shows it."""
    files = files_of(tmp_path / "made", HUBS)
    some = {name: content for name, content in files.items() if name.startswith("tokenizer")}
    add_repo(online.tier, "acme/part", some, commit=online.hub.add_repo("acme/part", files))
    assert said(online.server, "acme/part") == HUBS
    fetched = {name for _, name in online.hub.finished_files()}
    assert fetched == files.keys() - some.keys()
    (snapshot,) = (online.cache / repo_folder("acme/part") / "snapshots").iterdir()
    assert {path.name for path in snapshot.iterdir()} == fetched
