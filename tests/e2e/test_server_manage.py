"""The API behind the page: what it says of models, memory and requests, and what it does when told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from mlx_overlay_server.api.manage import routes
from mlx_overlay_server.api.refusals import add_error_handlers

from tests.support.folders import lay_model
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model
from tests.support.processes import SECONDS, eventually
from tests.support.server import Server, serving

PLAIN, OTHER, LONG, AWAY = "acme/plain", "acme/other", "acme/long", "acme/away"
SAYS = "One two three."


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    made = make_model(tmp_path_factory.mktemp("hub") / "made", SAYS)
    with LoopbackHub() as hub:
        hub.add_repo("acme/hubs", {path.name: path.read_bytes() for path in made.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, which may go away."""
    make_model((path := tmp_path_factory.mktemp("drive") / "models") / AWAY, SAYS)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hub: LoopbackHub, drive: Path) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("manage")
    for name in (PLAIN, OTHER):
        make_model(top / "models" / name, SAYS)
    make_model(top / "models" / LONG, "word " * 4000)
    lay_model(top / "models/acme/broken", {"model.safetensors": b""})
    environ = hub.environment(top / "home") | {"HF_HUB_OFFLINE": "0"}
    file = top / "home/.config/hf-overlay/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'[server.profile.fast]\nmodel = "{PLAIN}"\ndraft_model = "{OTHER}"\n')
    with serving(
        top / "home", top / "models", drive, options=["--alias", f"claude={PLAIN}"], environ=environ
    ) as server:
        yield server


