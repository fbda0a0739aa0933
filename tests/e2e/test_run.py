"""`hf-overlay run` itself: a program under it lives and ends as if it had been started alone."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import processes
from tests.support.folders import lay_model, weights
from tests.support.hfcache import add_repo, repo_folder
from tests.support.models import make_model
from tests.support.processes import OVERLAY, PYTHON, SECONDS, eventually, finish, read_line, start, succeed

RUN = (OVERLAY, "run", "--quiet")
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": weights(b"tier"), "tokenizer.json": b"{}"}

# Says where the overlay is, then waits for its stdin to end; `cat` repeats each line until then.
WAITS = ("sh", "-c", 'echo "$HF_HUB_CACHE"; exec cat')

# Waits for signals where they cannot be missed: blocked before "ready" is said, then taken one by one.
TAKES_SIGNALS = """
import os, signal
waited_for = [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
signal.alarm(240)
print("ready", os.isatty(0), flush=True)
interrupts = 0
while (number := signal.sigwait(waited_for)) == signal.SIGINT and EXPECT_INTERRUPTS:
    interrupts += 1
    print("interrupted", flush=True)
print(interrupts, "interrupts, then", signal.Signals(number).name, flush=True)
raise SystemExit(40 + number)
"""


@pytest.fixture
def environ(home: Path) -> dict[str, str]:
    return processes.environment(home)


def session_of(hub: str) -> Path:
    """The session's folder, from what a program sees as HF_HUB_CACHE."""
    return Path(hub).parents[1]


def where_models_lead(environ: Mapping[str, str], *options: str, cwd: Path | None = None) -> dict[str, str]:
    """What a program sees in its cache: the repo folders, and which config.json each one leads to."""
    program = """
import glob, json, os
configs = glob.glob(os.environ["HF_HUB_CACHE"] + "/*/snapshots/*/config.json")
print(json.dumps({config.split("/")[-4]: os.path.realpath(config) for config in configs}))
"""
    found: dict[str, str] = json.loads(succeed([*RUN, *options, "--", PYTHON, "-c", program], environ, cwd=cwd).out)
    return found


# How a program ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 3, 255])
def test_the_exit_status_is_the_programs(environ: dict[str, str], sessions: Path, status: int) -> None:
    assert finish([*RUN, "--", "sh", "-c", f"exit {status}"], environ).status == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_program_killed_by_a_signal_gives_128_and_its_number(
    environ: dict[str, str], sessions: Path, number: int
) -> None:
    done = finish([*RUN, "--", "sh", "-c", f"ulimit -c 0; kill -{number} $$"], environ)
    assert done.status == 128 + number, "a shell's way to say so"


def test_a_command_that_is_not_there_gives_127(environ: dict[str, str], sessions: Path) -> None:
    done = finish([*RUN, "--", "no-such-command"], environ)
    assert (done.status, done.out) == (127, "")
    assert done.err == "hf-overlay: error: cannot run no-such-command: No such file or directory\n"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_command_that_cannot_be_run_gives_126(
    environ: dict[str, str], sessions: Path, tmp_path: Path, kind: str
) -> None:
    program = tmp_path / "program"
    program.mkdir() if kind == "folder" else program.write_text("#!/bin/sh\n")
    done = finish([*RUN, "--", str(program)], environ)
    assert (done.status, done.out) == (126, "")
    assert done.err == f"hf-overlay: error: cannot run {program}: Permission denied\n"


def test_nothing_to_run_is_a_usage_error(environ: dict[str, str], sessions: Path) -> None:
    for arguments in ([*RUN], [*RUN, "--"]):
        done = finish(arguments, environ)
        assert (done.status, done.out) == (2, "")
        assert len(done.err.splitlines()) == 1
        assert "put the program after --" in done.err


# What goes in and out ------------------------------------------------------------------------------------------


def test_stdin_stdout_and_stderr_pass_through_untouched(environ: dict[str, str], sessions: Path) -> None:
    """Byte for byte, whatever they are, and more than a pipe holds."""
    data = bytes(range(256)) * 1024
    done = finish([*RUN, "--", "sh", "-c", "cat; printf 'to \\377 stderr' >&2"], environ, stdin=data)
    assert done.out.encode("utf-8", "surrogateescape") == data
    assert done.err.encode("utf-8", "surrogateescape") == b"to \xff stderr"


def test_what_follows_the_dashes_is_the_programs_own(environ: dict[str, str], sessions: Path) -> None:
    """Also where it looks like an option of ours."""
    arguments = ["--quiet", "--model-path", "/nowhere", "--", "a b", "", "*", "-h"]
    done = succeed([*RUN, "--", "printf", "<%s>", *arguments], environ)
    assert done.out == "".join(f"<{argument}>" for argument in arguments)


def test_files_that_the_shell_opened_stay_open(environ: dict[str, str], sessions: Path) -> None:
    """`hf-overlay run -- python script.py <(command)` reads from a descriptor above 2, as without hf-overlay."""
    reading, writing = os.pipe()
    os.write(writing, b"from the shell")
    os.close(writing)
    program = f"import os; os.write(1, os.read({reading}, 100))"
    with start([*RUN, "--", PYTHON, "-c", program], environ, pass_fds=(reading,)) as process:
        os.close(reading)
        out, err = process.communicate(timeout=SECONDS)
    assert (out, process.returncode) == (b"from the shell", 0), err.decode()


def test_the_program_starts_in_the_same_folder_with_the_same_umask(
    environ: dict[str, str], sessions: Path, tmp_path: Path
) -> None:
    done = succeed(["sh", "-c", f"umask 027; exec {' '.join(RUN)} -- sh -c 'pwd -P; umask'"], environ, cwd=tmp_path)
    folder, umask = done.lines()
    assert (folder, int(umask, 8)) == (str(tmp_path.resolve()), 0o027)


def test_signals_that_the_shell_ignores_stay_ignored(environ: dict[str, str], sessions: Path) -> None:
    """Else `nohup hf-overlay run -- mlx_lm.server &` ends with the terminal, which `nohup mlx_lm.server &` does not."""
    program = "import signal as s; print([n for n in (1, 2, 3, 15) if s.getsignal(n) == s.SIG_IGN])"
    shell = ["sh", "-c", 'trap "" HUP INT QUIT; exec "$@"', "sh"]
    alone = succeed([*shell, PYTHON, "-c", program], environ)
    assert alone.out == "[1, 2, 3]\n"
    assert succeed([*shell, *RUN, "--", PYTHON, "-c", program], environ).out == alone.out


# The environment -----------------------------------------------------------------------------------------------


def environment_of_a_program(environ: Mapping[str, str], *options: str) -> dict[str, str]:
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    found: dict[str, str] = json.loads(succeed([*RUN, *options, "--", PYTHON, "-c", program], environ).out)
    return found


def test_only_the_cache_differs_in_the_programs_environment(
    environ: dict[str, str], home: Path, sessions: Path
) -> None:
    """P9: HF_HOME is the user's own, and with it the login, the Xet cache, datasets, assets; all else is as given."""
    given = environ | {
        "HF_TOKEN": "hf_secret",
        "HF_DATASETS_CACHE": "/data",
        "MLX_OMNI_MODEL_PATH": str(home / "models"),
        "ODD": "é = \n\t 'quoted' \udcff",
        "EMPTY": "",
    }
    found = environment_of_a_program(given)
    hub = found["HF_HUB_CACHE"]
    assert session_of(hub).parent == sessions, "the hub cache is not the overlay"
    assert found == given | {
        "HF_HOME": str(home / ".cache/huggingface"),
        "HF_HUB_CACHE": hub,
        "HUGGINGFACE_HUB_CACHE": hub,
        "HF_HUB_DISABLE_SHARED_BLOBS": "1",
    }


def test_variables_that_would_lead_past_the_overlay_are_replaced(
    environ: dict[str, str], tmp_path: Path, sessions: Path
) -> None:
    """Other names of the cache would outrank ours; the real cache is the one that they name together."""
    real = tmp_path / "real"
    repo = add_repo(real, "acme/cached", {"config.json": b"{}"})
    given = environ | {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_CACHE": str(real),
        "HUGGINGFACE_HUB_CACHE": "/older",
        "TRANSFORMERS_CACHE": "/older/still",
        "PYTORCH_TRANSFORMERS_CACHE": "/oldest",
        "PYTORCH_PRETRAINED_BERT_CACHE": "/oldest",
        "LLAMA_CACHE": "/llama",
        "HF_HUB_DISABLE_SHARED_BLOBS": "0",
    }
    found = environment_of_a_program(given)
    hub = found["HF_HUB_CACHE"]
    other = {"TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE", "LLAMA_CACHE"}
    assert found == {name: value for name, value in given.items() if name not in other} | {
        "HF_HUB_CACHE": hub,
        "HUGGINGFACE_HUB_CACHE": hub,
        "HF_HUB_DISABLE_SHARED_BLOBS": "1",
    }
    assert where_models_lead(given) == {"models--acme--cached": str((repo / "config.json").resolve())}


# Model paths ---------------------------------------------------------------------------------------------------


def drive(tmp_path: Path, name: str) -> Path:
    """A folder of models with acme/shared and one of its own."""
    for model_id in ("acme/shared", f"acme/{name}"):
        make_model(tmp_path / name / model_id, f"{model_id} on {name}")
    return tmp_path / name


def test_start_up_says_which_paths_are_used(environ: dict[str, str], sessions: Path, tmp_path: Path) -> None:
    """On stderr, before the program says anything."""
    one, two = drive(tmp_path, "one"), drive(tmp_path, "two")
    program = ["--", "sh", "-c", "echo out; echo err >&2"]
    done = succeed([OVERLAY, "run", "--model-path", str(one), "--model-path", str(two), *program], environ)
    assert (done.out, done.err) == ("out\n", f"hf-overlay: model paths: {one}, {two}\nerr\n")
    done = succeed([OVERLAY, "run", *program], environ)
    assert (done.out, done.err) == ("out\n", "hf-overlay: using HuggingFace cache only\nerr\n")


def test_quiet_says_nothing(environ: dict[str, str], sessions: Path, tmp_path: Path) -> None:
    done = succeed([OVERLAY, "run", "--quiet", "--model-path", str(tmp_path / "away"), "--", "echo", "out"], environ)
    assert (done.out, done.err) == ("out\n", "")


def test_the_first_model_path_wins_and_all_count(environ: dict[str, str], sessions: Path, tmp_path: Path) -> None:
    """P11, on the command line and in MLX_OMNI_MODEL_PATH alike."""
    one, two = drive(tmp_path, "one"), drive(tmp_path, "two")
    expected = {
        "models--acme--shared": str(two / "acme/shared/config.json"),
        "models--acme--one": str(one / "acme/one/config.json"),
        "models--acme--two": str(two / "acme/two/config.json"),
    }
    assert where_models_lead(environ, "--model-path", str(two), "--model-path", str(one)) == expected
    variable = {"MLX_OMNI_MODEL_PATH": f"{two}{os.pathsep}{one}"}
    assert where_models_lead(environ | variable) == expected


def test_the_command_line_beats_the_variable(environ: dict[str, str], sessions: Path, tmp_path: Path) -> None:
    """P11: with --model-path, MLX_OMNI_MODEL_PATH does not count at all."""
    one, two = drive(tmp_path, "one"), drive(tmp_path, "two")
    found = where_models_lead(environ | {"MLX_OMNI_MODEL_PATH": str(one)}, "--model-path", str(two))
    assert found.keys() == {"models--acme--shared", "models--acme--two"}
    assert found["models--acme--shared"] == str(two / "acme/shared/config.json")


def test_the_configuration_file_says_once_for_all_what_flags_would_say(
    environ: dict[str, str], sessions: Path, tmp_path: Path, home: Path
) -> None:
    for place in ("first/org/m", "second/org/m", "second/org/n", "else/where"):
        lay_model(tmp_path / place)
    add_repo(tmp_path / "tier", "org/behind", FILES)
    file = home / ".config/hf-overlay/config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(
        f'model_path = ["{tmp_path}/first", "{tmp_path}/second"]\nbelow = ["{tmp_path}/tier"]\nexclude = ["org/n"]\n'
        f'[map]\n"org/mapped" = "{tmp_path}/else/where"\n'
    )
    found = where_models_lead(environ)
    assert found.keys() == {repo_folder(each) for each in ("org/m", "org/behind", "org/mapped")}
    assert found[repo_folder("org/m")] == f"{tmp_path}/first/org/m/config.json"
    assert found[repo_folder("org/mapped")] == f"{tmp_path}/else/where/config.json"
    by_flag = where_models_lead(environ, "--model-path", f"{tmp_path}/second", "--exclude", "org/none")
    assert by_flag[repo_folder("org/m")] == f"{tmp_path}/second/org/m/config.json"
    assert repo_folder("org/n") in by_flag


