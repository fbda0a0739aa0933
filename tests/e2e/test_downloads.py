"""P3 and P4 with the network up: what is downloaded through a session is in the real cache, as without one.

First the same calls are made directly and through the gateway, in orders that Hypothesis draws, and must leave the
same cache. Then downloads are killed with signal 9 at random moments, and nothing may be lost by that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import hf_overlay
import pytest
from huggingface_hub import snapshot_download
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import hubs
from tests.support.alone import Contents, check_stands_alone, contents
from tests.support.client import Clients, open_clients
from tests.support.folders import lay_model, temporary_folder, weights
from tests.support.hfcache import etag, repo_folder
from tests.support.loopback_hub import TOKEN, LoopbackHub
from tests.support.processes import OVERLAY, PYTHON, SECONDS, eventually, read_line, start, succeed

# The same as without -------------------------------------------------------------------------------------------

RELEASES = ("0.36.2", "1.33.0", hubs.INSTALLED)
MAIN = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(b"weights in LFS"),
    "nested/deep/notes.txt": b"notes",
    "empty": b"",
}
NEXT = MAIN | {"config.json": b'{"model_type": "qwen2"}', "added.json": b"{ }"}
REPOS = (
    ("org/model", "model"),
    ("flat", "model"),
    ("org/data", "dataset"),
    ("org/private", "model"),
    ("org/renamed", "model"),
    ("org/nowhere", "model"),
)
NAMES = ("config.json", "model.safetensors", "nested/deep/notes.txt", "added.json", "empty", "absent.json")
FIRST = "the first commit"
REVISIONS = (None, "main", "dev", FIRST, "nowhere")
CHANGING = frozenset({"connection", "host", "x-amzn-trace-id"})
"""Headers that are about one connection or one request."""

Step = dict[str, Any]


def calls(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    """Calls of one kind about any repo; an argument that is None is left out."""
    return st.fixed_dictionaries(
        {"call": st.just(name), "repo": st.sampled_from(REPOS), "arguments": st.fixed_dictionaries(arguments)}
    )


REVISION = st.sampled_from(REVISIONS)
FORCED = st.sampled_from([None, None, True])
PATTERNS = st.sampled_from([None, ["*.json"], ["nested/*"], ["none"]])
MOVED: Step = {"moved": "org/model"}
STEPS = st.one_of(
    calls("snapshot", revision=REVISION, allow_patterns=PATTERNS, force_download=FORCED),
    calls("file", filename=st.sampled_from(NAMES), revision=REVISION, force_download=FORCED),
    calls("info", revision=REVISION),
    calls("names", revision=REVISION),
    calls("exists", filename=st.sampled_from(NAMES)),
    st.just(MOVED),
    st.fixed_dictionaries({"removed": st.sampled_from(REPOS)}),
)
SNAPSHOT: Step = {"call": "snapshot", "repo": REPOS[0], "arguments": {}}


def file(name: str) -> Step:
    return {"call": "file", "repo": REPOS[0], "arguments": {"filename": name}}


class Side(NamedTuple):
    """A program and the real cache behind it."""

    call: Callable[..., Any]
    hf_home: Path


@pytest.fixture(scope="module", params=RELEASES)
def clients(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Clients, Clients]]:
    """Two programs with one release."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path_factory.mktemp("client"))}
    environ |= hubs.environment(request.param)
    with open_clients(environ) as one, open_clients(environ) as other:
        yield one, other


@contextmanager
def direct(clients: Clients, environ: Mapping[str, str]) -> Iterator[Side]:
    """A program without overlay."""
    with clients.start(environ) as call:
        yield Side(call, Path(environ["HOME"], ".cache/huggingface"))


@contextmanager
def overlaid(clients: Clients, environ: Mapping[str, str]) -> Iterator[Side]:
    """A program in a session with a gateway; the user has a model, of which nothing is asked."""
    home = Path(environ["HOME"])
    lay_model(home / "drive/mine/own", settled=True)
    with (
        hf_overlay.open_session([home / "drive"], gateway=True, environ=environ) as session,
        clients.start(session.environment) as call,
    ):
        yield Side(call, home / ".cache/huggingface")
    assert left_sessions(home) == []


