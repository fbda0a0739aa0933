"""Programs that know only the Hugging Face cache, unmodified and offline, through `hf-overlay run`.

One world for all of them. In it a model is in the user's folder, in the real cache, in both (and the two say
different things) or in neither; whatever a program reads, its answer tells which of the two it was given.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes
from tests.support.hfcache import Entry, add_repo, listing, repo_folder
from tests.support.models import make_model, split, vocabulary
from tests.support.processes import OVERLAY, PYTHON, eventually, finish, start, succeed

pytestmark = pytest.mark.mlx_lm  # the programs are mlx-lm's own, and one that loads with it
FROM_FOLDER = {
    "acme/folder": "the folder is all there is.",
    "acme/both": "the folder speaks first, as it should.",
    "flat": "a flat folder speaks.",
    "acme/linked": "a folder behind a link speaks up.",
    "acme/of-links": "every file here is a link.",
    "acme/second": "a cache on another drive speaks, not the one at home.",
}
FROM_CACHE = {
    "acme/cache": "the cache is all.",
    "acme/other": "other.",
}
SPEAKING = FROM_FOLDER | FROM_CACHE
NESTED, NESTED_SAYS = "org/sub/name", "far down speaks too."
HIDDEN_SAYS = "the cache must not speak."
NEITHER = "acme/neither"
OTHER_REPOS = {("dataset", "acme/data"), ("space", "acme/app")}
EVERYTHING = {("model", model_id) for model_id in (*SPEAKING, NESTED)} | OTHER_REPOS


@dataclass(frozen=True)
class World:
    """A person's drives and home, and the environment of their shell."""

    top: Path
    models: Path
    second: Path
    hub: Path
    environ: Mapping[str, str]

    def everything(self) -> tuple[dict[str, Entry], ...]:
        """All that is the user's, as it is now."""
        return tuple(listing(path) for path in (self.top / "drive", self.second, self.hub))

    def overlaid(self, *command: str) -> list[str]:
        paths = ("--model-path", str(self.models), "--model-path", str(self.second))
        return [OVERLAY, "run", "--quiet", *paths, "--", *command]

    def folder(self, model_id: str) -> Path:
        """Where the files are that the id should stand for."""
        if model_id in FROM_CACHE:
            return self.hub / repo_folder(model_id)
        elsewhere = {
            "acme/linked": self.top / "drive" / "elsewhere",
            "acme/of-links": self.top / "drive" / "files",
            "acme/second": self.second / repo_folder("acme/second"),
        }
        return elsewhere.get(model_id, self.models / model_id)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Folders and caches, made once; at the end no session is left."""
    top = tmp_path_factory.mktemp("world")
    home, models, second = top / "home", top / "drive" / "models", top / "second" / "hub"
    hub = home / ".cache" / "huggingface" / "hub"
    for model_id in ("acme/folder", "acme/both", "flat"):
        make_model(models / model_id, FROM_FOLDER[model_id], shards=2)
    make_model(models / NESTED, NESTED_SAYS)
    make_model(top / "drive" / "elsewhere", FROM_FOLDER["acme/linked"], shards=2)
    (models / "acme/linked").symlink_to("../../elsewhere")
    make_model(top / "drive" / "files", FROM_FOLDER["acme/of-links"], shards=2)
    (models / "acme/of-links").mkdir()
    for file in (top / "drive" / "files").iterdir():
        (models / "acme/of-links" / file.name).symlink_to(file)
    for model_id, says in FROM_CACHE.items():
        add_repo(hub, model_id, make_model(top / "made" / model_id, says, shards=2), tree=True, locks=True)
    add_repo(second, "acme/second", make_model(top / "made/second", FROM_FOLDER["acme/second"], shards=2))
    # what other sources stand in front of
    hidden = make_model(top / "made" / "hidden", HIDDEN_SAYS, shards=2)
    add_repo(second, "acme/both", hidden)
    add_repo(hub, "acme/both", hidden, tree=True)
    add_repo(hub, "acme/second", hidden, tree=True)
    add_repo(hub, "acme/data", {"train.csv": b"a,b\n"}, repo_type="dataset")
    add_repo(hub, "acme/app", {"app.py": b"pass\n"}, repo_type="space")
    environ = processes.environment(home, HF_OVERLAY_DIR=str(top / "sessions"))
    yield World(top, models, second, hub, environ)
    assert not list((top / "sessions").glob("session-*")), "a session outlived its program"


@pytest.fixture(scope="module")
def before(world: World) -> tuple[dict[str, Entry], ...]:
    """All that is the user's, before the first program ran."""
    return world.everything()


