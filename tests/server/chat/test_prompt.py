"""Conversations become prompts by the model's own template."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_overlay_server.chat.loaded import Loaded
from mlx_overlay_server.chat.prompt import Prompt, render
from mlx_overlay_server.chat.requests import Call, ChatRequest, Image, Message, ToolChoice
from mlx_overlay_server.errors import InvalidRequest
from PIL import Image as Pillow

from tests.server.chat.answers import TOOLS
from tests.support.loaded import loaded
from tests.support.models import make_model
from tests.support.soak.requests import bomb

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: a system message comes first or not at all.
_SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}{% endfor %}" + _CHATML
)
# As Mistral's and Gemma's first ones: user and assistant in turns.
_ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}" + _CHATML
)

Templated = Callable[[str], Loaded]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "plain", "Hello.")


@pytest.fixture(scope="module")
def templated(plain: Path) -> Templated:
    """Models of which each has another template."""
    return lambda template: loaded(plain, template=template)


def _ask(*turns: Message, **more: Any) -> ChatRequest:
    return ChatRequest("org/m", messages=turns, **more)


def _written(model: Loaded, *turns: Message, **more: Any) -> str:
    return model.tokenizer.decode(list(render(model, _ask(*turns, **more)).tokens))


def _turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _system(text: str) -> Message:
    return Message("system", (text,))


def _user(text: str) -> Message:
    return Message("user", (text,))


def _assistant(text: str) -> Message:
    return Message("assistant", (text,))


_OPEN = "<|im_start|>assistant\n"


def test_system_messages_at_the_start_become_one(templated: Templated) -> None:
    written = _written(templated(_CHATML), _system("Be brief."), _system("Be kind."), _user("Hi"))
    assert written == _turn("system", "Be brief.\n\nBe kind.") + _turn("user", "Hi") + _OPEN


def test_a_later_system_message_stays_one_where_the_template_takes_it(templated: Templated) -> None:
    written = _written(templated(_CHATML), _user("Hi"), _system("Be brief."), _user("So?"))
    assert written == _turn("user", "Hi") + _turn("system", "Be brief.") + _turn("user", "So?") + _OPEN


def test_a_later_system_message_is_the_user_s_where_the_template_refuses_it(templated: Templated) -> None:
    turns = (_system("Be kind."), _user("Hi"), _assistant("Hello."), _system("Be brief."), _user("So?"))
    written = _written(templated(_SYSTEM_FIRST), *turns)
    assert written == "".join(
        (
            _turn("system", "Be kind."),
            _turn("user", "Hi"),
            _turn("assistant", "Hello."),
            _turn("user", "Be brief.\n\nSo?"),
            _OPEN,
        )
    )


def test_a_system_message_begins_the_user_s_first_where_the_template_knows_none(templated: Templated) -> None:
    written = _written(templated(_ALTERNATING), _system("Be kind."), _user("Hi"), _assistant("Hello."), _user("So?"))
    assert written == "".join(
        (_turn("user", "Be kind.\n\nHi"), _turn("assistant", "Hello."), _turn("user", "So?"), _OPEN)
    )


def test_neighbours_of_one_role_are_joined_where_turns_must_alternate(templated: Templated) -> None:
    turns = (_user("Hi"), _user("there"), _assistant("Hello"), _assistant("you"), _user("So?"))
    written = _written(templated(_ALTERNATING), *turns)
    assert written == "".join(
        (_turn("user", "Hi\n\nthere"), _turn("assistant", "Hello\n\nyou"), _turn("user", "So?"), _OPEN)
    )


_roles = st.sampled_from(["system", "user", "assistant"])


@given(roles=st.lists(_roles, min_size=1, max_size=8))
def test_no_word_of_a_conversation_is_lost_whatever_the_template_takes(roles: list[Any], templated: Templated) -> None:
    turns = [Message(role, (f"word{at}",)) for at, role in enumerate(roles)]
    for template in (_CHATML, _SYSTEM_FIRST, _ALTERNATING):
        try:
            written = _written(templated(template), *turns)
        except InvalidRequest:
            # What begins with the assistant has no plainer form in which turns alternate and the user's come first.
            assert template == _ALTERNATING
            assert roles[0] == "assistant"
            continue
        places = [written.index(f"word{at}") for at in range(len(roles))]
        assert places == sorted(places)


def test_a_conversation_that_no_form_fits_is_refused_with_the_template_s_own_words(templated: Templated) -> None:
    model = templated("{{ raise_exception('Only poems are taken.') }}")
    with pytest.raises(InvalidRequest, match=r"Only poems are taken\.") as caught:
        render(model, _ask(_user("Hi")))
    assert caught.value.field == "messages"


def test_a_template_that_is_no_template_is_told_from_one_that_refuses(templated: Templated) -> None:
    with pytest.raises(InvalidRequest, match=r"^line 2 of the chat template is not valid: .*; correct it") as caught:
        render(templated("\n{% if %}"), _ask(_user("Hi")))
    assert caught.value.field == "model"


@pytest.mark.parametrize("continues", [False, True])
def test_a_conversation_of_nothing_is_refused(continues: bool, templated: Templated) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(templated(_CHATML), _ask(continues=continues))
    assert caught.value.field == "messages"


def test_a_model_without_a_template_is_told_apart(plain: Path) -> None:
    model = loaded(plain)
    model.tokenizer.has_chat_template = False
    with pytest.raises(InvalidRequest, match="has no chat template") as caught:
        render(model, _ask(_user("Hi")))
    assert caught.value.field == "model"


def test_an_image_is_refused_by_a_model_that_takes_none(templated: Templated) -> None:
    with pytest.raises(InvalidRequest, match="does not take images") as caught:
        render(templated(_CHATML), _ask(Message("user", ("See:", Image(b"", "messages[0].content[1]")))))
    assert caught.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    "name", ["messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize", "return_dict"]
)
def test_what_is_ours_to_tell_a_template_is_not_the_request_s(name: str, templated: Templated) -> None:
    with pytest.raises(InvalidRequest, match=name) as caught:
        render(templated(_CHATML), _ask(_user("Hi"), template_kwargs={name: 1}))
    assert (caught.value.field, caught.value.key) == ("template_kwargs", name)


def test_of_several_that_are_ours_the_one_that_is_named_is_the_one_that_is_meant(templated: Templated) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(templated(_CHATML), _ask(_user("Hi"), template_kwargs={"tools": 1, "messages": 1}))
    assert caught.value.key is not None
    assert f"`{caught.value.key}`" in str(caught.value)


def test_template_kwargs_reach_the_template(templated: Templated) -> None:
    model = templated("{{ messages[0].content }} {{ mood }}")
    assert _written(model, _user("Hi"), template_kwargs={"mood": "merry"}) == "Hi merry"


@pytest.mark.parametrize("value", [None, [], {"a": {"b": 1}}, "{{ 1 / 0 }}", 10**30])
def test_a_template_kwarg_of_any_kind_does_no_harm(value: object, templated: Templated) -> None:
    model = templated("{{ messages[0].content }}")
    assert _written(model, _user("Hi"), template_kwargs={"mood": value}) == "Hi"


def test_reasoning_effort_is_the_template_s_where_it_knows_it(templated: Templated) -> None:
    model = templated("{{ messages[0].content }} {{ reasoning_effort }}")
    assert _written(model, _user("Hi"), effort="high") == "Hi high"


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("minimal", False), ("low", True), ("high", True)])
def test_reasoning_effort_is_on_or_off_where_the_template_knows_no_more(
    effort: str, thinks: bool, model: Loaded
) -> None:
    written = _written(model, _user("Hi"), effort=effort)
    assert written.endswith("<think>\n\n</think>\n\n") is not thinks


def test_reasoning_effort_is_refused_by_a_model_that_does_not_reason(templated: Templated) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(templated(_CHATML), _ask(_user("Hi"), effort="high"))
    assert caught.value.field == "effort"
    assert _written(templated(_CHATML), _user("Hi"), effort="high", is_effort_optional=True)


def test_a_template_that_opens_the_reasoning_is_noticed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "</think>Yes", thinks=True)
    opens = _CHATML.replace("assistant\n", "assistant\n<think>\n")
    assert render(loaded(folder, template=opens), _ask(_user("Hi"))).is_reasoning
    assert not render(loaded(folder), _ask(_user("Hi"))).is_reasoning


@pytest.mark.parametrize(("state", "opens"), [("reasoning", True), ("normal", False), (None, False)])
def test_a_format_whose_answers_begin_with_reasoning_is_noticed(
    state: str | None, opens: bool, templated: Templated
) -> None:
    model = templated(_CHATML)
    tokenizer = copy.copy(model.tokenizer)
    tokenizer._response_format = {"initial_state": state} if state else {}  # type: ignore[attr-defined]
    prompt = render(replace(model, tokenizer=tokenizer), _ask(_user("Hi")))
    assert prompt.is_reasoning is opens


@pytest.mark.parametrize("text", ["<think>", "Say <think>\n", "<|im_end|>\n<|im_start|>assistant\n<think>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_quoted_mark_does_not_open_the_reasoning(text: str, role: Any, model: Loaded) -> None:
    assert not render(model, _ask(_user("Hi"), Message(role, (text,)))).is_reasoning


def test_history_has_its_reasoning_and_its_calls(model: Loaded) -> None:
    call = Message("assistant", ("So:",), "Hm.", (Call("1", "find", {"a": [1]}),))
    written = _written(model, _user("Hi"), call, Message("tool", ("Found",), call_id="1"), tools=TOOLS)
    assert '<think>Hm.</think>So:\n<tool_call>\n{"name": "find", "arguments": {"a": [1]}}\n</tool_call>' in written
    assert "<tool_response>\nFound\n</tool_response>" in written


def test_tools_are_in_the_prompt_unless_none_may_be_called(model: Loaded) -> None:
    assert '"name": "find"' in _written(model, _user("Hi"), tools=TOOLS)
    assert '"name": "find"' not in _written(model, _user("Hi"), tools=TOOLS, choice=ToolChoice("none"))


def _shared(model: Loaded, prompt: Prompt) -> str:
    return model.tokenizer.decode(list(prompt.tokens[: prompt.system]))


def test_what_other_conversations_share_is_told(model: Loaded) -> None:
    request = _ask(_system("Be brief."), _user("Hi"), tools=TOOLS)
    prompt = render(model, request)
    other = render(model, replace(request, messages=(_system("Be brief."), _user("Well then"))))
    shared = _shared(model, prompt)
    assert "Be brief." in shared
    assert '"name": "find"' in shared
    assert prompt.tokens[: prompt.system] == other.tokens[: other.system]
    assert "Hi" not in shared


def test_a_later_system_message_leaves_what_the_first_one_shares(templated: Templated) -> None:
    prompt = render(templated(_CHATML), _ask(_system("Be brief."), _user("Hi"), _system("Be kind."), _user("So?")))
    alone = render(templated(_CHATML), _ask(_system("Be brief."), _user("Hi")))
    assert prompt.system == alone.system > 0


@pytest.mark.parametrize("template", [_CHATML, _SYSTEM_FIRST, _ALTERNATING])
def test_without_system_messages_and_tools_nothing_is_shared(template: str, templated: Templated) -> None:
    assert render(templated(template), _ask(_user("Hi"))).system == 0


def test_a_prompt_of_which_the_shared_part_cannot_be_told_shares_nothing(templated: Templated) -> None:
    prompt = render(templated(_ALTERNATING), _ask(_system("Be brief."), _user("Hi")))
    assert prompt.system == 0


def test_a_template_that_fails_on_the_shared_part_alone_is_used_all_the_same(templated: Templated) -> None:
    picky = "{% if not messages[-1].content %}{{ raise_exception('Say something.') }}{% endif %}" + _CHATML
    prompt = render(templated(picky), _ask(_system("Be brief."), _user("Hi")))
    assert prompt.system == 0
    assert prompt.tokens == render(templated(_CHATML), _ask(_system("Be brief."), _user("Hi"))).tokens


# Ends and images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "continues"),
    [
        ((_user("Hi"), _assistant("So")), True),
        ((_user("Hi"), _assistant("")), False),
        ((_user("Hi"), _assistant("So"), _user("And?"), _assistant("")), False),
        ((_user(""), _assistant(""), _user("And?"), _assistant("Then")), True),
        ((_user("Hi"), _assistant("So"), _user("And?")), False),
    ],
)
def test_whether_an_answer_goes_on_with_text_is_told_by_the_last_message(
    turns: tuple[Message, ...], continues: bool, templated: Templated
) -> None:
    assert render(templated(_CHATML), _ask(*turns, continues=True)).continues_text is continues
    assert render(templated(_CHATML), _ask(*turns)).continues_text is False


def test_half_a_surrogate_pair_is_refused_by_the_field_that_has_it(templated: Templated) -> None:
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        render(templated(_CHATML), _ask(_user("a \ud800")))
    assert caught.value.field == "messages"


def test_images_reach_the_processor_as_pixels_in_their_order(templated: Templated) -> None:
    def png(red: int) -> Image:
        file = io.BytesIO()
        Pillow.new("RGBA", (3, 2), (red, 0, 0, 255)).save(file, "PNG")
        return Image(file.getvalue(), f"messages[0].content[{red}]")

    given: list[Any] = []

    def processor(text: str, images: list[Any]) -> tuple[str, list[Any]]:
        given.extend(images)
        return text.replace("PLACE", "there"), [image * 2 for image in images]

    model = replace(templated("PLACE {{ messages[0].content[1].text }}"), processor=processor)
    prompt = render(model, _ask(Message("user", (png(1), "See", png(2)))))
    assert model.tokenizer.decode(list(prompt.tokens)) == "there See"
    assert [image.shape for image in given] == [(2, 3, 3), (2, 3, 3)]
    assert [int(image[0, 0, 0]) for image in given] == [1, 2]
    assert [int(image[0, 0, 0]) for image in prompt.images] == [2, 4]


def test_an_image_of_more_pixels_than_pillow_opens_is_refused_as_one_of_too_many(templated: Templated) -> None:
    image = base64.b64decode(bomb(14_000).partition(",")[2])
    model = replace(templated(_CHATML), processor=lambda text, images: (text, images))
    with pytest.raises(InvalidRequest, match="pixels together") as caught:
        render(model, _ask(Message("user", (Image(image, "messages[0].content[0]"),))))
    assert caught.value.param == "messages[0].content[0]"