def environment(hub: LoopbackHub, home: Path, **more: str) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    quiet = {"HF_HUB_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # The overlay that these tests import, wherever it lies, is also the one in processes they start.
    return hub.environment(home, **quiet, PYTHONPATH=str(Path(hf_overlay.__file__).parents[1]), **more)


def left_sessions(home: Path) -> list[str]:
    return sorted(path.name for path in home.glob(".cache/hf-overlay/sessions/session-*"))


def fill(hub: LoopbackHub) -> str:
    """The hub as it is at first; returns the first commit of org/model."""
    first = hub.add_repo("org/model", {**MAIN, "old.txt": b"gone later"})
    hub.add_repo("org/model", MAIN)
    hub.add_repo("org/model", {"config.json": b"{}", "dev.txt": b"development"}, branch="dev")
    hub.add_repo("flat", {"config.json": b'{"flat": true}', "model.safetensors": weights(b"flat weights")})
    hub.add_repo("org/data", {"train.csv": b"1,2\n", "config.json": b"{}"}, repo_type="dataset")
    hub.add_repo("org/private", MAIN, private=True)
    hub.rename("org/renamed", "org/model")
    return first


def asked_since(hub: LoopbackHub) -> Counter[str]:
    """What arrived at the hub since the last time, but for the headers that are never the same."""
    asked = Counter(
        json.dumps([each.method, each.host, each.path, each.query, each.body_sha256, said])
        for each in hub.requests
        for said in [sorted((name, value) for name, value in each.headers.items() if name not in CHANGING)]
    )
    hub.reset_counts()
    return asked


def take(step: Step, sides: Sequence[Side], hub: LoopbackHub, first: str) -> None:
    """One step on each side, one after the other."""
    if "moved" in step:
        hub.add_repo("org/model", NEXT)
        return
    if "removed" in step:
        for side in sides:
            shutil.rmtree(side.hf_home / "hub" / repo_folder(*step["removed"]), ignore_errors=True)
        return
    repo_id, repo_type = step["repo"]
    arguments = {key: value for key, value in step["arguments"].items() if value is not None}
    if arguments.get("revision") == FIRST:
        arguments["revision"] = first
    answers, asked = [], []
    for side in sides:
        answers.append(side.call(step["call"], repo_id=repo_id, repo_type=repo_type, **arguments))
        asked.append(asked_since(hub))
    assert answers[0] == answers[1], f"{step}: a program got another answer through the gateway"
    assert asked[0] == asked[1], f"{step}: the gateway passed on something else"


def holdings(hf_home: Path) -> Contents:
    """What a home holds; a cache with nothing in it (the user removed it all) is as good as none."""
    found = contents(hf_home)
    return found if found.keys() - {".", "hub"} else {}


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=1, max_size=6), is_logged_in=st.booleans())
@example(steps=[file("absent.json"), SNAPSHOT], is_logged_in=False)
@example(steps=[SNAPSHOT, MOVED, SNAPSHOT, file("added.json")], is_logged_in=True)
@example(steps=[SNAPSHOT, {"removed": REPOS[0]}, SNAPSHOT], is_logged_in=False)
def test_what_is_downloaded_through_the_gateway_is_in_the_real_cache_as_without_it(
    clients: tuple[Clients, Clients], steps: list[Step], is_logged_in: bool
) -> None:
    """P3 and P4: names, kinds, modes, bytes, refs, relative links, locks and what remembers absent files."""
    token = {"HF_TOKEN": TOKEN} if is_logged_in else {}
    with temporary_folder() as folder, LoopbackHub() as hub:
        first = fill(hub)
        one, other = (environment(hub, folder / name, **token) for name in ("direct", "overlaid"))
        with direct(clients[0], one) as plain, overlaid(clients[1], other) as through:
            for step in steps:
                take(step, (plain, through), hub, first)
        assert holdings(through.hf_home) == holdings(plain.hf_home), "P3 or P4 is broken: another cache than without"


# Killed ----------------------------------------------------------------------------------------------------------

FILES = 120
WORKERS = 8
"""Files that a client downloads at once."""
ROUNDS = 2
KILLS = 3
"""In each round, before the download is let through: 36 over all parameters."""
BYTES_PER_SECOND = 6000
"""For each file by itself, of 600 bytes: it comes in pieces, and a download takes seconds."""
# Says its pid, and then a dot whenever a file is where the program would open it.
DOWNLOAD = """
import os, sys
print(os.getpid(), flush=True)
from huggingface_hub import snapshot_download
from tqdm import tqdm

class Dots(tqdm):
    def update(self, n=1):
        if self.unit == "it":
            os.write(1, b"." * int(n))
        return super().update(n)

snapshot_download(sys.argv[1], tqdm_class=Dots, max_workers=int(sys.argv[2]))
"""
Victim = Literal["the session", "the client", "both"]