def test_relative_paths_and_tildes_are_resolved(
    environ: dict[str, str], home: Path, sessions: Path, tmp_path: Path
) -> None:
    one = drive(tmp_path, "one")
    two = drive(home, "two")
    found = where_models_lead(environ, "--model-path", "one/../one", "--model-path", "~/two", cwd=tmp_path)
    assert found["models--acme--shared"] == str(one / "acme/shared/config.json")
    assert found["models--acme--two"] == str(two / "acme/two/config.json")


def test_a_missing_model_path_is_one_warning(environ: dict[str, str], hub: Path, sessions: Path, home: Path) -> None:
    """P7: the program runs, with the Hugging Face cache."""
    add_repo(hub, "acme/cached", {"config.json": b"{}"})
    away = home / "away"
    done = succeed(
        [OVERLAY, "run", "--model-path", str(away), "--", "sh", "-c", 'ls "$HF_HUB_CACHE"'],
        environ,
    )
    assert done.out == repo_folder("acme/cached") + "\n"
    assert done.err.splitlines() == [
        f"hf-overlay: model paths: {away}",
        f"hf-overlay: warning: model path {away} does not exist; going on with the Hugging Face cache",
    ]


def test_a_missing_model_path_does_not_hide_the_others(environ: dict[str, str], sessions: Path, tmp_path: Path) -> None:
    """P7: a source that is away hides only its own models."""
    one = drive(tmp_path, "one")
    found = where_models_lead(environ, "--model-path", str(tmp_path / "away"), "--model-path", str(one))
    assert found.keys() == {"models--acme--shared", "models--acme--one"}


