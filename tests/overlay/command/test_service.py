"""`hf-overlay service`, with a launchctl and a systemctl that keep what they were asked."""

from __future__ import annotations

import json
import os
import plistlib
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hf_overlay.command import cli, units

from tests.support.processes import BIN

LAUNCHCTL = """#!/bin/sh
echo "$*" >> STATE/calls
case $1 in
print)
    # As the real one: a unit that was told to end is there until its program has ended.
    test -f STATE/leaving && { mv STATE/leaving STATE/left; echo "pid = 4242"; exit 0; }
    test -f STATE/left && rm -f STATE/left STATE/loaded
    test -f STATE/loaded || { echo "Could not find service" >&2; exit 113; }
    test -f STATE/stopped && { printf "{\\n\\tstate = not running\\n}\\n"; exit 0; }
    printf "{\\n\\tstate = running\\n\\tpid = 4242\\n}\\n";;
bootstrap)
    test -f STATE/loaded && { echo "Bootstrap failed: 5: Input/output error" >&2; exit 5; }
    rm -f STATE/stopped; cp "$3" STATE/loaded;;
bootout) touch STATE/leaving; exit 36;;
enable) ;;
*) exit 64;;
esac
"""
SYSTEMCTL = """#!/bin/sh
echo "$*" >> STATE/calls
test "$1" = --user || exit 64
case $2 in
show)
    test -f STATE/stopped && { printf "MainPID=0\\nActiveState=inactive\\nUnitFileState=enabled\\n"; exit 0; }
    test -f STATE/loaded && printf "MainPID=4242\\nActiveState=active\\nUnitFileState=enabled\\n" ||
    printf "MainPID=0\\nActiveState=inactive\\nUnitFileState=\\n";;
daemon-reload|enable) ;;
restart) rm -f STATE/stopped; cp "$UNITS/$3" STATE/loaded;;
disable) test "$3" = --now && rm -f STATE/loaded;;
*) exit 64;;
esac
"""
READING = ("print", "--user show")
PATHS = {
    "darwin": "Library/LaunchAgents/local.{}.plist",
    "linux": ".config/systemd/user/{}.service",
}


@dataclass(frozen=True)
class Machine:
    """One on which a launchctl or systemctl is faked, and our commands are installed."""

    platform: str
    home: Path
    state: Path
    run: Callable[..., tuple[int, str, str]]

    def unit(self, name: str = "hf-overlay") -> Path:
        return self.home / PATHS[self.platform].format(name)

    def changes(self) -> list[str]:
        """The calls that changed something, since the last look."""
        calls = self.state / "calls"
        made = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return [call for call in made if not call.startswith(READING)]

    def command(self, name: str = "hf-overlay") -> list[str]:
        """The program and its arguments, as the manager reads them."""
        if self.platform == "darwin":
            return list(plistlib.loads(self.unit(name).read_bytes())["ProgramArguments"])
        line = next(line for line in self.unit(name).read_text().splitlines() if line.startswith("ExecStart="))
        return shlex.split(line.partition("=")[2])

    def environ(self, name: str = "hf-overlay") -> dict[str, str]:
        """The variables, as the manager reads them."""
        if self.platform == "darwin":
            return dict(plistlib.loads(self.unit(name).read_bytes())["EnvironmentVariables"])
        lines = [line.partition("=")[2] for line in self.unit(name).read_text().splitlines() if "Environment=" in line]
        pairs = [shlex.split(line)[0].replace("%%", "%").partition("=") for line in lines]
        return {variable: value for variable, _, value in pairs}


