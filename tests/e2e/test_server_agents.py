"""Coding agents, as they come from npm, talk to a real server and run the tools that its models call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.agents import Events, claude, codex, opencode
from tests.support.models import make_model
from tests.support.server import Server, serving

HELLO = "Hello, I am here."
SAYS = "The note says forty-two."
NOTE = "The answer is 7431."


@pytest.fixture(scope="module")
def note(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that nobody but a tool reads."""
    path = tmp_path_factory.mktemp("notes") / "note.txt"
    path.write_text(NOTE, "utf-8")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, note: Path) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("agents")
    models = top / "models" / "acme"
    make_model(models / "hello", HELLO, calls_tools=True, context=200_000, is_brief=True)
    _make_caller(models / "claude", "Read", file_path=str(note))
    _make_caller(models / "codex", "exec_command", cmd=f"cat {note}")
    _make_caller(models / "opencode", "read", filePath=str(note))
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


def _make_caller(folder: Path, tool: str, **arguments: str) -> None:
    """A model that calls a tool of an agent's, and then has something to say."""
    call = json.dumps({"name": tool, "arguments": arguments})
    make_model(
        folder,
        f"I will read it. <tool_call>{call}</tool_call>",
        calls_tools=True,
        after_tool=SAYS,
        context=200_000,
        is_brief=True,
    )


def _claude_blocks(events: Events) -> list[dict[str, Any]]:
    """What was said in turn, by the model and by tools."""
    messages = [event["message"] for event in events if event["type"] in ("assistant", "user")]
    return [block for message in messages for block in message["content"]]


def test_claude_code_has_a_conversation_and_another_session_finds_its_system_prompt_read(
    server: Server, tmp_path: Path
) -> None:
    events = claude(server, "acme/hello", "Who is there?", tmp_path / "first")
    assert [block["text"] for block in _claude_blocks(events)] == [HELLO]
    result = events[-1]
    assert (result["type"], result["is_error"], result["result"], result["num_turns"]) == ("result", False, HELLO, 1)
    usage = claude(server, "acme/hello", "Something else altogether.", tmp_path / "second")[-1]["usage"]
    assert usage["cache_read_input_tokens"] > usage["input_tokens"] > 0


def test_claude_code_runs_a_tool_and_goes_on_with_its_result(server: Server, note: Path, tmp_path: Path) -> None:
    events = claude(server, "acme/claude", "What does the note say?", tmp_path)
    text, use, result, said = _claude_blocks(events)
    assert text == {"type": "text", "text": "I will read it. "}
    assert (use["type"], use["name"], use["input"]) == ("tool_use", "Read", {"file_path": str(note)})
    assert (result["type"], result["tool_use_id"]) == ("tool_result", use["id"])
    assert NOTE in result["content"]
    assert said == {"type": "text", "text": SAYS}
    assert (events[-1]["is_error"], events[-1]["result"], events[-1]["num_turns"]) == (False, SAYS, 2)


def _codex_items(events: Events) -> list[dict[str, Any]]:
    """What was said and done; not what Codex remarks about a model that it does not know."""
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item for item in items if item["type"] != "error"]


def test_codex_has_a_conversation(server: Server, tmp_path: Path) -> None:
    events = codex(server, "acme/hello", "Who is there?", tmp_path)
    assert [(item["type"], item["text"]) for item in _codex_items(events)] == [("agent_message", HELLO)]
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["output_tokens"] == 4


def test_codex_runs_a_tool_and_goes_on_with_its_result(server: Server, note: Path, tmp_path: Path) -> None:
    events = codex(server, "acme/codex", "What does the note say?", tmp_path)
    text, command, said = _codex_items(events)
    assert (text["type"], text["text"]) == ("agent_message", "I will read it. ")
    assert (command["type"], command["exit_code"], command["status"]) == ("command_execution", 0, "completed")
    assert f"cat {note}" in command["command"]
    assert command["aggregated_output"] == NOTE
    assert (said["type"], said["text"]) == ("agent_message", SAYS)
    assert events[-1]["type"] == "turn.completed"
    assert events[-1]["usage"]["cached_input_tokens"] > 0


def _opencode_parts(events: Events) -> list[dict[str, Any]]:
    return [event["part"] for event in events if event["type"] in ("text", "tool_use")]


def test_opencode_has_a_conversation(server: Server, tmp_path: Path) -> None:
    events = opencode(server, "acme/hello", "Who is there?", tmp_path)
    assert [part["text"] for part in _opencode_parts(events)] == [HELLO]


def test_opencode_runs_a_tool_and_goes_on_with_its_result(server: Server, note: Path, tmp_path: Path) -> None:
    events = opencode(server, "acme/opencode", "What does the note say?", note.parent)  # it asks before it leaves that
    text, tool, said = _opencode_parts(events)
    assert (text["text"], said["text"]) == ("I will read it. ", SAYS)
    assert (tool["tool"], tool["state"]["status"]) == ("read", "completed")
    assert NOTE in tool["state"]["output"]