def test_a_model_path_that_is_a_file_is_refused(environ: dict[str, str], home: Path, sessions: Path) -> None:
    """P12: exit 2 and one clear line; the program does not start."""
    file = home / "model.gguf"
    file.write_bytes(b"GGUF")
    for options, variable in ((["--model-path", str(file)], {}), ([], {"MLX_OMNI_MODEL_PATH": str(file)})):
        done = finish([OVERLAY, "run", *options, "--", "echo", "started"], environ | variable)
        assert (done.status, done.out) == (2, "")
        assert done.err == (
            f"hf-overlay: error: model path {file} is a file; give the folder that holds your models\n"
        ), "one line, no traceback"
    assert not sessions.exists()


# Signals -------------------------------------------------------------------------------------------------------


def takes_signals(*, interrupts: bool = False) -> list[str]:
    return [PYTHON, "-c", TAKES_SIGNALS.replace("EXPECT_INTERRUPTS", str(interrupts))]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_hf_overlay_reaches_the_program(environ: dict[str, str], sessions: Path, name: str) -> None:
    """The program decides what to do about it, and its exit status comes back."""
    number = signal.Signals[name]
    with start([*RUN, "--", *takes_signals()], environ) as process:
        assert read_line(process.stdout) == "ready False"
        process.send_signal(number)
        assert read_line(process.stdout) == f"0 interrupts, then {name}"
        assert process.wait(SECONDS) == 40 + number


