"""System texts and earlier turns, as the Messages API takes them."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.e2e.anthropic.asking import (
    CALLS,
    EPHEMERAL,
    HI,
    PLAIN,
    SIGNATURE,
    SUNNY,
    THINKS,
    WEATHER,
    billed,
    is_read_as,
    reading_of,
    reply,
    text_of,
)
from tests.support.dialects import Read
from tests.support.server import Server

PIXEL = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}


# System ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("Be kind.", "Be kind."),
        ([{"type": "text", "text": "Be good."}], "Be good."),
        ([{"type": "text", "text": "One.", **EPHEMERAL}, {"type": "text", "text": "Two."}], "One.\n\nTwo."),
    ],
)
def test_the_system_prompt_is_text_or_blocks(server: Server, sdk: Anthropic, system: Any, text: str) -> None:
    chat = [{"role": "system", "content": text}, *HI]
    assert is_read_as(server, sdk, PLAIN, chat, system=system)


def test_a_system_message_in_the_middle_stays_there(server: Server, sdk: Anthropic) -> None:
    turns: list[Any] = [
        {"role": "user", "content": "first"},
        {"role": "system", "content": "Now be brief."},
        {"role": "user", "content": "second"},
    ]
    chat = [{"role": "system", "content": "Be."}, *turns]
    assert is_read_as(server, sdk, PLAIN, chat, turns, system="Be.")


def test_what_a_client_bills_by_is_no_part_of_the_prompt(server: Server, sdk: Anthropic) -> None:
    chat = [{"role": "system", "content": "You are an agent."}, *HI]
    assert is_read_as(server, sdk, PLAIN, chat, system=billed("abc"))
    count = sdk.messages.count_tokens
    counted = {count(model=PLAIN, messages=HI, system=billed(each)).input_tokens for each in ("abc", "longer-hash")}  # type: ignore[arg-type]
    assert len(counted) == 1
    again = reading_of(reply(sdk, PLAIN, system=billed("longer-hash")))
    assert again == Read(counted.pop(), again.tokens - 1)


# History --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "Which one?",
        [{"type": "text", "text": "Which one?"}],
        [{"type": "text", "text": "Which one?", "citations": None, **EPHEMERAL}],
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Which one?"}}],
    ],
)
def test_a_users_text_is_a_string_or_blocks(server: Server, sdk: Anthropic, content: Any) -> None:
    messages = [{"role": "user", "content": content}]
    assert is_read_as(server, sdk, PLAIN, [{"role": "user", "content": "Which one?"}], messages)


@pytest.mark.parametrize("signature", ["", SIGNATURE, "of-another-server"])
def test_thinking_of_earlier_turns_is_read_and_redacted_thinking_is_left_out(
    server: Server, sdk: Anthropic, signature: str
) -> None:
    said = [
        {"type": "redacted_thinking", "data": "secret"},
        {"type": "thinking", "thinking": "So.", "signature": signature},
        {"type": "text", "text": "ho", **EPHEMERAL},
    ]
    last = {"role": "user", "content": "And?"}
    chat = [*HI, {"role": "assistant", "content": "ho", "reasoning_content": "So."}, last]
    messages = [*HI, {"role": "assistant", "content": said}, last]
    assert is_read_as(server, sdk, THINKS, chat, messages, thinking={"type": "adaptive"})


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"content": "21 degrees"}, "21 degrees"),
        (
            {"content": [{"type": "text", "text": "21 "}, {"type": "text", "text": "degrees", **EPHEMERAL}]},
            "21 degrees",
        ),
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"content": [{"type": "text", "text": "none"}], "is_error": True}, "Error: none"),
        ({"content": "fine", "is_error": False}, "fine"),
        ({"content": []}, ""),
        ({}, ""),
    ],
)
def test_a_tools_result_is_read_and_leads_to_the_models_answer(
    server: Server, sdk: Anthropic, result: dict[str, Any], text: str
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    use = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}, **EPHEMERAL}
    answered = {"type": "tool_result", "tool_use_id": "call_1", **result, **EPHEMERAL}
    messages: list[Any] = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "Well."}, use]}]
    messages += [{"role": "user", "content": [answered]}]
    chat = [*HI, {"role": "assistant", "content": "Well.", "tool_calls": [call]}]
    chat += [{"role": "tool", "tool_call_id": "call_1", "content": text}]
    assert is_read_as(server, sdk, CALLS, chat, messages)
    assert text_of(reply(sdk, CALLS, messages)) == SUNNY


def test_several_results_come_before_what_the_user_says_with_them(server: Server, sdk: Anthropic) -> None:
    uses = [{"type": "tool_use", "id": f"call_{at}", "name": "weather", "input": {"at": at}} for at in range(2)]
    results = [{"type": "tool_result", "tool_use_id": f"call_{at}", "content": f"result {at}"} for at in range(2)]
    messages: list[Any] = [*HI, {"role": "assistant", "content": uses}]
    messages += [{"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]}]
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "weather", "arguments": f'{{"at": {at}}}'}}
        for at in range(2)
    ]
    chat = [*HI, {"role": "assistant", "content": "", "tool_calls": calls}]
    chat += [{"role": "tool", "tool_call_id": f"call_{at}", "content": f"result {at}"} for at in range(2)]
    assert is_read_as(server, sdk, CALLS, [*chat, {"role": "user", "content": "And now?"}], messages)


def test_a_tool_loop_goes_from_the_question_to_the_answer(sdk: Anthropic) -> None:
    messages: list[Any] = list(HI)
    asked = reply(sdk, CALLS, messages, tools=[WEATHER])
    text, use = asked.content
    assert (text.type, use.type, asked.stop_reason) == ("text", "tool_use", "tool_use")
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21"}
    messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    answered = reply(sdk, CALLS, messages, tools=[WEATHER])
    assert (text_of(answered), answered.stop_reason) == (SUNNY, "end_turn")
    assert (answered.usage.cache_read_input_tokens or 0) >= reading_of(asked).tokens


def test_an_image_is_refused_by_a_model_that_takes_none(sdk: Anthropic) -> None:
    image = {"type": "image", "source": PIXEL}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [image]}
    for content in ([image], [result]):
        with pytest.raises(anthropic.BadRequestError, match="does not take images"):
            reply(sdk, PLAIN, [{"role": "user", "content": content}])
