"""Errors of the Responses API."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.responses.asking import CALLS, CITY, SEARCH, WEATHER, refusal_of, reply


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(sdk: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        reply(sdk, "acme/none", stream=stream)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_a_prompt_that_is_too_long_is_refused(sdk: OpenAI) -> None:
    refused = refusal_of(sdk, "input", input_="x" * 5000)
    assert refused.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("background", {"background": True}),
        ("truncation", {"truncation": "middle"}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("temperature", {"temperature": 3}),
        ("top_p", {"top_p": -1}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("new_field", {"extra_body": {"new_field": 1}}),
        ("stop", {"extra_body": {"stop": ["x"]}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "required", "tools": [SEARCH]}),
        ("tool_choice", {"tool_choice": {"type": "function", "name": "none"}, "tools": [WEATHER]}),
        ("tool_choice", {"tool_choice": {"type": "web_search"}, "tools": [WEATHER, SEARCH]}),
        ("tools", {"tools": [{"type": "function", "parameters": CITY}]}),
        (
            "tools",
            {"tools": [{"type": "function", "name": "x", "parameters": {"type": "none"}}], "tool_choice": "required"},
        ),
        ("text.format", {"text": {"format": {"type": "xml"}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "none"}}}}),
        ("previous_response_id", {"previous_response_id": "resp_none"}),
    ],
)
def test_what_cannot_be_done_is_refused_by_the_name_of_its_field(sdk: OpenAI, param: str, options: Any) -> None:
    refusal_of(sdk, param, CALLS, **options)


@pytest.mark.parametrize(
    ("param", "input_"),
    [
        ("input", []),
        ("input[0]", [{"type": "item_reference", "id": "msg_1"}]),
        ("input[1]", [{"role": "user", "content": "x"}, {"type": "file_search_call", "id": "x"}]),
        ("input[0].role", [{"role": "robot", "content": "x"}]),
        ("input[0].content[0]", [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]),
        ("input[0].arguments", [{"type": "function_call", "call_id": "x", "name": "y", "arguments": "[1]"}]),
        ("input[0].content[0].image_url", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
        ("input[0].output", [{"type": "function_call_output", "call_id": "x"}]),
    ],
)
def test_items_that_cannot_be_read_are_refused_by_their_place(sdk: OpenAI, param: str, input_: Any) -> None:
    refusal_of(sdk, param, input_=input_)