def test_a_signal_that_comes_while_the_program_is_started_is_not_lost(environ: dict[str, str], sessions: Path) -> None:
    """Else `hf-overlay` told to end goes on until its program ends by itself."""
    started_in_between = """
import os, signal, sys
start = os.posix_spawnp
def start_after_a_signal(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return start(*arguments, **options)
os.posix_spawnp = start_after_a_signal
from hf_overlay.command.cli import main
sys.exit(main())
"""
    done = finish([PYTHON, "-c", started_in_between, *RUN[1:], "--", "sleep", "5"], environ)
    assert done.status == 128 + signal.SIGTERM


@contextmanager
def on_terminal(
    environ: Mapping[str, str], *command: str, run: Sequence[str] = RUN
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`hf-overlay run` in the foreground of a terminal; gives the end of it that a person sits at."""
    person, terminal = pty.openpty()
    try:
        with start([*run, "--", *command], environ, terminal=terminal) as process:
            yield process, person
    finally:
        os.close(terminal)
        os.close(person)


def test_ctrl_c_reaches_the_program_exactly_once(environ: dict[str, str], sessions: Path) -> None:
    """The terminal tells the program itself; passed on it would be a second Ctrl-C, which ends many for good."""
    with on_terminal(environ, *takes_signals(interrupts=True)) as (process, person):
        assert read_line(person) == "ready True"
        os.write(person, b"\x03")
        assert read_line(person) == "^Cinterrupted"
        # comes after whatever hf-overlay made of the Ctrl-C
        process.send_signal(signal.SIGUSR1)
        assert read_line(person) == "1 interrupts, then SIGUSR1"
        assert process.wait(SECONDS) == 40 + signal.SIGUSR1


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="Python cannot tell there who sent a signal")
def test_an_interrupt_sent_to_hf_overlay_on_a_terminal_reaches_the_program(
    environ: dict[str, str], sessions: Path
) -> None:
    """A script that ends what it started with SIGINT runs in somebody's terminal, too."""
    with on_terminal(environ, *takes_signals(interrupts=True)) as (process, person):
        assert read_line(person) == "ready True"
        process.send_signal(signal.SIGINT)
        assert read_line(person) == "interrupted"  # of two signals at once, either may be the first
        process.send_signal(signal.SIGUSR1)
        assert read_line(person) == "1 interrupts, then SIGUSR1"
        assert process.wait(SECONDS) == 40 + signal.SIGUSR1


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="Python cannot tell there who sent a signal")
def test_an_interrupt_that_is_sent_just_after_the_start_reaches_the_program(
    environ: dict[str, str], sessions: Path
) -> None:
    """On a terminal, too, where it must not be taken for a key press, of which the terminal tells the program."""
    interrupted_before_waiting = """
import os, signal, sys
from hf_overlay.command import cli, run
wait = run._wait
def wait_after_a_signal(child):
    os.kill(os.getpid(), signal.SIGINT)
    return wait(child)
run._wait = wait_after_a_signal
sys.exit(cli.main())
"""
    run = (PYTHON, "-c", interrupted_before_waiting, *RUN[1:])
    with on_terminal(environ, "sleep", "60", run=run) as (process, _):
        assert process.wait(SECONDS / 4) == 128 + signal.SIGINT