def get(server: Server, path: str) -> Any:
    answer = server.http.get(f"/manage/v1/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def post(server: Server, path: str, **body: Any) -> Any:
    answer = server.http.post(f"/manage/v1/{path}", json=body)
    return answer.json() if answer.status_code == 200 else (answer.status_code, answer.json()["error"]["code"])


def entry(server: Server, model: str) -> Any:
    (found,) = [each for each in get(server, "models")["models"] if each["id"] == model]
    return found


def resident(server: Server) -> list[str]:
    return [each["id"] for each in get(server, "status")["models"] if each["state"] == "resident"]


def unload_all(server: Server) -> None:
    """Tests come in any order, and leave models in memory."""
    for model in resident(server):
        post(server, "models/unload", model=model)


def test_a_model_is_loaded_pinned_and_unloaded(server: Server) -> None:
    unload_all(server)
    assert entry(server, PLAIN)["state"] == "on disk"
    assert post(server, "models/load", model="claude", pin=True) == {"done": True}
    found = entry(server, PLAIN)
    assert (found["state"], found["pinned"]) == ("resident", True)
    assert "claude" in found["aliases"]
    assert found["source"]["kind"] == "custom"
    assert found["bytes"] > 0
    assert found["context_length"] == found["usable_context"]
    (held,) = get(server, "status")["models"]
    assert (held["id"], held["users"], held["note"]) == (PLAIN, 0, "")
    assert post(server, "models/pin", model=PLAIN, pinned=False) == {"done": True}
    assert not entry(server, PLAIN)["pinned"]
    assert post(server, "models/unload", model=PLAIN) == {"done": True}
    assert post(server, "models/unload", model=PLAIN) == {"done": True}
    assert resident(server) == []


def test_a_profile_with_weights_of_its_own_is_a_model_of_its_own(server: Server) -> None:
    unload_all(server)
    assert post(server, "models/load", model="fast") == {"done": True}
    found, plain = entry(server, "fast"), entry(server, PLAIN)
    assert (found["state"], plain["state"]) == ("resident", "on disk")
    assert found["source"] == plain["source"]
    assert post(server, "models/pin", model="fast", pinned=True) == {"done": True}
    assert entry(server, "fast")["pinned"]
    assert post(server, "models/unload", model="fast") == {"done": True}
    assert resident(server) == []


def test_memory_is_told_by_what_takes_it(server: Server) -> None:
    assert post(server, "models/load", model=OTHER) == {"done": True}
    server.chat(OTHER, "Hi")
    uses = {}

    def has_kept() -> bool:
        memory = get(server, "status")["memory"]
        uses.update({each["use"]: each for each in memory["uses"]})
        assert memory["usable"] > sum(each["limit"] for each in memory["uses"] if each["use"] != "disk")
        return bool(uses["kept"]["bytes"])

    eventually(has_kept, "the KV cache is kept")
    assert uses["weights"]["bytes"] == sum(each["bytes"] for each in get(server, "status")["models"])
    assert uses["running"]["bytes"] == 0
    assert 0 <= uses["disk"]["bytes"] <= uses["disk"]["limit"]


def test_folders_that_are_left_out_are_told_with_what_to_do(server: Server) -> None:
    (problem,) = [each for each in get(server, "problems")["problems"] if each["kind"] == "rejected"]
    assert problem["where"].endswith("acme/broken")
    assert problem["advice"]


def test_a_request_is_listed_without_its_text_and_can_be_stopped(server: Server) -> None:
    told: list[Any] = []

    def ask() -> None:
        body = {"model": LONG, "stream": True, "messages": [{"role": "user", "content": "sesame"}]}
        told.append(server.http.post("/v1/chat/completions", json=body, headers={"user-agent": "probe/1"}).text)

    asking = threading.Thread(target=ask)
    asking.start()
    running: list[Any] = []

    def generates() -> bool:
        running[:] = [each for each in get(server, "requests")["running"] if each["tokens_out"] > 5]
        return bool(running)

    eventually(generates, "the request generates")
    assert (running[0]["client"], running[0]["model"], running[0]["outcome"]) == ("probe/1", LONG, "running")
    assert post(server, "models/unload", model=LONG) == (409, "model_busy")
    assert post(server, f"requests/{running[0]['id']}/stop") == {"done": True}
    asking.join(SECONDS)
    last = json.loads(told[0].strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "request_stopped"
    answer = server.http.get("/manage/v1/requests")
    ended = answer.json()["ended"][0]
    assert (ended["id"], ended["outcome"], ended["reason"]) == (running[0]["id"], "stopped", "request_stopped")
    assert "sesame" not in answer.text
    assert "word" not in answer.text
    assert post(server, f"requests/{ended['id']}/stop") == (404, "request_not_found")


def test_a_busy_model_is_unloaded_by_force_and_its_client_is_told(server: Server) -> None:
    body = {"model": LONG, "messages": [{"role": "user", "content": "Hi"}]}
    told: list[Any] = []
    asking = threading.Thread(target=lambda: told.append(server.http.post("/v1/chat/completions", json=body)))
    asking.start()
    eventually(lambda: get(server, "requests")["running"], "the request is there")
    eventually(lambda: LONG in resident(server), "the model is loaded")
    assert post(server, "models/unload", model=LONG, force=True) == {"done": True}
    asking.join(SECONDS)
    assert told[0].status_code == 503
    assert "unloaded" in told[0].json()["error"]["message"]


def test_finished_requests_have_their_counts(server: Server) -> None:
    server.chat(PLAIN, "Hi")
    server.chat(PLAIN, "Hi")
    first = get(server, "requests")["ended"][0]
    assert (first["model"], first["outcome"], first["reason"], first["note"]) == (PLAIN, "answered", "stop", "")
    assert first["tokens_in"] > first["tokens_cached"] > 0
    assert first["tokens_out"] > 1
    assert 0 < first["first_token_seconds"] <= first["seconds"]
    assert first["tokens_per_second"] > 0
    assert first["client"].startswith("OpenAI/Python")
    assert get(server, "status")["activity"]["first_token_seconds"] > 0


@pytest.mark.parametrize(
    ("path", "body", "refused"),
    [
        ("models/load", {"model": "acme/none"}, (404, "model_not_found")),
        ("models/load", {}, (400, None)),
        ("models/load", {"model": PLAIN, "pinned": True}, (400, None)),
        ("models/pin", {"model": "acme/none", "pinned": True}, (404, "model_not_found")),
        ("downloads", {"model": PLAIN}, (409, "model_here")),
        ("downloads/cancel", {"model": "acme/none"}, (404, "download_not_found")),
    ],
)
def test_what_cannot_be_done_is_refused(path: str, body: Any, refused: Any, server: Server) -> None:
    assert post(server, path, **body) == refused


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_form_of_another_page_does_nothing(media_type: str, server: Server) -> None:
    server.chat(PLAIN, "Hi")
    body = json.dumps({"model": PLAIN, "force": True}).encode()
    headers = {"content-type": media_type}
    own = server.http.post("/manage/v1/models/unload", content=body, headers=headers)
    foreign = server.http.post(
        "/manage/v1/models/unload", content=body, headers=headers | {"origin": "https://evil.example"}
    )
    assert (own.status_code, foreign.status_code) == (400, 403)
    assert PLAIN in resident(server)


def test_a_drive_that_is_away_leaves_its_models_in_the_list(server: Server, drive: Path) -> None:
    assert entry(server, AWAY)["state"] == "on disk"
    gone = drive.rename(drive.parent / "gone")
    found = entry(server, AWAY)
    assert (found["state"], found["source"]["root"]) == ("away", str(drive))
    assert post(server, "models/load", model=AWAY) == (503, "model_away")
    assert post(server, "downloads", model=AWAY) == (503, "model_away")
    gone.rename(drive)
    assert entry(server, AWAY)["state"] == "on disk"


def events(server: Server, model: str) -> list[Any]:
    """The states of a download, watched to its end."""
    text = server.http.get("/manage/v1/downloads/events", params={"model": model}).text
    lines = [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_a_download_is_watched_cancelled_and_gone_on_with(server: Server, hub: LoopbackHub) -> None:
    hub.slow(20_000)
    assert post(server, "downloads", model="acme/hubs")["state"] == "waiting"

    def is_downloading() -> bool:
        (now,) = get(server, "downloads")["downloads"]
        return bool(now["state"] == "downloading" and now["done"])

    eventually(is_downloading, "bytes have come")
    assert post(server, "downloads/cancel", model="acme/hubs")["state"] == "cancelled"
    assert post(server, "downloads/cancel", model="acme/hubs") == (404, "download_not_found")
    assert [each["state"] for each in events(server, "acme/hubs")] == ["cancelled"]
    hub.heal()
    post(server, "downloads", model="acme/hubs")
    seen = events(server, "acme/hubs")
    assert (seen[-1]["state"], seen[-1]["done"]) == ("done", seen[-1]["total"]), seen
    assert entry(server, "acme/hubs")["source"]["kind"] == "cache"
    assert post(server, "downloads", model="acme/hubs") == (409, "model_here")
    post(server, "downloads", model="acme/nowhere")
    assert "no model acme/nowhere" in events(server, "acme/nowhere")[-1]["message"]
    assert [each["state"] for each in get(server, "status")["downloads"]] == ["done", "failed"]


def test_a_server_without_a_network_downloads_nothing() -> None:
    service: Any = SimpleNamespace(library=SimpleNamespace(known=_nowhere), recent=None, pool=None)
    app = FastAPI()
    app.include_router(routes.router(service, None))
    add_error_handlers(app)
    for path in ("downloads", "downloads/cancel"):
        answer = TestClient(app).post(f"/manage/v1/{path}", json={"model": "acme/hubs"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "offline")


async def _nowhere(_: str) -> None:
    pass
