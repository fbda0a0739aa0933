"""`hf-overlay serve` and `hf-overlay env`: one overlay for shells, notebooks and programs with no command line."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support import hubs
from tests.support.folders import lay_model, weights
from tests.support.hfcache import add_repo, listing, repo_folder
from tests.support.online import Person, at_a_shell, cached, contents
from tests.support.processes import OVERLAY, PYTHON, SECONDS, Finished, eventually, finish, read_line, start, succeed

MINE, NEW = "acme/mine", "org/new"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": weights(bytes(range(256)) * 100),
    "tokenizer.json": b"{}",
}
NONE_RUNNING = "hf-overlay: error: no overlay is being served; start one: hf-overlay serve --model-path DIR\n"
ENV = 'eval "$(hf-overlay env)"'


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    """With MINE in the folder, and another MINE, and NEW, on the Hub."""
    with at_a_shell(tmp_path) as person:
        lay_model(person.models / MINE, {"only-mine.txt": b"mine"}, settled=True)
        person.hub.add_repo(MINE, FILES)
        person.hub.add_repo(NEW, FILES)
        yield person


@dataclass(frozen=True)
class Service:
    """A `hf-overlay serve` that is up."""

    person: Person
    process: subprocess.Popen[bytes]
    log: Path

    def variables(self) -> dict[str, str | None]:
        found: dict[str, str | None] = json.loads(succeed([OVERLAY, "env", "--json"], self.person.environ).out)
        return found

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextmanager
def serving(
    person: Person, *options: str, models: Path | None = None, more: Mapping[str, str] | None = None
) -> Iterator[Service]:
    """One that is up, and ends with the context unless it has ended before."""
    arguments = [OVERLAY, "serve", "--model-path", str(models or person.models), "--interval", "0.05", *options]
    log = person.home / f"serve-{len(list(person.home.glob('serve-*')))}"
    with log.open("wb") as err, start(arguments, {**person.environ, **(more or {})}, stderr=err) as process:
        service = Service(person, process, log)
        eventually(lambda: any("serving" in line for line in service.said()), "it says that it serves")
        try:
            yield service
        finally:
            ended_with = service.end(signal.SIGTERM) if process.poll() is None else None
        assert ended_with in (None, 0), service.said()


def in_shell(person: Person, script: str, *shell: str, **more: str) -> Finished:
    """A script in a new shell."""
    return finish([*(shell or ("bash", "-euc")), script], {**person.environ, **more})


def downloads(*repo_ids: str) -> str:
    """A command that downloads repos and says where each one is."""
    program = "import sys, huggingface_hub as h; print(*map(h.snapshot_download, sys.argv[1:]), sep=chr(10))"
    return f"{PYTHON} -c '{program}' {' '.join(repo_ids)}"


# A shell -------------------------------------------------------------------------------------------------------


def test_a_shell_that_takes_over_the_environment_sees_the_folder_and_the_hub(person: Person) -> None:
    """P2, P3: the folder's model, and downloads into the real cache while the service goes on."""
    with serving(person):
        done = in_shell(person, f"{ENV}; {downloads(MINE, NEW)}")
        assert done.status == 0, done.err
        mine, new = done.lines()
        assert contents(mine) == contents(person.models / MINE)
        assert contents(new) == FILES
        assert cached(person.cache, NEW) == FILES
    assert person.asked_about(MINE) == []
    assert person.downloads(NEW) == dict.fromkeys(FILES, 1)
    with person.offline_client() as alone:
        assert contents(alone.get("snapshot_download", NEW)) == FILES