@pytest.mark.parametrize("command", [["run", "--", "true"], ["serve"]])
def test_garbage_is_collected_again_once_the_overlay_is_open(
    environ: dict[str, str], sessions: Path, command: list[str]
) -> None:
    """At the start it is left, which saves milliseconds; from then on it may be for months."""
    tells = """
import gc, os, signal, sys
from hf_overlay import session
from hf_overlay.command import cli, run
def told(function, then=None):
    def tell(*arguments, **options):
        print(function.__name__, gc.isenabled())
        if then:
            os.kill(os.getpid(), then)
        return function(*arguments, **options)
    return tell
session.Session.__init__ = told(session.Session.__init__)
session.Session.offer = told(session.Session.offer, signal.SIGTERM)
run._wait = told(run._wait)
sys.exit(cli.main())
"""
    done = finish([PYTHON, "-c", tells, *command], environ)
    assert (done.status, done.lines()) == (0, ["__init__ False", f"{'_wait' if 'run' in command else 'offer'} True"])


# As on macOS: nothing tells who sent a signal.
WITHOUT_SIGWAITINFO = """
import signal, sys
for name in ("sigwaitinfo", "sigtimedwait"):
    if hasattr(signal, name):
        delattr(signal, name)
from hf_overlay.command.cli import main
sys.exit(main())
"""