class Download(NamedTuple):
    """A repo of many files, a real cache, and a program in a session that downloads the one into the other."""

    hub: LoopbackHub
    repo_id: str
    files: Mapping[str, bytes]
    environ: Mapping[str, str]
    sees_gateway: bool

    @property
    def home(self) -> Path:
        return Path(self.environ["HOME"])

    @property
    def cache(self) -> Path:
        return self.home / ".cache/huggingface/hub"

    @property
    def command(self) -> list[str]:
        past = [] if self.sees_gateway else ["env", f"HF_ENDPOINT={self.hub.endpoint}"]
        return [OVERLAY, "run", "--quiet", "--", *past, PYTHON, "-c", DOWNLOAD, self.repo_id, str(WORKERS)]

    def whole(self, where: Path) -> set[str]:
        """Names of files whose bytes a client has published anywhere below a folder."""
        names = {etag(name, content): name for name, content in self.files.items()}
        blobs = (path for path in where.rglob("blobs/*") if path.name in names and not path.is_symlink())
        found = {path.name: path.read_bytes() for path in blobs}
        for blob, content in found.items():
            assert content == self.files[names[blob]], f"P3 is broken: {names[blob]} is there with other bytes"
        return {names[blob] for blob in found}

    def linked(self) -> set[str]:
        """Names of files that a program finds in the real cache's revision."""
        (snapshots,) = [*self.cache.glob(f"{repo_folder(self.repo_id)}/snapshots/*")] or [self.cache / "none"]
        return {path.relative_to(snapshots).as_posix() for path in snapshots.rglob("*") if path.is_file()}

    def served(self) -> set[str]:
        """Names of files of which bytes went out since the last time."""
        names = {each.name for each in self.hub.requests if each.sent and each.name is not None}
        self.hub.reset_counts()
        return names


@pytest.fixture
def downloads(tmp_path: Path) -> Iterator[Callable[[str, bool], Download]]:
    """Makes them, all from one hub into one cache."""
    with LoopbackHub() as hub:

        def make(repo_id: str, sees_gateway: bool) -> Download:
            files = {name: (f"{repo_id} {name} ".encode() * 40)[:600] for name in map(name_of, range(FILES))}
            hub.add_repo(repo_id, files)
            return Download(hub, repo_id, files, environment(hub, tmp_path / "home"), sees_gateway)

        yield make


def name_of(number: int) -> str:
    """A third in LFS, a third in a folder."""
    return (f"part-{number}.safetensors", f"notes/{number}.txt", f"{number}.json")[number % 3]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["the session", "the client", "both"])
@pytest.mark.parametrize("sees_gateway", [True, False], ids=["with the gateway", "past the gateway"])
def test_a_download_killed_at_any_moment_loses_nothing_and_goes_on(
    downloads: Callable[[str, bool], Download], victim: Victim, sees_gateway: bool
) -> None:
    """P3 and P4, for kill -9 of hf-overlay, which is also the gateway, of the program in it, and of both at once."""
    random = Random(f"{victim} {sees_gateway}")
    for number in range(ROUNDS):
        download = downloads(f"org/model-{number}", sees_gateway)
        download.hub.slow(BYTES_PER_SECOND)
        before: set[str] = set()
        for _ in range(KILLS):
            said = kill(download, victim, random)
            served = download.served()
            assert not served & before, "P3 is broken: what was downloaded is downloaded again"
            published = download.whole(download.home)
            start_again(download, random)
            assert download.whole(download.cache) >= published, "P3 is broken: a published file is lost"
            assert len(download.linked()) >= said.count("."), "P3 is broken: a file that the program had is lost"
            before = download.whole(download.cache)
            assert len(served - before) <= WORKERS, "P3 is broken: more is lost than was under way"
            check_stands_alone(download.cache, is_in_progress=True)
        download.hub.heal()
        succeed(download.command, download.environ)
        assert download.served() == download.files.keys() - before, "only what is missing is downloaded"
        check_model_is_whole(download)


def kill(download: Download, victim: Victim, random: Random) -> str:
    """Start the download and kill at a random moment; what it said."""
    requests = random.randrange(90)
    gap = random.choice([0, random.uniform(0, 0.2)])
    with start(download.command, download.environ, stderr=subprocess.DEVNULL) as process:
        program = int(read_line(process.stdout)) if victim != "both" or requests % 3 else None
        eventually(lambda: process.poll() is not None or len(download.hub.requests) >= requests, "the moment to kill")
        if victim == "both":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "the client":
            assert program is not None
            os.kill(program, signal.SIGKILL)
        else:
            assert program is not None
            process.kill()
            time.sleep(gap)  # a moment in the program's life that nothing else tells from others
            os.kill(program, signal.SIGKILL)
        said, _ = process.communicate(timeout=SECONDS)  # ends when the last of them has
    return said.decode()


def start_again(download: Download, random: Random) -> None:
    succeed([OVERLAY, *random.choice([["clean"], ["run", "--quiet", "--", "true"]])], download.environ)
    assert left_sessions(download.home) == [], "P3 is broken: a session that can be cleared is left"


def check_model_is_whole(download: Download) -> None:
    """Read by a plain program without a network."""
    folder = Path(snapshot_download(download.repo_id, cache_dir=download.cache, local_files_only=True))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == download.files
    check_stands_alone(download.cache)
    assert left_sessions(download.home) == []