READERS = """
import json, os, sys
from huggingface_hub import scan_cache_dir, snapshot_download
from mlx_lm import generate, load
from transformers import AutoConfig, AutoTokenizer

def mlx_lm(name):
    return generate(*load(name), prompt="hi", max_tokens=50)

def download(name):
    snapshot = snapshot_download(name)
    return {file: os.path.realpath(os.path.join(snapshot, file)) for file in sorted(os.listdir(snapshot))}

def tokenizer(name):
    tokens = AutoTokenizer.from_pretrained(name)
    return tokens.decode(range(FIRST_STEP, len(tokens)))

def config(name):
    return AutoConfig.from_pretrained(name).vocab_size

def scan():
    info = scan_cache_dir()
    repos = [
        [repo.repo_type, repo.repo_id, repo.size_on_disk, sorted(repo.refs),
         [os.path.realpath(file.file_path) for revision in repo.revisions for file in revision.files]]
        for repo in info.repos
    ]
    return {"repos": repos, "warnings": [str(warning) for warning in info.warnings]}

def answer(reader, name):
    try:
        return {"answer": reader(name)}
    except Exception as error:
        return {"error": [type(error).__name__, str(error)]}

readers = (mlx_lm, download, tokenizer, config)
answers = {name: {reader.__name__: answer(reader, name) for reader in readers} for name in sys.argv[1:]}
print(json.dumps({"answers": answers, "scan": scan()}))
""".replace("FIRST_STEP", str(len(vocabulary([]))))