@pytest.mark.parametrize(
    "shell", [("sh", "-euc"), ("bash", "-euc"), ("zsh", "-euc"), ("fish", "-c")], ids=lambda s: s[0]
)
def test_each_shell_takes_the_variables_over_exactly(person: Person, shell: tuple[str, ...]) -> None:
    """Also where a path needs quoting, and where variables must go."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    odd = person.home / 'it\'s a $(false) \\ of "mine" `é`'
    environ = {
        "HF_HOME": str(odd),
        "TRANSFORMERS_CACHE": "/older",
        "LLAMA_CACHE": "/llama",
        "SHELL": f"/usr/bin/{shell[0]}",
    }
    shows = f"{PYTHON} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    script = f"hf-overlay env | source; {shows}" if shell[0] == "fish" else f"{ENV}; {shows}"
    with serving(person, more=environ) as service:
        variables = service.variables()
        done = in_shell(person, script, *shell, **environ)
        assert done.status == 0, done.err
        found = json.loads(done.out)
    assert variables["HF_HOME"] == str(odd)
    assert {name: found.get(name) for name in variables} == variables
    removed = {"TRANSFORMERS_CACHE", "LLAMA_CACHE"}
    assert removed <= variables.keys()
    assert not removed & found.keys()


def test_the_commands_for_fish_are_fish(person: Person) -> None:
    """By `--shell fish` or $SHELL; sh does not understand them."""
    with serving(person) as service:
        asked = succeed([OVERLAY, "env", "--shell", "fish"], person.environ)
        by_shell = succeed([OVERLAY, "env"], {**person.environ, "SHELL": "/usr/bin/fish"})
        assert by_shell.out == asked.out
        expected = {
            f"set -e {name};" if value is None else f"set -gx {name} '{value}';"
            for name, value in service.variables().items()
        }
        assert set(asked.lines()) == expected


def test_the_variables_as_json_are_what_a_program_of_run_gets(person: Person) -> None:
    with serving(person) as service:
        variables = service.variables()
        assert variables["HF_HOME"] == str(person.home / ".cache/huggingface")
        assert variables["HF_HUB_CACHE"] == variables["HUGGINGFACE_HUB_CACHE"]
        assert variables["HF_HUB_DISABLE_SHARED_BLOBS"] == "1"
        assert Path(str(variables["HF_HUB_CACHE"]), repo_folder(MINE)).is_dir()
        assert urlsplit(str(variables["HF_ENDPOINT"])).hostname == "127.0.0.1"
        assert variables["TRANSFORMERS_CACHE"] is None
        with person.client() as client:
            assert {name for name, value in variables.items() if value} <= client.environ.keys()


def test_a_proxy_in_the_shell_does_not_stand_before_the_gateway(person: Person) -> None:
    """The shell's environment, not the service's, says which proxy there is: here a dead one."""
    person.hub.add_repo("org/small", {"config.json": b"{}"})  # not in LFS: the other host would need that proxy
    with serving(person), socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{dead.getsockname()[1]}"
        done = in_shell(person, f"unset NO_PROXY; export HTTP_PROXY={proxy}; {ENV}; {downloads('org/small')}")
        assert done.status == 0, done.err
        assert contents(done.out.strip()) == {"config.json": b"{}"}


@pytest.mark.parametrize("options", [(), ("--json",), ("--shell", "fish")])
def test_env_without_a_service_says_how_to_start_one(person: Person, options: tuple[str, ...]) -> None:
    """Nothing on stdout, which a shell would run."""
    done = finish([OVERLAY, "env", *options], person.environ)
    assert (done.status, done.out, done.err) == (1, "", NONE_RUNNING)


def test_a_program_of_run_is_not_offered(person: Person) -> None:
    """A session that belongs to one program ends with it, under whoever else is in it."""
    with person.client():
        assert finish([OVERLAY, "env"], person.environ) == Finished(1, "", NONE_RUNNING)


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE"])
def test_shells_of_an_offline_service_are_offline(person: Person, how: str) -> None:
    """P2: there is no gateway, so a program that went online would download the Hub's and load that."""
    options, more = ([how], None) if how == "--offline" else ([], {how: "1"})
    with serving(person, *options, more=more) as service:
        assert "HF_ENDPOINT" not in service.variables()
        done = in_shell(person, f"{ENV}; {downloads(MINE)}")
        assert done.status == 0, done.err
        assert contents(done.out.strip()) == contents(person.models / MINE)
    assert person.hub.requests == []


def test_a_run_inside_a_served_shell_works_and_downloads_come_home(person: Person, tmp_path: Path) -> None:
    """P10: an overlay on an overlay; what it downloads is in the real cache all the same."""
    lay_model(tmp_path / "second" / "acme/second", settled=True)
    with serving(person):
        run = f"hf-overlay run -q --model-path {tmp_path}/second -- {downloads('acme/second', MINE, NEW)}"
        done = in_shell(person, f"{ENV}; {run}")
        assert done.status == 0, done.err
    assert person.asked_about(MINE) == person.asked_about("acme/second") == []
    assert cached(person.cache, NEW) == FILES


# Its life ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(person: Person, number: int) -> None:
    """Status 0; the gateway, the session and the offer are gone. (The fixture looks for the session.)"""
    with serving(person) as service:
        endpoint = urlsplit(str(service.variables()["HF_ENDPOINT"]))
        assert service.end(number) == 0, service.said()
    assert endpoint.hostname is not None
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(endpoint.hostname, endpoint.port, timeout=SECONDS).connect()
    assert not list(person.sessions.glob("session-*"))
    assert finish([OVERLAY, "env"], person.environ) == Finished(1, "", NONE_RUNNING)
    assert not person.cache.exists(), "nothing was downloaded, and yet there is something in the real cache"


