"""P3 and P12: while the real cache is away or read-only, nothing is fetched that cannot be kept, nor twice."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import hf_overlay
import pytest
from huggingface_hub import scan_cache_dir

from tests.e2e.online.people import FILES, MINE, NEW, RELEASES, folder_of
from tests.overlay.faults.seen import left
from tests.support import hubs
from tests.support.online import Person, at_a_shell, cached, contents, leads_outside
from tests.support.processes import OVERLAY, PYTHON, SECONDS, Finished, due, finish, read_line, start

HOLD = ["--hold-downloads"]


@pytest.fixture
def drive(person: Person) -> Path:
    """Where the real cache leads to: a drive that is not connected."""
    target = person.home.parent / "unplugged" / "hub"
    person.cache.parent.mkdir(parents=True)
    person.cache.symlink_to(target)
    return target


def download(person: Person, what: str = NEW, options: list[str] | None = None, **more: str) -> Finished:
    return person.finish("hf", "download", what, options=options or [], **more)


@pytest.mark.parametrize("release", RELEASES)
def test_while_the_cache_is_away_nothing_is_downloaded_and_each_run_says_so(
    person: Person, drive: Path, release: str
) -> None:
    with person.client(release=release) as client:
        for call in (("snapshot_download", NEW), ("hf_hub_download", NEW, "config.json")):
            begun = time.monotonic()
            failure = client.failure(*call)
            assert time.monotonic() - begun < due(10), "clients do not try again for minutes"
            if release == "0.36.2" and call[0] == "snapshot_download":
                continue  # the message is in the traceback, where the next test looks for it
            for part in (str(person.cache), str(drive), "connect that drive", "--hold-downloads"):
                assert part in failure.message, call
        client.failure("snapshot_download", "org/data", repo_type="dataset")
        assert contents(client.get("snapshot_download", MINE)) == folder_of(person), "what can be read still loads"
        assert client.get("model_info", NEW)["id"] == NEW, "the Hub can be asked"
        [warning] = [line for line in client.said().splitlines() if "warning" in line]
    assert str(person.cache) in warning
    assert str(drive) in warning
    assert "nothing is downloaded" in warning
    assert person.hub.finished_files() == []
    assert not os.path.lexists(drive), "no folder stands in the drive's place"


def test_the_command_line_shows_why_nothing_is_downloaded(person: Person, drive: Path) -> None:
    by_old_release = [
        "env",
        *(f"{name}={value}" for name, value in hubs.environment("0.36.2").items()),
        *(PYTHON, "-c", f"import huggingface_hub; huggingface_hub.snapshot_download({NEW!r})"),
    ]
    for command in (["hf", "download", NEW], ["hf", "download", NEW], by_old_release):
        done = person.finish(*command)
        assert done.status != 0
        assert f"org/new is not downloaded: the Hugging Face cache {person.cache} is a link" in done.err
    assert person.hub.finished_files() == []


def test_once_the_drive_is_back_downloads_go_on_in_the_same_session(person: Person, drive: Path) -> None:
    with person.client() as client:
        client.failure("snapshot_download", NEW)
        drive.mkdir(parents=True)
        assert contents(client.get("snapshot_download", NEW)) == FILES
    assert cached(person.cache, NEW) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("second", [[], HOLD])
@pytest.mark.parametrize("release", ["0.36.2", hubs.INSTALLED])
def test_what_was_downloaded_meanwhile_is_fetched_once_and_moves_home(
    person: Person, drive: Path, second: list[str], release: str
) -> None:
    with person.client(release=release, options=HOLD) as client:
        assert contents(client.get("snapshot_download", NEW)) == FILES
        client.get("snapshot_download", "org/data", repo_type="dataset")
    served = person.hub.finished_files()
    assert leads_outside(person.cache) == []
    [dead] = left(person.sessions)
    for _ in range(2):
        with person.client(release=release, options=second) as client, person.client(options=second) as other:
            for each in (client, other):
                assert contents(each.get("snapshot_download", NEW)) == FILES
                assert Path(each.get("hf_hub_download", NEW, "config.json")).read_bytes() == FILES["config.json"]
                assert contents(each.get("snapshot_download", "org/data", repo_type="dataset")) == FILES
        assert left(person.sessions) == [dead]
    assert person.hub.finished_files() == served, "not a byte twice"
    drive.mkdir(parents=True)
    person.succeed("true")
    assert cached(person.cache, NEW) == cached(person.cache, "org/data", "dataset") == FILES
    with person.offline_client() as plain:
        assert contents(plain.get("snapshot_download", NEW)) == FILES
    assert person.hub.finished_files() == served


def test_what_is_shown_is_not_moved_away_under_its_reader(person: Person, drive: Path) -> None:
    """Not even if the process that opened the overlay is killed: the program has the lock as well."""
    assert download(person, options=HOLD).status == 0
    [dead] = left(person.sessions)
    reader = f"import huggingface_hub as h; print(h.snapshot_download({NEW!r}), flush=True); input()"
    with start(person.overlaid(PYTHON, "-c", reader), person.environ) as process:
        found = Path(read_line(process.stdout))
        drive.mkdir(parents=True)
        process.kill()
        process.wait()
        assert finish([OVERLAY, "clean"], person.environ).status == 0
        assert contents(found) == FILES
        assert dead in left(person.sessions)
    deadline = time.monotonic() + SECONDS
    while left(person.sessions) and time.monotonic() < deadline:  # until the killed one's program has ended
        finish([OVERLAY, "clean"], person.environ)
    assert cached(person.cache, NEW) == FILES


def test_scans_and_resolving_see_what_is_held(person: Person, drive: Path) -> None:
    assert download(person, options=HOLD).status == 0
    with hf_overlay.open_session([person.models], environ=person.environ) as session:
        assert contents(session.resolve(NEW)) == FILES
        assert NEW in [model.id for model in session.models]
        info = scan_cache_dir(session.hub_cache)
        assert info.warnings == []
        assert {repo.repo_id for repo in info.repos} == {MINE, NEW}
    drive.mkdir(parents=True)
    person.succeed("true")


def test_another_cache_is_not_shown_what_is_held_for_this_one(person: Person, drive: Path) -> None:
    assert download(person, options=HOLD).status == 0
    other = {**person.environ, "HF_HUB_CACHE": str(person.home / "other")}
    with hf_overlay.open_session([], environ=other) as session:
        assert session.models == ()
    drive.mkdir(parents=True)
    person.succeed("true")


def test_without_a_gateway_programs_are_offline_until_the_cache_is_back(person: Person, drive: Path) -> None:
    options = {"environ": person.environ, "gateway": False}
    with hf_overlay.open_session([person.models], **options) as session:  # type: ignore[arg-type]
        assert session.environment["HF_HUB_OFFLINE"] == "1"
        assert str(drive) in str(session.why_no_downloads)
        drive.mkdir(parents=True)
        assert "HF_HUB_OFFLINE" not in session.environment
        assert session.why_no_downloads is None
    shutil.rmtree(drive.parent)
    with hf_overlay.open_session([person.models], hold_downloads=True, **options) as session:  # type: ignore[arg-type]
        assert "HF_HUB_OFFLINE" not in session.environment


@pytest.mark.parametrize("options", [[], HOLD])
def test_serve_takes_the_option_too(person: Person, drive: Path, options: list[str]) -> None:
    download = f"import huggingface_hub as h; h.snapshot_download({NEW!r})"
    command = [OVERLAY, "serve", *options]
    with start(command, person.environ) as process:
        while "serving" not in read_line(process.stderr):
            pass
        shell = f'eval "$({OVERLAY} env)"; exec {PYTHON} -c {shlex.quote(download)}'
        assert (finish(["/bin/sh", "-c", shell], person.environ).status == 0) == bool(options)
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)
    drive.mkdir(parents=True)
    person.succeed("true")
    assert cached(person.cache, NEW) == (FILES if options else {})


# Read-only --------------------------------------------------------------------------------------------------------


def as_user(*command: str) -> list[str]:
    """A command for which modes hold, also where tests run as root."""
    if os.geteuid() != 0:
        return [*command]
    if sys.platform != "linux" or shutil.which("setpriv") is None:
        pytest.skip("root on this system cannot be refused anything: run the tests as a user")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", *command]


@pytest.mark.slow
def test_a_read_only_cache_loads_and_nothing_is_downloaded_that_it_cannot_keep(tmp_path: Path) -> None:
    with at_a_shell(tmp_path) as person:
        person.hub.add_repo(NEW, FILES)
        person.hub.add_repo("org/second", FILES)
        with person.plain_client() as plain:
            plain.get("snapshot_download", NEW)
        person.hub.add_repo(NEW, {**FILES, "newer.txt": b"newer"})
        person.hub.reset_counts()
        folders = [path for path in (person.cache, *person.cache.rglob("*")) if path.is_dir() and not path.is_symlink()]
        person.sessions.mkdir()
        for folder in folders:
            folder.chmod(0o555)

        def run(model: str, *options: str) -> Finished:
            return finish(as_user(*person.overlaid("hf", "download", model, options=options)), person.environ)

        try:
            for _ in range(2):
                done = run(NEW)
                assert done.status == 0, done.err
                assert f"warning: Hugging Face cache {person.cache} is read-only; nothing is downloaded" in done.err
                done = run("org/second")
                assert done.status != 0
                assert f"{person.cache} is read-only, so it cannot keep a download" in done.err
            assert person.hub.finished_files() == []
            assert run("org/second", *HOLD).status == 0
            assert person.downloads("org/second") == dict.fromkeys(FILES, 1)
            for options in ([], HOLD):
                assert run("org/second", *options).status == 0
            assert person.downloads("org/second") == dict.fromkeys(FILES, 1), "not a byte twice"
        finally:
            for folder in folders:
                folder.chmod(0o755)
        person.succeed("true")
        assert cached(person.cache, "org/second") == FILES
