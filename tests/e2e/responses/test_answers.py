"""Answers of the Responses API, with reasoning and formats."""

from __future__ import annotations

import asyncio
import base64
from typing import Any, Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from tests.e2e.responses.asking import HELLO, PLAIN, RANDOM, THINKS, events_of, is_read_as, outcome, reading_of, reply
from tests.support.dialects import Read, is_same, read_by_chat
from tests.support.server import Server

# Answers --------------------------------------------------------------------------------------------------------


def test_a_response_is_exactly_these_fields(sdk: OpenAI) -> None:
    response = reply(sdk, "acme/once", metadata={"a": "b"}, user="me", temperature=0.5, top_p=0.9)
    (message,) = response.output
    assert response.id.startswith("resp_")
    told: dict[str, Any] = response.to_dict(mode="json")
    assert 0 < told.pop("created_at") <= told.pop("completed_at")
    assert told == {
        "id": response.id,
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "model": "acme/once",
        "output": [
            {
                "id": message.id,
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": HELLO, "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 0.9,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 22,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 26,
        },
        "user": "me",
    }
    assert response.output_text == HELLO
    assert reading_of(reply(sdk, "acme/once")) == Read(22, 21)


@pytest.mark.parametrize("root", ["/v1", ""])
def test_the_route_is_there_with_and_without_v1(server: Server, root: str) -> None:
    answer = server.http.post(f"{root}/responses", json={"model": PLAIN, "input": "hi"})
    assert answer.json()["status"] == "completed"


def test_the_async_sdk_gets_the_same(server: Server) -> None:
    async def ask() -> tuple[str, list[str]]:
        async with server.async_openai() as sdk:
            whole, stream = await asyncio.gather(
                sdk.responses.create(model=PLAIN, input="hi"),
                sdk.responses.create(model=PLAIN, input="hi", stream=True),
            )
            return whole.output_text, [
                event.delta async for event in stream if event.type == "response.output_text.delta"
            ]

    text, deltas = asyncio.run(ask())
    assert text == "".join(deltas) == HELLO


def test_an_answer_that_is_cut_is_incomplete(sdk: OpenAI) -> None:
    response = reply(sdk, PLAIN, max_output_tokens=2)
    assert (response.status, response.output_text) == ("incomplete", "Hello there,")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert message.type == "message"
    assert (message.status, response.completed_at) == ("incomplete", None)


def test_a_warm_up_of_one_token_and_no_input_works(server: Server, sdk: OpenAI) -> None:
    response = reply(sdk, PLAIN, "", max_output_tokens=1)
    assert (response.output_text, response.status) == ("Hello", "incomplete")
    assert is_read_as(server, PLAIN, [{"role": "user", "content": ""}], "")


# Reasoning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_an_item_before_the_message(sdk: OpenAI, stream: bool) -> None:
    response = outcome(sdk, THINKS, stream=stream)
    item, message = response.output
    assert item.type == "reasoning"
    assert (item.summary, item.encrypted_content, response.output_text) == ([], None, "Yes, of course.")
    assert [(part.type, part.text) for part in item.content or ()] == [("reasoning_text", "Hm. Well.")]
    assert message.type == "message"
    assert response.usage is not None
    # <think>, Hm., Well., </think>, Yes,, of, course.
    assert (response.usage.output_tokens, response.usage.output_tokens_details.reasoning_tokens) == (7, 3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("summary", ["auto", "concise", "detailed"])
def test_reasoning_is_told_as_a_summary_where_one_is_wanted(sdk: OpenAI, summary: str, stream: bool) -> None:
    item, _ = outcome(sdk, THINKS, stream=stream, reasoning={"summary": summary}).output
    assert item.type == "reasoning"
    assert [(part.type, part.text) for part in item.summary] == [("summary_text", "Hm. Well.")]
    assert not item.content


def test_reasoning_is_also_told_for_clients_that_store_it(sdk: OpenAI) -> None:
    response = reply(sdk, THINKS, include=["reasoning.encrypted_content"], store=False)
    item = response.output[0]
    assert item.type == "reasoning"
    assert item.encrypted_content


@pytest.mark.parametrize("include", [[], ["reasoning.encrypted_content"]])
@pytest.mark.parametrize("reasoning", [{}, {"summary": "auto"}])
def test_reasoning_given_back_is_read_again(server: Server, sdk: OpenAI, reasoning: Any, include: Any) -> None:
    question = {"role": "user", "content": f"Say {reasoning} {include}"}
    said = [item.to_dict() for item in reply(sdk, THINKS, [question], reasoning=reasoning, include=include).output]
    chat = [question, {"role": "assistant", "content": "Yes, of course.", "reasoning_content": "Hm. Well."}, question]
    assert is_read_as(server, THINKS, chat, [question, *said, question])


@pytest.mark.parametrize(
    "parts",
    [
        {"summary": [{"type": "summary_text", "text": "So."}]},
        {"summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"summary": [], "encrypted_content": base64.b64encode(b"So.").decode()},
        {"summary": [], "content": None, "encrypted_content": base64.b64encode(b"So.").decode(), "id": "rs_1"},
    ],
)
def test_reasoning_comes_back_in_any_of_its_forms(server: Server, parts: Any) -> None:
    question = {"role": "user", "content": "hi"}
    chat = [question, {"role": "assistant", "content": "ho", "reasoning_content": "So."}, question]
    items = [question, {"type": "reasoning", **parts}, {"role": "assistant", "content": "ho"}, question]
    assert is_read_as(server, THINKS, chat, items)


@pytest.mark.parametrize("secret", ["gAAAA-of-another-server", "////", ""])
def test_reasoning_that_another_server_encrypted_is_left_out(server: Server, secret: str) -> None:
    question = {"role": "user", "content": "hi"}
    item = {"type": "reasoning", "summary": [], "encrypted_content": secret}
    chat = [question, {"role": "assistant", "content": "ho"}, question]
    assert is_read_as(server, THINKS, chat, [question, item, {"role": "assistant", "content": "ho"}, question])


@pytest.mark.parametrize(("effort", "is_off"), [("none", True), ("minimal", True), ("low", False), ("high", False)])
def test_effort_switches_thinking_off_and_on(server: Server, sdk: OpenAI, effort: Any, is_off: bool) -> None:
    kwargs = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}} if is_off else {}
    read = read_by_chat(server, THINKS, [{"role": "user", "content": "hi"}], **kwargs)
    response = reply(sdk, THINKS, reasoning={"effort": effort})
    assert is_same(read, reading_of(response))
    assert response.reasoning is not None
    assert response.reasoning.effort == effort


# Formats --------------------------------------------------------------------------------------------------------


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    town: Literal["Oslo", "Bergen"]
    is_near: bool


@pytest.mark.parametrize("model", [PLAIN, RANDOM, THINKS])
def test_the_sdk_parses_an_answer_held_to_a_schema(sdk: OpenAI, model: str) -> None:
    response = sdk.responses.parse(model=model, input="hi", text_format=Place)
    assert isinstance(response.output_parsed, Place)
    with sdk.responses.stream(model=model, input="hi", text_format=Place) as stream:
        streamed = stream.get_final_response()
    assert isinstance(streamed.output_parsed, Place)


def test_the_format_is_told_again(sdk: OpenAI) -> None:
    wanted = {"type": "json_schema", "name": "place", "schema": Place.model_json_schema(), "strict": True}
    response = reply(sdk, RANDOM, text={"format": wanted})
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.to_dict() == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_object_is_one(sdk: OpenAI, stream: bool) -> None:
    response = outcome(sdk, PLAIN, stream=stream, text={"format": {"type": "json_object"}}, max_output_tokens=40)
    assert response.output_text.startswith("{")
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_object"


def test_log_probabilities_are_told_for_every_token(sdk: OpenAI) -> None:
    options: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (message,) = reply(sdk, PLAIN, **options).output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    tokens = [(each.token, bytes(each.bytes), round(each.logprob, 3)) for each in part.logprobs or ()]
    said = ["Hello", " there,", " general", " Kenobi."]
    assert tokens == [(text, text.encode(), 0.0) for text in said]
    assert {len(each.top_logprobs) for each in part.logprobs or ()} == {2}
    deltas = [event for event in events_of(sdk, PLAIN, **options) if event["type"] == "response.output_text.delta"]
    streamed = [(event["delta"], [each["token"] for each in event["logprobs"]]) for event in deltas]
    assert [token for _, tokens in streamed for token in tokens] == said
    assert all(text == "".join(tokens) for text, tokens in streamed)


def test_log_probabilities_may_be_asked_for_without_alternatives(sdk: OpenAI) -> None:
    (message,) = reply(sdk, PLAIN, include=["message.output_text.logprobs"]).output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    told = [(each.token, each.top_logprobs) for each in part.logprobs or ()]
    assert told == [("Hello", []), (" there,", []), (" general", []), (" Kenobi.", [])]