def test_a_killed_one_is_not_offered_and_cleared_by_the_next(person: Person) -> None:
    """kill -9: neither its dead gateway nor its tree is handed out, and what was downloaded into it comes home."""
    with serving(person) as service:
        hub = Path(str(service.variables()["HF_HUB_CACHE"]))
        add_repo(hub, "org/past", FILES)  # as a program would that knows nothing of the gateway
        assert service.end(signal.SIGKILL) == -signal.SIGKILL
        assert finish([OVERLAY, "env"], person.environ) == Finished(1, "", NONE_RUNNING)
    with serving(person) as service:
        assert service.variables()["HF_HUB_CACHE"] != str(hub)
        assert not hub.exists()
    assert cached(person.cache, "org/past") == FILES


def test_the_shell_of_one_that_has_ended_is_told_so(person: Person) -> None:
    """P12: not a new overlay on the ruins of the old one."""
    with serving(person) as service:
        variables = {name: value for name, value in service.variables().items() if value is not None}
    done = finish([OVERLAY, "run", "--", "true"], {**person.environ, **variables})
    assert (done.status, done.out) == (1, "")
    assert "the overlay of this shell has ended" in done.err
    assert "unset HF_ENDPOINT HF_HUB_CACHE" in done.err
    hint = finish([OVERLAY, "env"], {**person.environ, **variables})
    assert hint == done
    command = hint.err.strip().rpartition("leave it: ")[2]
    in_fish = finish([OVERLAY, "env"], {**person.environ, **variables, "SHELL": "/usr/bin/fish"})
    assert in_fish.err == hint.err.replace("leave it: unset", "leave it: set -e")
    left = in_shell(person, f"{command}; hf-overlay path acme/mine --model-path {person.models}", **variables)
    assert left.lines() == [str(person.models / MINE)], left.err


def test_the_shell_of_one_that_was_killed_is_told_so_while_a_program_still_uses_its_tree(person: Person) -> None:
    """P12: the tree stays for that program, and is no cache for anything else."""
    with serving(person) as service:
        variables = {name: value for name, value in service.variables().items() if value is not None}
        shell = {**person.environ, **variables}
        inside = finish([OVERLAY, "run", "-q", "--", OVERLAY, "env"], shell)
        assert inside.status == 0, "an overlay within one that is served"
        with start([PYTHON, "-c", "print(1, flush=True); input()"], shell) as program:
            assert read_line(program.stdout) == "1"
            assert service.end(signal.SIGKILL) == -signal.SIGKILL
            for command in ([OVERLAY, "env"], [OVERLAY, "run", "--", "true"]):
                done = finish(command, shell)
                assert done.status != 0
                assert "the overlay of this shell has ended" in done.err
            assert Path(variables["HF_HUB_CACHE"]).is_dir(), "the program's tree is gone"
            assert program.stdin is not None
            program.stdin.close()
            program.wait(SECONDS)
    succeed([OVERLAY, "clean"], person.environ)


# Whose login ---------------------------------------------------------------------------------------------------


def test_a_shell_with_a_cache_of_its_own_does_not_lose_it_to_a_service_without(person: Person, tmp_path: Path) -> None:
    """P9: launchd gives a service none of the shell's variables; login and downloads would go to the internal disk."""
    with serving(person) as service:
        for variable in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
            done = finish([OVERLAY, "env"], {**person.environ, variable: str(tmp_path / "drive/own")})
            assert (done.status, done.out) == (1, ""), "nothing that a shell would run"
            assert done.err.count("\n") == 1
            assert str(tmp_path / "drive/own") in done.err
            assert f"unset {variable}" in done.err
        assert (
            finish([OVERLAY, "env"], {**person.environ, "HF_HOME": str(person.home / ".cache/huggingface")}).err == ""
        )
        joined = {name: value for name, value in service.variables().items() if value is not None}
        assert finish([OVERLAY, "env"], {**person.environ, **joined}).err == "", "once joined, again and again"


def test_a_shell_that_has_chosen_nothing_takes_the_services_home_and_is_told(person: Person, tmp_path: Path) -> None:
    """P9: what the service was started with was chosen; the login may be missing there all the same."""
    with serving(person, more={"HF_HOME": str(tmp_path / "drive/hf")}):
        done = finish([OVERLAY, "env", "--json"], person.environ)
        assert done.status == 0
        assert json.loads(done.out)["HF_HOME"] == str(tmp_path / "drive/hf")
        assert done.err.startswith("hf-overlay: warning: login and downloads are those of")


def test_a_shell_of_one_that_has_ended_finds_the_next(person: Person) -> None:
    with serving(person) as service:
        old = {name: value for name, value in service.variables().items() if value is not None}
    with serving(person):
        done = in_shell(person, f"{ENV}; {downloads(MINE)}", **old)
        assert done.status == 0, done.err
        assert contents(done.out.strip()) == contents(person.models / MINE)