@pytest.fixture(params=["darwin", "linux"])
def machine(
    request: pytest.FixtureRequest,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Machine:
    tools, state = tmp_path / "tools", tmp_path / "state"
    tools.mkdir()
    state.mkdir()
    for name, script in {"launchctl": LAUNCHCTL, "systemctl": SYSTEMCTL}.items():
        (tools / name).write_text(script.replace("STATE", shlex.quote(str(state))))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("UNITS", str(home / ".config/systemd/user"))
    monkeypatch.setattr(sys, "platform", request.param)
    monkeypatch.setattr(sys, "argv", [str(BIN / "hf-overlay")])
    monkeypatch.chdir(home)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(["service", *arguments])
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err

    return Machine(request.param, home, state, run)


def test_it_is_installed_and_loaded_once_and_gone_after_uninstall(machine: Machine) -> None:
    """Quiet where it succeeds; done again, it changes nothing."""
    options = ("--", "--model-path", "/Volumes/LLMS/models")
    assert machine.run("status")[0] == 1
    assert machine.run("install", *options) == (0, "", "")
    assert machine.command() == [str(BIN / "hf-overlay"), "serve", "--model-path", "/Volumes/LLMS/models"]
    assert (machine.state / "loaded").read_text() == machine.unit().read_text()
    assert machine.changes()
    status, out, _ = machine.run("status")
    assert (status, "running (process 4242)" in out) == (0, True)

    assert machine.run("install", *options) == (0, "", "")
    assert machine.changes() == []

    assert machine.run("uninstall") == (0, "", "")
    assert not machine.unit().exists()
    assert not (machine.state / "loaded").exists()
    assert machine.run("uninstall") == (0, "", "")
    status, out, _ = machine.run("status", "--json")
    found = json.loads(out)
    assert (status, found["is_installed"], found["is_loaded"], found["pid"]) == (1, False, False, None)


def test_one_that_changed_takes_the_place_of_the_one_that_runs(machine: Machine) -> None:
    """launchd refuses to load a unit until the program of the earlier one has ended."""
    assert machine.run("install") == (0, "", "")
    assert machine.run("install", "--", "--offline") == (0, "", "")
    assert machine.command()[1:] == ["serve", "--offline"]
    assert (machine.state / "loaded").read_text() == machine.unit().read_text()


def test_one_that_was_unloaded_by_hand_is_loaded_again(machine: Machine) -> None:
    assert machine.run("install") == (0, "", "")
    (machine.state / "loaded").unlink()
    status, out, _ = machine.run("status")
    assert status == 1
    assert "to load it: hf-overlay service install" in out
    assert machine.run("install") == (0, "", "")
    assert (machine.state / "loaded").exists()


def test_one_whose_program_has_ended_is_started_again(machine: Machine) -> None:
    assert machine.run("install") == (0, "", "")
    (machine.state / "stopped").touch()
    status, out, _ = machine.run("status")
    assert (status, "not running, though it is started at login; look at its log: " in out) == (1, True)
    assert machine.run("install") == (0, "", "")
    assert machine.run("status")[0] == 0


def test_a_unit_that_is_not_ours_is_neither_overwritten_nor_removed_unless_that_is_asked_for(machine: Machine) -> None:
    """Such as one that was copied from the documentation, and changed."""
    machine.unit().parent.mkdir(parents=True)
    machine.unit().write_text("by hand")
    for action in ("install", "uninstall"):
        status, out, err = machine.run(action)
        assert (status, out) == (1, "")
        assert err == (
            f"hf-overlay: error: {machine.unit()} is not ours; look at it, then remove it or add --replace\n"
        )
    assert machine.unit().read_text() == "by hand"
    assert machine.changes() == []
    assert machine.run("install", "--replace") == (0, "", "")
    assert units.MARK in machine.unit().read_text()


def test_it_carries_what_the_shell_has_for_it_and_nothing_else(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P9: launchd and systemd give it none of the shell's variables. There may be a key: nobody else may read it."""
    for name, value in {
        "HF_HOME": '/Volumes/X/h f%h "quoted" $HOME \\ é',
        "MLX_OMNI_MODEL_PATH": "/a:/b",
        "MLX_OMNI_API_KEY": "secret",
        "https_proxy": "http://proxy:3128",
        "XDG_CACHE_HOME": "/Volumes/X/cache",
        "SECRET_OF_ANOTHER_PROGRAM": "x",
        "LS_COLORS": "y",
    }.items():
        monkeypatch.setenv(name, value)
    assert machine.run("install") == (0, "", "")
    carried = machine.environ()
    ours = ("HF_", "MLX_OMNI_", "SSL_CERT_", "REQUESTS_CA_", "CURL_CA_")
    expected = {name: value for name, value in os.environ.items() if name.startswith(ours)}
    assert carried == {
        **expected,
        "https_proxy": "http://proxy:3128",
        "XDG_CACHE_HOME": "/Volumes/X/cache",
    }
    assert stat.S_IMODE(machine.unit().stat().st_mode) == 0o600


@pytest.mark.mlx_lm
def test_the_server_is_a_service_of_its_own(machine: Machine) -> None:
    assert machine.run("install") == (0, "", "")
    assert machine.run("install", "--server", "--", "--port", "8000") == (0, "", "")
    assert machine.command("mlx-omni-server") == [str(BIN / "mlx-omni-server"), "--port", "8000"]
    assert machine.unit().exists()
    assert machine.run("uninstall", "--server") == (0, "", "")
    assert machine.unit().exists()
    assert not machine.unit("mlx-omni-server").exists()


def test_folders_get_their_whole_path(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit is not started in the shell's working folder."""
    monkeypatch.setenv("MLX_OMNI_MODEL_PATH", "models:/else:~/mine:")
    monkeypatch.setenv("HF_OVERLAY_DIR", "../sessions:1")
    options = ["--model-path", "models", "--model-path=../more", "--model-path", "~/mine", "--exclude", "models/x"]
    options += ["--map", "a/b=c"]
    assert machine.run("install", "--", *options) == (0, "", "")
    home = machine.home
    assert machine.command()[2:] == [
        *("--model-path", f"{home}/models", f"--model-path={home}/../more", "--model-path", f"{home}/mine"),
        *("--exclude", "models/x", "--map", f"a/b={home}/c"),
    ]
    assert machine.environ()["MLX_OMNI_MODEL_PATH"] == f"{home}/models:/else:{home}/mine"
    assert machine.environ()["HF_OVERLAY_DIR"] == f"{home}/../sessions:1"


def test_what_no_unit_can_hold_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = machine.run("install", "--", "--model-path", "/a\nb")
    assert (status, err.startswith("hf-overlay: error: an option holds a control character")) == (2, True)
    monkeypatch.setenv("HF_TOKEN", "secret\udcff")
    status, _, err = machine.run("install")
    assert (status, err.startswith("hf-overlay: error: HF_TOKEN holds a control character")) == (2, True)
    assert "secret" not in err
    assert not machine.unit().exists()


@pytest.mark.parametrize("server", [[], pytest.param(["--server"], marks=pytest.mark.mlx_lm)])
def test_a_mistake_is_found_before_anything_is_written(machine: Machine, server: list[str], home: Path) -> None:
    """Else the unit would fail at each login, in a log that nobody reads."""
    status, out, err = machine.run("install", *server, "--", "--no-such-option")
    assert (status, out) == (2, "")
    assert "does not take these options" in err
    assert "--no-such-option" in err
    file = home / ".config/hf-overlay/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("port = 3\n")
    if machine.platform == "linux":  # where macOS has it, another test says
        status, _, err = machine.run("install", *server)
        assert (status, f"{file}:1:" in err) == (2, True)
    assert not machine.unit().exists()
    assert machine.changes() == []


def test_a_shell_in_an_overlay_installs_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit would carry the overlay's variables, and lead into an overlay that has ended."""
    monkeypatch.setenv("HF_HUB_CACHE", f"{machine.home}/sessions/session-1-a/home/hub")
    status, _, err = machine.run("install")
    assert (status, "use a new shell" in err) == (1, True)
    assert not machine.unit().exists()


def test_what_the_system_says_is_passed_on(machine: Machine, tmp_path: Path) -> None:
    """As over SSH, where nobody is logged in at the desktop. Nor does the unit start at the next login then."""
    assert machine.run("install")[0] == 0
    before = machine.unit().read_text()
    for tool in (tmp_path / "tools").iterdir():
        tool.write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2; exit 1\n")
    status, _, err = machine.run("install", "--", "--offline")
    assert (status, err.endswith("; the unit is as it was\n")) == (1, True)
    assert machine.unit().read_text() == before
    machine.unit().unlink()
    status, out, err = machine.run("install")
    assert (status, out) == (1, "")
    assert "failed (Failed to connect to bus); do this in a terminal" in err
    assert err.endswith("; the unit is not installed\n")
    assert err.count("\n") == 1
    assert not machine.unit().exists()
    assert machine.run("uninstall") == (0, "", "")


def test_nothing_runs_where_neither_is_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, err = machine.run("install")
    assert (status, "started at login by other means" in err) == (1, True)
    assert not machine.unit().exists()


def test_on_macos_it_has_a_log_and_room_for_open_files(machine: Machine) -> None:
    """macOS gives 256 open files, and launchd throws away what is printed."""
    if machine.platform != "darwin":
        pytest.skip("on macOS")
    assert machine.run("install") == (0, "", "")
    unit = plistlib.loads(machine.unit().read_bytes())
    assert unit["StandardErrorPath"] == unit["StandardOutPath"] == f"{machine.home}/Library/Logs/hf-overlay.log"
    assert (machine.home / "Library/Logs").is_dir()
    assert unit["SoftResourceLimits"]["NumberOfFiles"] >= 4096
    assert unit["KeepAlive"] == {"SuccessfulExit": False}


def test_systemd_reads_its_unit(machine: Machine, tmp_path: Path) -> None:
    if machine.platform != "linux" or shutil.which("systemd-analyze") is None:
        pytest.skip("systemd reads it where there is one")

    def complaints() -> list[str]:
        command = ["systemd-analyze", "verify", "--user", str(machine.unit())]
        environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
        return [line for line in done.stderr.splitlines() if "hf-overlay" in line]  # not of the machine's own units

    assert machine.run("install", "--", "--model-path", '/a b/$HOME %h "c"') == (0, "", "")
    assert complaints() == []
    with machine.unit().open("a") as file:
        file.write("[Service]\nNonsense=1\n")
    assert complaints(), "it does not look at the unit: the test shows nothing"
