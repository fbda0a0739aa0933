"""Client libraries that people use hold conversations with a real server, each by a suite of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import clients
from tests.support.models import make_model
from tests.support.server import Server, serving


def _call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("clients")
    models = top / "models" / "acme"
    make_model(models / "hello", "Hello there, general Kenobi.")
    make_model(models / "joke", json.dumps({"setup": "Why?", "punchline": "So."}))
    # What is not fixed by a schema is this text, which has what LangChain looks for, or the shortest there is.
    make_model(models / "obliging", "你好 こ.", calls_tools=True, closes=True, after_tool="It is so.")
    make_model(models / "noargs", _call("magic_function_no_args"), calls_tools=True, after_tool="It is 5.")
    weather = _call("get_weather", location="San Francisco, CA")
    make_model(models / "weather", weather, calls_tools=True, after_tool="It is sunny.")
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["ChatCompletions", "Responses", "Messages"])
def test_langchain_s_standard_tests_pass(dialect: str, server: Server, tmp_path: Path) -> None:
    done = clients.run("langchain", server, tmp_path / "home", tests=f"Test{dialect}")
    assert done.status == 0, f"{done.out}{done.err}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pydantic-ai", "instructor", "litellm", "llama-index"])
def test_a_client_library_gets_what_it_asks_for(name: str, server: Server, tmp_path: Path) -> None:
    done = clients.run(name, server, tmp_path / "home")
    assert done.status == 0, f"{done.out}{done.err}"
