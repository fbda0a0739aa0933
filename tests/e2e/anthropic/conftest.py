"""A server for tests of the Messages API, with models of every kind that they ask, and its official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from anthropic import Anthropic

from tests.e2e.anthropic.asking import COUNTS, HELLO, SUNNY
from tests.support.dialects import anthropic_sdk
from tests.support.models import make_model, make_random_model
from tests.support.server import Server, serving


def _call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("models")
    folder = top / "acme"
    make_model(folder / "plain", HELLO)
    make_model(folder / "once", HELLO)
    make_model(folder / "counts", COUNTS)
    make_model(folder / "thinks", "<think>Hm. Well.</think>Yes, of course.", thinks=True)
    make_model(folder / "calls", f"Let me see. {_call('weather', city='Oslo')}", calls_tools=True, after_tool=SUNNY)
    both = f"<think>Hm.</think>Both. {_call('weather', city='Oslo')}{_call('weather', city='Rome')}"
    make_model(folder / "both", both, calls_tools=True, thinks=True)
    make_random_model(folder / "random")
    _by_chance(make_random_model(folder / "hot"))
    return top


def _by_chance(model: Path) -> None:
    """Let a model sample unless a request says otherwise, as most do."""
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 1.0}))


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), models, options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="package")
def sdk(server: Server) -> Iterator[Anthropic]:
    with anthropic_sdk(server) as client:
        yield client
