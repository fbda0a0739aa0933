"""`mlx-omni-server launch AGENT`: starts a coding agent that uses a model of this machine.

It starts a server unless one runs, chooses a model that is suited, and gives the agent what it needs in its own
environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hf_overlay import OverlayError

from mlx_overlay_server.command import started
from mlx_overlay_server.command.agents import AGENTS, Agent, Endpoint, environment
from mlx_overlay_server.command.client import Client, client, running
from mlx_overlay_server.command.output import say
from mlx_overlay_server.names import resolved

_SUGGESTED = (
    (20e9, "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit"),
    (6e9, "mlx-community/Qwen3-8B-4bit"),
    (0, "mlx-community/Qwen3-4B-Instruct-2507-4bit"),
)
"""Models that call tools well, by the bytes of memory that their weights take, largest first."""
_UNKNOWN_CONTEXT = 32_000
"""The context that is assumed for a model which the user has named, where nobody knows it."""


class Candidate(NamedTuple):
    """A model of the server, with what an agent needs to know about it."""

    id: str
    context: int | None
    nbytes: int
    is_resident: bool
    is_default: bool
    calls_tools: bool

    def why_not(self, agent: Agent) -> str | None:
        """Return why an agent cannot use the model; None when it can."""
        if not self.calls_tools:
            return "its chat template has no tools"
        if self.context is None:
            return "nobody knows its context"
        if self.context < agent.context:
            return f"its context is {self.context} tokens"
        return None


def launch(options: argparse.Namespace) -> int:
    """Start an agent, and return its exit status."""
    agent = AGENTS[options.agent]
    program = shutil.which(agent.program)
    if program is None:
        raise OverlayError(f"{agent.program} is not in PATH; install it: {agent.install}")
    with ExitStack() as held:
        server = _server(options, held)
        model = _model(server, agent, options.model)
        at = Endpoint(server.url, server.api_key or "none", model.id, model.context or _UNKNOWN_CONTEXT)
        say(f"{agent.program} uses {at.model} at {at.url}, with a context of {at.context} tokens")
        start = agent.start(at)
        environ = environment(start, os.environ)
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mlx-omni-")))
        for variable, text in start.files.items():
            environ[variable] = str(folder / f"{variable.lower()}.json")
            Path(environ[variable]).write_text(text, "utf-8")
        return _run([program, *start.arguments, *options.more], environ)


def _server(options: argparse.Namespace, held: ExitStack) -> Client:
    if options.url is not None or running():
        return client(options)
    say("no server runs here: one is started, and ends with the agent")
    return held.enter_context(started.server(options))


def _run(command: list[str], environ: dict[str, str]) -> int:
    """Run a program in the foreground. Signals are left to it."""
    # a handler that does nothing; the program would inherit SIG_IGN
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        process = subprocess.Popen(command, env=environ)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # SIGTERM, to end the command, ends the agent
            process.terminate()
            status = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


def _model(server: Client, agent: Agent, wanted: str | None) -> Candidate:
    """Return the model for an agent: the wanted one, or the best that is suited. Raises OverlayError."""
    entries = server.get("/manage/v1/models")["models"]
    found = [_candidate(each) for each in entries if each["state"] != "away" and each["kind"] == "text"]
    if wanted is not None:
        names = {each.id: each for each in found}
        aliases = {each["id"] for each in server.get("/v1/models")["data"]} - names.keys()
        name = resolved(wanted, [*names, *aliases], where=f"at {server.url}")
        if name in names:
            model = names[name]
        else:  # an alias or a profile
            listed = server.get(f"/v1/models/{name}")
            model = Candidate(name, listed.get("max_model_len"), 0, False, False, calls_tools=True)
        if (why := model.why_not(agent)) is not None:
            say(f"warning: {name} may be of little use to {agent.program}: {why}")
        return model
    able = [each for each in found if each.why_not(agent) is None]
    if not able:
        raise OverlayError(f"{_none(found, agent)}; get one: mlx-omni-server pull {_suggestion(server)}")
    return max(able, key=lambda each: (each.is_default, each.is_resident, each.nbytes, each.id))


def _none(found: list[Candidate], agent: Agent) -> str:
    needs = f"{agent.program} needs a model that calls tools, with a context of {agent.context} tokens or more"
    if not found:
        return f"{needs}, and there is no model"
    reasons = ", ".join(f"{each.id} ({each.why_not(agent)})" for each in found[:4])
    return f"{needs}; none is here: {reasons}"


def _suggestion(server: Client) -> str:
    """Return a model that fits into the server's memory."""
    uses = server.get("/manage/v1/status")["memory"]["uses"]
    room = next((each["limit"] for each in uses if each["use"] == "weights"), None) or 0
    return next(id_ for least, id_ in _SUGGESTED if room >= least)


def _candidate(entry: dict[str, Any]) -> Candidate:
    return Candidate(
        entry["id"],
        entry["usable_context"],
        entry["bytes"],
        is_resident=entry["state"] == "resident",
        is_default=entry["default"],
        calls_tools=_calls_tools(Path(entry["source"]["path"])),
    )


def _calls_tools(folder: Path) -> bool:
    """Return whether a model's chat template has a place for tools; True where its folder is not on this machine."""
    if not folder.is_dir():
        return True
    with suppress(OSError, ValueError):
        return "tools" in (folder / "chat_template.jinja").read_text("utf-8")
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        return "tools" in json.dumps(config.get("chat_template"))
    return False
