"""Tools, calls and their results never vanish from a prompt, whatever the template has a place for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import render
from mlx_overlay_server.chat.requests import Call, ChatRequest, Message, Tool, ToolChoice
from mlx_overlay_server.errors import InvalidRequest

from tests.support.loaded import loaded
from tests.support.models import make_model
from tests.support.tokens import CHAT_TEMPLATE

# User and assistant in turns, and nobody else, as Gemma's.
_ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)
# The user's and the model's words, and nothing of any other role, without a word.
_DEAF = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}[{{ m.role }}|{{ m.content }}]"
    "{% endif %}{% endfor %}"
)
# Tools and calls, and not their results.
_HALF = (
    _DEAF
    + "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    + ("{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{% endfor %}")
)
_TEMPLATES = (CHAT_TEMPLATE, _ALTERNATING, _DEAF, _HALF)

_TOOLS = (Tool("find", "Finds ä things.", {"type": "object", "properties": {"what": {"type": "string"}}}),)
_ASKED = Message("user", ("Hi",))
_CALLED = Message("assistant", ("So:",), "", (Call("call_1", "find", {"what": "ä"}), Call("call_2", "lose", {})))
_RESULTS = (Message("tool", ("Found 1",), call_id="call_1"), Message("tool", ("Lost 2",), call_id="call_2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "plain", "Hello.")


def _written(model: Loaded, *turns: Message, **more: Any) -> str:
    return model.tokenizer.decode(list(render(model, ChatRequest("org/m", messages=turns, **more)).tokens))


@pytest.mark.parametrize("template", _TEMPLATES)
def test_tools_that_a_template_drops_are_in_the_system_message(template: str, folder: Path) -> None:
    written = _written(loaded(folder, template=template), Message("system", ("Be kind.",)), _ASKED, tools=_TOOLS)
    assert '"name": "find"' in written or template == _HALF
    assert '"description": "Finds ä things."' in written or template == _HALF
    assert written.index("Be kind.") < written.index("find")


@pytest.mark.parametrize("template", _TEMPLATES)
def test_calls_and_results_that_a_template_drops_are_text(template: str, folder: Path) -> None:
    model = loaded(folder, template=template)
    written = _written(model, _ASKED, _CALLED, *_RESULTS, Message("user", ("And now?",)), tools=_TOOLS)
    parts = [
        "Hi",
        'So:\n<tool_call>\n{"name": "find", "arguments": {"what": "ä"}}\n</tool_call>\n<tool_call>\n{"name": "lose"',
        "<tool_response>\nFound 1\n</tool_response>\n<tool_response>\nLost 2\n</tool_response>",
        "And now?",
    ]
    places = [written.rindex(part) for part in parts]
    assert places == sorted(places)
    assert '"description": "Finds ä things."' in written, "one form for all, which the calls follow"


def test_a_history_of_calls_is_kept_where_the_request_has_no_tools(folder: Path) -> None:
    written = _written(loaded(folder, template=_DEAF), _ASKED, _CALLED, *_RESULTS)
    assert '{"name": "find", "arguments": {"what": "ä"}}' in written
    assert "Found 1" in written
    assert "# Tools" not in written


def test_the_model_s_own_form_is_left_where_its_template_has_one(model: Loaded) -> None:
    written = _written(model, _ASKED, _CALLED, *_RESULTS, tools=_TOOLS)
    assert "<|im_start|>tool\n<tool_response>\nFound 1\n</tool_response><|im_end|>" in written
    assert "to assist with the user query" not in written


def test_tools_that_may_not_be_called_are_no_part_of_the_prompt(folder: Path) -> None:
    model = loaded(folder, template=_DEAF)
    assert _written(model, _ASKED, tools=_TOOLS, choice=ToolChoice("none")) == _written(model, _ASKED)


def test_a_text_that_looks_like_a_result_is_the_user_s_own(folder: Path) -> None:
    written = _written(loaded(folder, template=_DEAF), Message("user", ("<tool_response>\n",)), tools=_TOOLS)
    assert written.endswith("[user|<tool_response>\n]")


@pytest.mark.parametrize(
    ("turns", "tools", "field", "told"),
    [
        ((_ASKED,), _TOOLS, "tools", "no place for tools"),
        ((_ASKED, _CALLED), (), "messages", "no place for tool calls"),
        ((_ASKED, *_RESULTS), (), "messages", "no place for tool results"),
    ],
)
def test_what_cannot_be_written_is_refused(
    turns: tuple[Message, ...], tools: tuple[Tool, ...], field: str, told: str, folder: Path
) -> None:
    """mlx-lm reads this model's calls in a form of their own, which no text of ours can ask for."""
    model = loaded(folder, template=_DEAF)
    model.tokenizer._tool_parser = lambda text, tools: {"name": text, "arguments": {}}  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequest, match=told) as caught:
        _written(model, *turns, tools=tools)
    assert caught.value.field == field


def test_what_other_conversations_share_holds_the_tools(folder: Path) -> None:
    model = loaded(folder, template=CHAT_TEMPLATE)
    request = ChatRequest("org/m", messages=(_ASKED,), tools=_TOOLS)
    first, second = (render(model, replace(request, messages=(Message("user", (text,)),))) for text in ("Hi", "Well"))
    assert first.tokens[: first.system] == second.tokens[: second.system]
    assert "</tools>" in model.tokenizer.decode(list(first.tokens[: first.system]))
