"""A server for tests of the Responses API, and its official client."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.e2e.responses.asking import HELLO, SUNNY
from tests.support.models import make_model, make_random_model
from tests.support.server import Server, serving


def _call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("responses")
    folder = top / "models" / "acme"
    make_model(folder / "plain", HELLO)
    make_model(folder / "once", HELLO)
    make_model(folder / "thinks", "<think>Hm. Well.</think>Yes, of course.", thinks=True)
    make_model(folder / "calls", f"Let me see. {_call('weather', city='Oslo')}", calls_tools=True, after_tool=SUNNY)
    both = f"<think>Hm.</think>Both. {_call('weather', city='Oslo')}{_call('weather', city='Rome')}"
    make_model(folder / "both", both, calls_tools=True, thinks=True)
    make_model(folder / "applies", _call("apply", input="*** Begin é\n"), calls_tools=True, after_tool=SUNNY)
    make_model(folder / "apart", _call("sky__weather", city="Rome"), calls_tools=True)
    make_random_model(folder / "random")
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="package")
def sdk(server: Server) -> OpenAI:
    return server.openai