def read(*command: str, environ: Mapping[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(succeed(command, environ).out)
    return said


@pytest.fixture(scope="module")
def overlaid(world: World, before: tuple[dict[str, Entry], ...]) -> dict[str, Any]:
    """What the readers say through the overlay."""
    command = world.overlaid(PYTHON, "-c", READERS, *SPEAKING, NEITHER)
    return read(*command, environ=world.environ)


@pytest.fixture(scope="module")
def plain(world: World) -> dict[str, Any]:
    """What the same readers say of the real cache alone."""
    return read(PYTHON, "-c", READERS, *FROM_CACHE, "acme/both", NEITHER, environ=world.environ)


def test_the_plain_cache_alone_gives_other_answers(plain: dict[str, Any]) -> None:
    """Without this the tests below would prove nothing."""
    assert plain["answers"]["acme/both"]["mlx_lm"] == {"answer": HIDDEN_SAYS}
    assert ("model", "acme/folder") not in {(repo[0], repo[1]) for repo in plain["scan"]["repos"]}


# Libraries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_id", SPEAKING)
def test_mlx_lm_generates_with_the_right_model(overlaid: dict[str, Any], model_id: str) -> None:
    """P2: the user's folder answers where there is one, the cache's own model elsewhere."""
    assert overlaid["answers"][model_id]["mlx_lm"] == {"answer": SPEAKING[model_id]}


@pytest.mark.parametrize("model_id", SPEAKING)
def test_snapshot_download_gives_the_right_files(world: World, overlaid: dict[str, Any], model_id: str) -> None:
    """P2: every file of the snapshot is one of the user's folder where there is one, of the cache elsewhere."""
    files = overlaid["answers"][model_id]["download"]["answer"]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < files.keys()
    strays = [file for file in files.values() if not Path(file).is_relative_to(world.folder(model_id))]
    assert not strays, f"snapshot_download({model_id!r}) leads elsewhere: {strays}"


@pytest.mark.parametrize("model_id", SPEAKING)
def test_transformers_reads_the_right_tokenizer_and_config(overlaid: dict[str, Any], model_id: str) -> None:
    """P2, for AutoTokenizer and AutoConfig, which ask for one file at a time."""
    says = SPEAKING[model_id]
    assert overlaid["answers"][model_id]["tokenizer"] == {"answer": says}
    assert overlaid["answers"][model_id]["config"] == {"answer": len(vocabulary(split(says)))}


@pytest.mark.parametrize("model_id", FROM_CACHE)
def test_a_model_of_the_cache_alone_reads_as_without_overlay(
    overlaid: dict[str, Any], plain: dict[str, Any], model_id: str
) -> None:
    """The cache's own models stay what they are."""
    assert overlaid["answers"][model_id] == plain["answers"][model_id]


@pytest.mark.parametrize("reader", ["mlx_lm", "download", "tokenizer", "config"])
def test_a_model_that_is_nowhere_fails_as_without_overlay(
    overlaid: dict[str, Any], plain: dict[str, Any], reader: str
) -> None:
    """P12: the client's own error, word for word; nothing about the overlay's folders in it."""
    error = plain["answers"][NEITHER][reader]
    assert error.keys() == {"error"}, f"a client found {NEITHER}"
    assert overlaid["answers"][NEITHER][reader] == error


def test_scan_cache_dir_lists_the_folders_and_the_whole_cache(world: World, overlaid: dict[str, Any]) -> None:
    """P8: each id once, datasets and spaces too, no warning; sizes and files are the winner's."""
    scan = overlaid["scan"]
    assert sorted((kind, repo_id) for kind, repo_id, *_ in scan["repos"]) == sorted(EVERYTHING)
    assert scan["warnings"] == []
    for kind, repo_id, size, refs, files in scan["repos"]:
        assert refs == ["main"], f"{repo_id} cannot be loaded by name"
        if kind == "model":
            strays = [file for file in files if not Path(file).is_relative_to(world.folder(repo_id))]
            assert not strays, f"{repo_id} leads elsewhere: {strays}"
            assert size == sum(os.path.getsize(file) for file in files), f"the size of {repo_id} is not its files'"


# Commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_id", ["acme/folder", "acme/cache", "acme/both", "flat"])
def test_the_generate_command_speaks_with_the_right_model(world: World, model_id: str) -> None:
    """P2, for `python -m mlx_lm generate`."""
    assert succeed(world.overlaid(*generate(model_id)), world.environ).out == SPEAKING[model_id] + "\n"


def test_the_generate_command_fails_as_without_overlay(world: World) -> None:
    """P12: the same last line, the same exit status."""
    alone = finish(generate(NEITHER), world.environ)
    overlaid = finish(world.overlaid(*generate(NEITHER)), world.environ)
    assert alone.status != 0
    assert (overlaid.status, overlaid.out) == (alone.status, alone.out)
    assert overlaid.err.splitlines()[-1] == alone.err.splitlines()[-1]


def test_a_nested_id_is_generated_from_by_its_path(world: World) -> None:
    """`mlx_lm.generate --model "$(hf-overlay path org/sub/name)"`, as the help says."""
    command = f'mlx_lm.generate --model "$(hf-overlay path {NESTED})" --prompt hi --verbose False'
    environ = {**world.environ, "MLX_OMNI_MODEL_PATH": str(world.models)}
    assert succeed(["sh", "-c", command], environ).out == NESTED_SAYS + "\n"


def generate(model_id: str) -> list[str]:
    return [PYTHON, "-m", "mlx_lm", "generate", "--model", model_id, "--prompt", "hi", "--verbose", "False"]


def test_the_manage_command_lists_what_the_overlay_shows(world: World) -> None:
    """`python -m mlx_lm manage --scan` shows every model, dataset and space once."""
    done = succeed(world.overlaid(PYTHON, "-m", "mlx_lm", "manage", "--scan", "--pattern", ""), world.environ)
    _, header, _, *rows = done.lines()
    assert header.startswith("REPO ID")
    assert sorted((row.split()[1], row.split()[0]) for row in rows) == sorted(EVERYTHING)


def test_hf_cache_ls_lists_what_the_overlay_shows(world: World) -> None:
    """`hf cache ls` shows every model, dataset and space once."""
    done = succeed(world.overlaid("hf", "cache", "ls", "--format", "json"), world.environ)
    assert sorted((row["repo_type"], row["repo_id"]) for row in json.loads(done.out)) == sorted(EVERYTHING)


@pytest.mark.usefixtures("overlaid", "served")
def test_reading_changes_nothing(world: World, before: tuple[dict[str, Entry], ...]) -> None:
    """P1, P4: all of these loads left the folders, the other drive's cache and the real cache as they were."""
    assert world.everything() == before


# The server ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    models: set[str]
    answers: Mapping[str, tuple[int, str]]
    ended_with: int


@pytest.fixture(scope="module")
def served(world: World, before: tuple[dict[str, Entry], ...]) -> Served:
    """What one `python -m mlx_lm server` answers, from its start to its end."""
    with server(world) as (process, url):
        status, body = request(f"{url}/v1/models")
        assert status == 200
        models = {model["id"] for model in body["data"]}
        answers = {model_id: chat(url, model_id) for model_id in ("acme/folder", "acme/cache", "acme/both", NEITHER)}
        process.send_signal(signal.SIGTERM)
        return Served(models, answers, process.wait(processes.SECONDS))


@pytest.mark.parametrize("model_id", ["acme/folder", "acme/cache", "acme/both"])
def test_the_server_answers_with_the_right_model(served: Served, model_id: str) -> None:
    """P2, for `python -m mlx_lm server`."""
    assert served.answers[model_id] == (200, SPEAKING[model_id])


def test_the_server_refuses_a_model_that_is_nowhere_as_without_overlay(served: Served, plain: dict[str, Any]) -> None:
    """P12: mlx_lm.server's 404 carries the error its own load raises."""
    _, message = plain["answers"][NEITHER]["mlx_lm"]["error"]
    assert served.answers[NEITHER] == (404, message)


def test_the_server_lists_the_folders_and_the_cache(served: Served) -> None:
    """GET /v1/models; mlx_lm.server lists only models with an index of their shards."""
    assert served.models == set(SPEAKING)


def test_the_server_ends_when_hf_overlay_is_told_to(served: Served) -> None:
    """SIGTERM is passed on, and the status says that it ended the server."""
    assert served.ended_with == 128 + signal.SIGTERM


@contextmanager
def server(world: World) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that is up, on a free port; on another one if somebody takes that before the server does."""
    for _ in range(3):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = world.overlaid(PYTHON, "-m", "mlx_lm", "server", "--port", str(port))
        with (world.top / "server.log").open("w+b") as log:
            with start(command, world.environ, stdout=log, stderr=log) as process:
                wait_until_up(process, url)
                if process.poll() is None:
                    yield process, url
                    return
            log.seek(0)
            said = log.read().decode()
            assert "address already in use" in said.lower(), said
    pytest.fail("no port stayed free")


def wait_until_up(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until it answers, or has ended."""

    def is_settled() -> bool:
        if process.poll() is not None:
            return True
        try:
            return request(f"{url}/health")[0] == 200
        except OSError:
            return False

    eventually(is_settled, "the server is up")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def chat(url: str, model_id: str) -> tuple[int, str]:
    """Status, and the answer or the error."""
    asked = {"model": model_id, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}
    status, body = request(f"{url}/v1/chat/completions", json.dumps(asked).encode())
    return status, body["choices"][0]["message"]["content"] if status == 200 else body["error"]


def request(url: str, body: bytes | None = None) -> tuple[int, Any]:
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json"}
    try:
        with straight.open(urllib.request.Request(url, body, headers), timeout=processes.SECONDS) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