def test_of_two_the_newer_is_offered_until_it_ends(person: Person, tmp_path: Path) -> None:
    second = tmp_path / "second"
    lay_model(second / "acme/second", settled=True)
    with serving(person) as first:
        older = first.variables()
        with serving(person, models=second) as service:
            newer = service.variables()
            assert newer["HF_HUB_CACHE"] != older["HF_HUB_CACHE"]
            assert Path(str(newer["HF_HUB_CACHE"]), repo_folder("acme/second")).is_dir()
        assert first.variables() == older


# Following the folders -----------------------------------------------------------------------------------------


def test_it_follows_the_folders_by_itself(person: Person) -> None:
    """New, changed and removed models, told by id; the environment of shells that are open stays good."""
    with serving(person) as service:
        variables = service.variables()
        hub = Path(str(variables["HF_HUB_CACHE"]))
        lay_model(person.models / "acme/late", settled=True)
        eventually(lambda: (hub / repo_folder("acme/late")).exists(), "the new model is there")
        eventually(lambda: "hf-overlay: added: acme/late" in service.said(), "it says so")
        before = (hub / repo_folder(MINE)).readlink()
        (person.models / MINE / "more.txt").write_bytes(b"more")
        eventually(lambda: (hub / repo_folder(MINE)).readlink() != before, "the changed model is there")
        eventually(lambda: f"hf-overlay: changed: {MINE}" in service.said(), "it says so")
        shutil.rmtree(person.models / "acme/late")
        eventually(lambda: not (hub / repo_folder("acme/late")).exists(), "the removed model is gone")
        eventually(lambda: "hf-overlay: removed: acme/late" in service.said(), "it says so")
        assert service.variables() == variables
        done = in_shell(person, f"{ENV}; {downloads(MINE)}")
        assert done.status == 0, done.err
        assert contents(done.out.strip()) == contents(person.models / MINE)
    assert person.asked_about(MINE) == []


@pytest.mark.parametrize("release", ["1.33.0", hubs.INSTALLED])
def test_a_model_that_changes_while_it_is_loaded_is_never_the_hubs(person: Person, release: str) -> None:
    """P2 and P6: each load finds the files before a change or those after it, and asks nobody else."""
    states = [contents(person.models / MINE)]
    with serving(person) as service:
        variables = {name: value for name, value in service.variables().items() if value is not None}
        with person.plain_client(release=release, **variables) as client:
            for number in range(20):
                (person.models / MINE / f"added-{number}.txt").write_bytes(b"added")
                states.append(contents(person.models / MINE))
                assert contents(client.get("snapshot_download", MINE)) in states
                config = client.get("hf_hub_download", MINE, "config.json")
                assert Path(config).read_bytes() == states[0]["config.json"]
            eventually(lambda: contents(client.get("snapshot_download", MINE)) == states[-1], "the last change is seen")
    assert person.asked_about(MINE) == []


def test_it_outlives_a_drive_that_goes_and_comes_back(person: Person) -> None:
    """P7: said once; a program that asks meanwhile is told which drive, and downloads nothing."""
    away = person.models.with_name("away")
    with serving(person) as service:
        hub = Path(str(service.variables()["HF_HUB_CACHE"]))
        person.models.rename(away)
        eventually(lambda: not (hub / repo_folder(MINE)).exists(), "the model is hidden")
        done = in_shell(person, f"{ENV}; {downloads(MINE)}")
        assert done.status != 0
        assert str(person.models) in done.err
        away.rename(person.models)
        eventually(lambda: (hub / repo_folder(MINE)).exists(), "the model is back")
        done = in_shell(person, f"{ENV}; {downloads(MINE)}")
        assert done.status == 0, done.err
        assert contents(done.out.strip()) == contents(person.models / MINE)
        warnings = [line for line in service.said() if "warning" in line]
        assert len(warnings) == 1, warnings
        assert str(person.models) in warnings[0]
    assert person.asked_about(MINE) == []


def test_what_is_downloaded_past_the_gateway_is_seen_and_comes_home(person: Person) -> None:
    """P3, P4: a program with an endpoint of its own; its download survives refreshes and the service's end."""
    program = f"import huggingface_hub as h; print(h.snapshot_download('{NEW}', endpoint='{person.hub.endpoint}'))"
    with serving(person) as service:
        done = in_shell(person, f'{ENV}; env -u HF_ENDPOINT {PYTHON} -c "{program}"')
        assert done.status == 0, done.err
        lay_model(person.models / "acme/late", settled=True)
        eventually(lambda: "hf-overlay: added: acme/late" in service.said(), "a refresh")
        again = in_shell(person, f"{ENV}; {downloads(NEW)}", HF_HUB_OFFLINE="1")
        assert again.status == 0, again.err
        assert contents(again.out.strip()) == FILES
    assert cached(person.cache, NEW) == FILES
    before = listing(person.cache)
    assert in_shell(person, downloads(NEW), HF_HUB_OFFLINE="1").status == 0
    assert listing(person.cache) == before
