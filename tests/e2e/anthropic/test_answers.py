"""Answers of the Messages API, with thinking, sampling and formats."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from anthropic import Anthropic
from anthropic.types import Message
from pydantic import BaseModel

from tests.e2e.anthropic.asking import (
    COUNTS,
    HELLO,
    HI,
    PLAIN,
    RANDOM,
    SIGNATURE,
    THINKS,
    outcome,
    reading_of,
    reply,
    text_of,
)
from tests.support.dialects import async_anthropic_sdk, is_same, read_by_chat
from tests.support.server import Server

# Answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_message_of_exactly_these_fields(sdk: Anthropic) -> None:
    message = reply(sdk, PLAIN, "What a nice day!")
    assert message.id.startswith("msg_")
    assert message.to_dict(mode="json") == {
        "id": message.id,
        "type": "message",
        "role": "assistant",
        "model": PLAIN,
        "content": [{"type": "text", "text": HELLO}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": message.usage.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": message.usage.cache_read_input_tokens,
            "output_tokens": 4,
        },
    }


def test_an_answer_is_cut_at_max_tokens(sdk: Anthropic) -> None:
    message = reply(sdk, PLAIN, max_tokens=2)
    assert (text_of(message), message.stop_reason, message.usage.output_tokens) == ("Hello there,", "max_tokens", 2)


def test_a_stop_sequence_is_named_and_never_said(sdk: Anthropic) -> None:
    message = reply(sdk, "acme/counts", stop_sequences=["nowhere", "three", "two th"])
    assert (text_of(message), message.stop_reason, message.stop_sequence) == ("One ", "stop_sequence", "two th")
    message = reply(sdk, "acme/counts", stop_sequences=["nowhere"])
    assert (text_of(message), message.stop_reason, message.stop_sequence) == (COUNTS, "end_turn", None)


def test_the_async_sdk_gets_the_same(server: Server) -> None:
    async def ask() -> tuple[Message, list[Any], Message]:
        async with async_anthropic_sdk(server) as sdk:
            whole, stream = await asyncio.gather(
                sdk.messages.create(model=PLAIN, messages=HI, max_tokens=100),
                sdk.messages.create(model=THINKS, messages=HI, max_tokens=100, stream=True),
            )
            types = [event.type async for event in stream]
            async with sdk.messages.stream(model=PLAIN, messages=HI, max_tokens=100) as helped:
                return whole, types, await helped.get_final_message()

    whole, types, final = asyncio.run(ask())
    assert text_of(whole) == text_of(final) == HELLO
    assert (types[0], types[-2:]) == ("message_start", ["message_delta", "message_stop"])


# Thinking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}])
def test_thinking_that_is_asked_for_is_a_block_with_a_signature(sdk: Anthropic, thinking: Any, stream: bool) -> None:
    thought, said = outcome(sdk, THINKS, stream=stream, thinking=thinking)["content"]
    assert thought == {"type": "thinking", "thinking": "Hm. Well.", "signature": SIGNATURE}
    assert (said["type"], said["text"]) == ("text", "Yes, of course.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"thinking": {"type": "disabled"}}])
def test_thinking_that_is_not_asked_for_is_not_told(sdk: Anthropic, options: Any, stream: bool) -> None:
    (said,) = outcome(sdk, THINKS, stream=stream, **options)["content"]
    assert (said["type"], said["text"]) == ("text", "Yes, of course.")


def test_the_template_is_told_whether_to_think(server: Server, sdk: Anthropic) -> None:
    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    assert is_same(read_by_chat(server, THINKS, HI, **off), reading_of(reply(sdk, THINKS)))
    disabled = reply(sdk, THINKS, thinking={"type": "disabled"})
    assert is_same(read_by_chat(server, THINKS, HI, **off), reading_of(disabled))
    on = reading_of(reply(sdk, THINKS, thinking={"type": "adaptive"}))
    assert is_same(on, read_by_chat(server, THINKS, HI))
    assert on.tokens < reading_of(disabled).tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_of_one_token_cuts_the_thinking_and_the_answer_follows(sdk: Anthropic, stream: bool) -> None:
    message = outcome(sdk, THINKS, stream=stream, thinking={"type": "enabled", "budget_tokens": 1})
    assert [block.get("thinking") or block.get("text") for block in message["content"]] == ["Hm.", "Yes, of course."]
    assert message["usage"]["output_tokens"] == 6  # <think>, Hm., </think>, Yes,, of, course.


# Sampling and formats -------------------------------------------------------------------------------------------


COLD = [{"temperature": 0}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 1, "top_k": 1}, {"top_p": 0}]


@pytest.mark.parametrize("options", COLD)
def test_temperature_zero_means_zero(server: Server, sdk: Anthropic, options: Any) -> None:
    greedy = server.chat("acme/hot", HI, max_tokens=40, temperature=0).choices[0].message.content
    message = reply(sdk, "acme/hot", max_tokens=40, extra_body=options)
    assert text_of(message) == greedy


@pytest.mark.parametrize("options", [{}, {"temperature": 1}, {"top_p": 0.999}, {"top_k": 400}])
def test_other_temperatures_are_warm(server: Server, sdk: Anthropic, options: Any) -> None:
    greedy = server.chat("acme/hot", HI, max_tokens=40, temperature=0).choices[0].message.content
    assert text_of(reply(sdk, "acme/hot", max_tokens=40, extra_body=options)) != greedy


class Place(BaseModel):
    town: Literal["Oslo", "Bergen"]
    is_near: bool


def test_an_answer_is_held_to_a_schema(sdk: Anthropic) -> None:
    parsed = sdk.messages.parse(model=RANDOM, messages=HI, max_tokens=100, output_format=Place)
    assert isinstance(parsed.parsed_output, Place)
    schema = {"type": "json_schema", "schema": {**Place.model_json_schema(), "additionalProperties": False}}
    message = reply(sdk, PLAIN, output_config={"format": schema, "effort": "low"})
    Place.model_validate_json(text_of(message))


def test_what_asks_for_nothing_here_is_taken(sdk: Anthropic) -> None:
    message = reply(
        sdk,
        PLAIN,
        metadata={"user_id": "user_1"},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
        output_config={"effort": "high"},
    )
    assert text_of(message) == HELLO
