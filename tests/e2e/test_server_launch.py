"""`launch`: an agent is started with all it needs, on a server that runs or on one of its own; no file is changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.agents import program
from tests.support.hfcache import Entry, listing
from tests.support.models import make_model
from tests.support.processes import BIN, SECONDS, Finished, due, environment, finish
from tests.support.server import serving

HELLO = "Hello, I am here."
FAKE = """#!/bin/sh
printf '%s\\n' "$ANTHROPIC_BASE_URL" "$ANTHROPIC_MODEL" "$@"
exit 7
"""


@pytest.fixture
def able(models: Path) -> Path:
    """A model that an agent can use, beside one whose context is too small, and one without tools."""
    make_model(models / "acme" / "small", "No.", calls_tools=True, context=4096, is_brief=True)
    make_model(models / "acme" / "mute", "No.", context=200_000, is_brief=True)
    return make_model(models / "acme" / "hello", HELLO, calls_tools=True, context=200_000, is_brief=True)


def _launch(home: Path, models: Path, *arguments: str, path: str = "") -> Finished:
    environ = environment(home, HF_OVERLAY_DIR=str(home / "sessions"), MLX_OMNI_MODEL_PATH=str(models))
    environ["PATH"] = f"{path}{os.pathsep}{environ['PATH']}"
    return finish([str(BIN / "mlx-omni-server"), "launch", *arguments], environ, cwd=home, seconds=due(SECONDS))


def _fake(folder: Path, name: str) -> str:
    """A folder for PATH with a program that is no agent: it says what it was given."""
    folder.mkdir()
    (folder / name).write_text(FAKE)
    (folder / name).chmod(0o755)
    return str(folder)


def _users_files(home: Path) -> dict[str, object]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in home.rglob("*") if path.is_file()}


def _users(home: Path) -> dict[str, Entry]:
    """All that is in a home, but for what the server itself keeps: its sessions, and its caches."""
    found = listing(home)
    return {name: entry for name, entry in found.items() if name.partition("/")[0] not in (".", "sessions", ".cache")}


def _lay_settings(home: Path) -> None:
    """The files that agents have in a home."""
    for name, text in {
        ".claude/settings.json": "{}",
        ".codex/config.toml": 'model = "gpt-5"\n',
        ".config/opencode/opencode.json": "{}",
        ".aider.conf.yml": "dark-mode: true\n",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)


def test_a_server_is_started_for_the_agent_and_no_file_of_the_users_is_changed(
    home: Path, models: Path, able: Path, tmp_path: Path
) -> None:
    _lay_settings(home)
    sessions = home / "sessions"
    sessions.mkdir(mode=0o700)
    before = _users(home)
    done = _launch(home, models, "claude", "--", "-p", "a b", "--model", path=_fake(tmp_path / "bin", "claude"))
    assert done.status == 7, "the agent's own exit status"
    url, model, *arguments = done.lines()
    assert url.startswith("http://127.0.0.1:")
    assert (model, arguments) == ("acme/hello", ["-p", "a b", "--model"])
    assert "with a context of 200000 tokens" in done.err
    assert not list(sessions.glob("session-*")), "its server has ended"
    assert _users(home) == before


def test_a_running_server_is_used_a_model_may_be_named_and_what_is_missing_is_said(
    home: Path, models: Path, able: Path, tmp_path: Path
) -> None:
    path = _fake(tmp_path / "bin", "claude")
    with serving(home, models, options=["--offline", "--alias", "gpt-5=acme/hello"]) as server:
        assert _launch(home, models, "claude", path=path).lines()[:2] == [server.url, "acme/hello"]
        assert _launch(home, models, "claude", "--model", "gpt-5", path=path).lines()[1] == "gpt-5"
        small = _launch(home, models, "claude", "--model", "smal", path=path)
        assert small.lines()[1] == "acme/small"
        assert "may be of little use to claude: its context is 4096 tokens" in small.err
        shutil.rmtree(able)
        done = _launch(home, models, "claude", path=path)
    assert (done.status, done.out) == (1, "")
    assert "acme/small (its context is 4096 tokens)" in done.err
    assert "acme/mute (its chat template has no tools)" in done.err
    assert "mlx-omni-server pull " in done.err
    done = _launch(home, models, "aider")
    assert (done.status, done.out) == (1, "")
    assert "aider is not in PATH; install it: " in done.err


@pytest.mark.parametrize(
    ("agent", "arguments"),
    [("claude", ["-p", "Who is there?"]), ("codex", ["exec", "--skip-git-repo-check", "Who is there?"])],
)
def test_the_real_agents_answer_and_leave_the_users_settings_alone(
    home: Path, models: Path, able: Path, agent: str, arguments: list[str]
) -> None:
    path = str(Path(program(agent)).parent)
    _lay_settings(home)
    before = _users_files(home)
    done = _launch(home, models, agent, "--", *arguments, path=path)
    assert done.status == 0, done.err
    assert done.lines()[-1] == HELLO
    after = _users_files(home)
    assert {name: after[name] for name in before} == before
