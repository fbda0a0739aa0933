"""Earlier turns keep their reasoning, calls and images when a template makes neighbours of one role one turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import render
from mlx_overlay_server.chat.requests import Call, ChatRequest, Message

from tests.support.loaded import loaded
from tests.support.models import make_model

# A system message anywhere but at the start is refused, as Qwen3's template does: the turns are merged then.
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "[{{ m.role }}|{{ m.reasoning_content }}|{{ m.content }}|"
    "{% for call in m.tool_calls or [] %}{{ call.id }}={{ call.function.name }};{% endfor %}"
    "{{ m.tool_call_id }}]{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(make_model(tmp_path_factory.mktemp("models") / "plain", "Hello."), template=_TEMPLATE)


def _written(model: Loaded, *turns: Message) -> str:
    """The prompt of a conversation whose last turns, a late system message and a question, make the turns merge."""
    messages = (*turns, Message("system", ("Be brief.",)), Message("user", ("So?",)))
    return model.tokenizer.decode(list(render(model, ChatRequest("org/m", messages=messages)).tokens))


def _said(text: str, reasoning: str = "", *calls: str) -> Message:
    return Message("assistant", (text,), reasoning, tuple(Call(call, "find", {}) for call in calls))


_END = "[user||Be brief.\n\nSo?|]"


@pytest.mark.parametrize(
    ("turns", "written"),
    [
        pytest.param(
            (_said("a", "", "call_1"), _said("b")),
            "[assistant||a|call_1=find;][assistant||b|]",
            id="calls of the first: the turns stay apart, or the calls would come after what was said later",
        ),
        pytest.param(
            (_said("a"), _said("b", "", "call_1")), "[assistant||a\n\nb|call_1=find;]", id="calls of the second"
        ),
        pytest.param(
            (_said("a", "", "call_1"), _said("b", "", "call_2")),
            "[assistant||a|call_1=find;][assistant||b|call_2=find;]",
            id="calls of both",
        ),
        pytest.param((_said("a", "r"), _said("b")), "[assistant|r|a\n\nb|]", id="reasoning of the first"),
        pytest.param((_said("a"), _said("b", "s")), "[assistant|s|a\n\nb|]", id="reasoning of the second"),
        pytest.param(
            (_said("a", "r"), _said("b", "s")), "[assistant|r\n\ns|a\n\nb|]", id="reasoning of both, in order"
        ),
        pytest.param(
            (_said("a"), _said("b", "", "call_1"), _said("c")),
            "[assistant||a\n\nb|call_1=find;][assistant||c|]",
            id="calls in the middle",
        ),
    ],
)
def test_merging_assistant_turns_loses_no_call_and_no_reasoning(
    turns: tuple[Message, ...], written: str, model: Loaded
) -> None:
    assert _written(model, Message("user", ("Hi",)), *turns) == f"[user||Hi|]{written}{_END}"


def test_answers_of_two_tools_are_never_merged(model: Loaded) -> None:
    """Each says which call it answers."""
    turns: list[Any] = [Message("tool", (text,), call_id=f"call_{text}") for text in "ab"]
    written = _written(model, Message("user", ("Hi",)), _said("", "", "call_a", "call_b"), *turns)
    assert written == f"[user||Hi|][assistant|||call_a=find;call_b=find;][tool||a|call_a][tool||b|call_b]{_END}"


def test_a_leading_system_message_is_not_taken_for_a_late_one(model: Loaded) -> None:
    written = _written(model, Message("system", ("Be kind.",)), Message("user", ("Hi",)), _said("a", "r"), _said("b"))
    assert written == f"[system||Be kind.|][user||Hi|][assistant|r|a\n\nb|]{_END}"


def test_the_answer_s_beginning_is_continued_only_where_it_ends_in_text(tmp_path: Path) -> None:
    """A last turn with calls waits for their answers: there is nothing to continue."""
    continues = "{% if add_generation_prompt %}<next>{% endif %}"
    model = loaded(make_model(tmp_path / "m", "Hello."), template=_TEMPLATE + continues)
    asked = Message("user", ("Hi",))

    def written(last: Message) -> str:
        request = ChatRequest("org/m", messages=(asked, last), continues=True)
        return model.tokenizer.decode(list(render(model, request).tokens))

    assert written(_said("a")).endswith("[assistant||a")
    assert written(_said("a", "", "call_1")).endswith("[assistant||a|call_1=find;]<next>")
    assert written(asked).endswith("[user||Hi|]<next>")


def test_gpt_oss_s_template_gets_no_reasoning_beside_a_text_before_a_call(model: Loaded) -> None:
    template = (
        "{% for m in messages %}{% if m.thinking and m.content and m.tool_calls %}{{ raise_exception('both') }}"
        "{% endif %}[{{ m.thinking }}|{{ m.content }}|{% for call in m.tool_calls or [] %}{{ call.function.name }}"
        "{% endfor %}]{% endfor %}"
    )
    turns = (Message("user", ("Hi",)), _said("", "r", "call_1"), _said("a", "s", "call_2"))
    asked = ChatRequest("org/m", messages=turns, chat_template=template)
    assert model.tokenizer.decode(list(render(model, asked).tokens)) == "[|Hi|][r||find][|a|find]"