def test_a_second_interrupt_reaches_the_program_where_nothing_tells_who_sent_it(
    environ: dict[str, str], sessions: Path
) -> None:
    """A supervisor in the foreground of a terminal (a script, make) sends it to hf-overlay alone."""
    run = (PYTHON, "-c", WITHOUT_SIGWAITINFO, *RUN[1:])
    with on_terminal(environ, *takes_signals(interrupts=True), run=run) as (process, person):
        assert read_line(person) == "ready True"
        sent = 0
        while not select.select([person], [], [], 0.3)[0] and sent < 100:  # two that come at once are one
            process.send_signal(signal.SIGINT)
            sent += 1
        assert read_line(person) == "interrupted"
        assert sent > 1, "the first one was taken for a key press"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(SECONDS) == 40 + signal.SIGUSR1


def test_ctrl_c_reaches_the_program_exactly_once_where_nothing_tells_who_sent_it(
    environ: dict[str, str], sessions: Path
) -> None:
    run = (PYTHON, "-c", WITHOUT_SIGWAITINFO, *RUN[1:])
    with on_terminal(environ, *takes_signals(interrupts=True), run=run) as (process, person):
        assert read_line(person) == "ready True"
        os.write(person, b"\x03")
        assert read_line(person) == "^Cinterrupted"
        process.send_signal(signal.SIGUSR1)
        assert read_line(person) == "1 interrupts, then SIGUSR1"
        assert process.wait(SECONDS) == 40 + signal.SIGUSR1


@pytest.mark.parametrize(("trap", "status"), [("", 128 + signal.SIGINT), ("trap '' INT; ", 0)])
def test_an_interrupt_while_the_overlay_is_made_ends_it_unless_the_shell_ignores_it(
    environ: dict[str, str], sessions: Path, trap: str, status: int
) -> None:
    interrupted_early = """
import os, signal, sys
from hf_overlay.command.cli import main
from hf_overlay.tree import clear
clear_dead = clear.clear_dead
def clear_after_a_signal(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return clear_dead(*arguments)
clear.clear_dead = clear_after_a_signal
sys.exit(main())
"""
    shell = ["sh", "-c", f'{trap}exec "$@"', "sh"]
    done = finish([*shell, PYTHON, "-c", interrupted_early, *RUN[1:], "--", "echo", "started"], environ)
    assert (done.status, done.out) == (status, "" if status else "started\n")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="elsewhere no signal is blocked")
