"""Coding agents as a person runs them at a shell, each pointed at a server: those that `make test` set up."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import environment, finish
from tests.support.server import Server

_PROGRAMS = Path(sys.prefix, "agents", "node_modules", ".bin")
Events = list[dict[str, Any]]


def program(name: str) -> str:
    """Where an agent is; the test is skipped where it is not."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed, which coding agents need")
    path = _PROGRAMS / name
    if not path.exists():
        pytest.skip(
            f"{name} is not in {_PROGRAMS}, where `make test` puts some agents, and `npm install --prefix` others"
        )
    return str(path)


def _run(command: Sequence[str], home: Path, **environ: str) -> Events:
    """What an agent that works in `home` writes to its stdout: lines of JSON. It must exit 0."""
    home.mkdir(parents=True, exist_ok=True)
    done = finish(command, environment(home, **environ), cwd=home)
    assert done.status == 0, f"{command[0]} exited {done.status}: {done.out}{done.err}"
    return [json.loads(line) for line in done.lines() if line.startswith("{")]


def claude(server: Server, model: str, prompt: str, home: Path) -> Events:
    """One run of Claude Code, which may read files."""
    command = [program("claude"), "-p", prompt, "--allowedTools", "Read", "--output-format", "stream-json"]
    return _run(
        [*command, "--verbose"],
        home,
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_AUTH_TOKEN=server.api_key,
        ANTHROPIC_MODEL=model,
        ANTHROPIC_DEFAULT_HAIKU_MODEL=model,
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
        DISABLE_TELEMETRY="1",
        DISABLE_AUTOUPDATER="1",
    )


def codex(server: Server, model: str, prompt: str, home: Path) -> Events:
    """One run of Codex. Its own sandbox is not what is tested, and not every kernel has what it needs."""
    command = [program("codex"), "exec", "--json", "--skip-git-repo-check", "--sandbox", "danger-full-access"]
    provider = ["--oss", "--local-provider", "lmstudio", "--model", model]
    return _run([*command, *provider, prompt], home, CODEX_OSS_BASE_URL=f"{server.url}/v1")


def opencode(server: Server, model: str, prompt: str, home: Path) -> Events:
    """One run of opencode, whose small model for titles is the same."""
    path = program("opencode")
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{server.url}/v1", "apiKey": server.api_key},
        "models": {model: {}},
    }
    config = {"autoupdate": False, "share": "disabled", "provider": {"here": provider}}
    home.mkdir(parents=True, exist_ok=True)
    names = {"model": f"here/{model}", "small_model": f"here/{model}"}
    (home / "opencode.json").write_text(json.dumps({**config, **names}), "utf-8")
    return _run(
        [path, "run", "--format", "json", prompt],
        home,
        OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1",
        OPENCODE_DISABLE_MODELS_FETCH="1",
    )