def test_the_program_starts_with_the_signals_of_its_own(environ: dict[str, str], sessions: Path) -> None:
    """None of those that hf-overlay blocks while it waits, and none of those that Python ignores."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc")

    def signals(*run: str) -> list[int]:
        lines = succeed([*run, "grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"], environ).lines()
        return [int(line.split()[1], 16) & 0x7FFFFFFF for line in lines]  # the C library has the two above for itself

    assert signals(*RUN, "--") == signals() == [0, 0]


# Sessions ------------------------------------------------------------------------------------------------------


def test_the_session_is_private_and_gone_at_the_end(
    environ: dict[str, str], sessions: Path, models: Path, hub: Path
) -> None:
    """0700 whatever the umask, on the folder of all sessions too."""
    make_model(models / "acme/tiny", "tiny")
    add_repo(hub, "acme/cached", {"config.json": b"{}"}, locks=True)
    with start([*RUN, "--model-path", str(models), "--", *WAITS], environ, umask=0) as process:
        session = session_of(read_line(process.stdout))
        assert session.parent == sessions
        assert [stat.S_IMODE(path.stat().st_mode) for path in (session, sessions)] == [0o700, 0o700]
        assert os.listdir(session / "home/hub/models--acme--tiny/snapshots")
        process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert not list(sessions.glob("session-*")), "the session outlived its program"


@pytest.mark.parametrize("command", [["sh", "-c", "kill -9 $$"], ["no-such-command"], ["false"]])
def test_the_session_is_gone_however_the_program_ends(
    environ: dict[str, str], sessions: Path, command: list[str]
) -> None:
    assert finish([*RUN, "--", *command], environ).status != 0
    assert not list(sessions.glob("session-*"))


def start_something_else(environ: Mapping[str, str]) -> None:
    succeed([*RUN, "--", "true"], environ)


def test_a_program_keeps_its_overlay_when_hf_overlay_is_killed(
    environ: dict[str, str], sessions: Path, models: Path
) -> None:
    """P3: kill -9 leaves the tree to the living program; once that has ended, the next start of anything clears it."""
    make_model(models / "acme/tiny", "tiny")
    program = ["sh", "-c", 'echo "$HF_HUB_CACHE"; read line; cat "$HF_HUB_CACHE"/*/refs/main; echo; cat']
    with start([*RUN, "--model-path", str(models), "--", *program], environ) as process:
        session = session_of(read_line(process.stdout))
        process.kill()
        assert process.wait(SECONDS) == -signal.SIGKILL
        start_something_else(environ)
        succeed([OVERLAY, "clean"], environ)
        assert session.exists(), "a tree was taken away from a living program"
        assert process.stdin is not None
        process.stdin.write(b"read on\n")
        assert len(read_line(process.stdout)) == 40, "the program could not read its models any more"
        process.stdin.close()
        assert read_line(process.stdout) == ""

    def is_cleared() -> bool:  # the program's stdout is closed just before its hold on the session
        start_something_else(environ)
        return not session.exists()

    eventually(is_cleared, "the next start clears the session of a dead program")


def test_what_a_program_leaves_running_keeps_the_overlay(environ: dict[str, str], sessions: Path) -> None:
    """A server that a script puts into the background, say."""
    program = ["sh", "-c", 'exec 3<&0; cat <&3 >/dev/null 2>&1 & echo "$HF_HUB_CACHE"; exit 5']
    with start([OVERLAY, "run", "--", *program], environ, stderr=subprocess.PIPE) as process:
        session = session_of(read_line(process.stdout))
        assert process.wait(SECONDS) == 5, "hf-overlay waits for its program, not for what that leaves behind"
        assert read_line(process.stderr) == "hf-overlay: using HuggingFace cache only"
        assert read_line(process.stderr) == (
            f"hf-overlay: a program still uses the overlay at {session}; it is cleared at a later start"
        )
        start_something_else(environ)
        assert session.exists(), "a tree was taken away from a living program"
        assert process.stdin is not None
        process.stdin.close()

        def is_cleared() -> bool:
            start_something_else(environ)
            return not session.exists()

        eventually(is_cleared, "the next start clears the session of a dead program")


def test_any_number_of_sessions_at_once(environ: dict[str, str], sessions: Path, models: Path) -> None:
    """P10: each program has a tree of its own, whole, until it ends; no end takes another's."""
    make_model(models / "acme/tiny", "tiny")
    with ExitStack() as stack:
        running = [
            stack.enter_context(start([*RUN, "--model-path", str(models), "--", *WAITS], environ)) for _ in range(8)
        ]
        hubs = [Path(read_line(process.stdout)) for process in running]
        assert len(set(hubs)) == len(running)
        for number, process in enumerate(running):
            assert all((hub / "models--acme--tiny/refs/main").exists() for hub in hubs[number:])
            process.communicate(timeout=SECONDS)
            assert process.returncode == 0
            assert not hubs[number].exists()
