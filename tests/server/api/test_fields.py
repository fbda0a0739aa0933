"""Mistakes in a request's body: one line that names the field as the client wrote it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from mlx_overlay_server.api.anthropic.wire import MessagesRequest
from mlx_overlay_server.api.fields import Body, image, wrong_field
from mlx_overlay_server.api.openai.wire import ChatCompletionRequest, CompletionRequest
from mlx_overlay_server.api.responses.wire import ResponsesRequest
from mlx_overlay_server.errors import InvalidRequest
from pydantic import ValidationError

CHAT: dict[str, Any] = {"model": "org/m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "org/m", "prompt": "Hi"}


def _mistake(kind: type[Body], body: Any) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    # As FastAPI hands them over.
    return wrong_field([{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()], body)


def _message(**more: Any) -> dict[str, Any]:
    return {"messages": [CHAT["messages"][0], {"role": "user", "content": "Hi", **more}]}


def _call(**more: Any) -> dict[str, Any]:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}, **more}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"n": 0}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "maybe"}, "stream"),
        ({"stream_options": {"include_usage": "maybe"}}, "stream_options.include_usage"),
        ({"stream_options": {"include_obfuscation": 5}}, "stream_options.include_obfuscation"),
        ({"stream_options": {"other": 1}}, "stream_options.other"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (_message(content=5), "messages[1].content"),
        (_message(content=None), "messages[1].content"),
        (_message(content=[5]), "messages[1].content[0]"),
        (_message(content=[{"type": "text"}]), "messages[1].content[0].text"),
        (_message(content=[{"type": "text", "text": 5}]), "messages[1].content[0].text"),
        (_message(content=[{"type": "sound"}]), "messages[1].content[0]"),
        (_message(content=[{"type": "image_url", "image_url": {}}]), "messages[1].content[0].image_url.url"),
        (_message(name=5), "messages[1].name"),
        (_call(id=None), "messages[0].tool_calls[0].id"),
        (_call(function={"name": "f"}), "messages[0].tool_calls[0].function.arguments"),
        (_call(type="custom"), "messages[0].tool_calls[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
        ({"tool_choice": "all"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_the_field_is_named_as_the_client_wrote_it(change: dict[str, Any], field: str) -> None:
    mistake = _mistake(ChatCompletionRequest, CHAT | change)
    assert mistake.param == field
    assert f"`{field}`" in mistake.message
    assert "\n" not in mistake.message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 0}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_so_it_is_in_plain_completions(change: dict[str, Any], field: str) -> None:
    assert _mistake(CompletionRequest, TEXT | change).param == field


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stop": ["a"] * 17}, "at most 16"),
        ({"temperature": 3}, "less than or equal to 2"),
        (_message(content=[{"type": "text", "text": 5}]), "valid string"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "'robot'"),
    ],
)
def test_what_is_wrong_with_it_is_told(change: dict[str, Any], reason: str) -> None:
    assert reason in _mistake(ChatCompletionRequest, CHAT | change).message


@pytest.mark.parametrize("name", ["audio", "moderation", "web_search_options", "prediction", "maxtokens"])
def test_what_is_not_known_is_refused_and_not_ignored(name: str) -> None:
    mistake = _mistake(ChatCompletionRequest, {**CHAT, name: 1})
    assert mistake.param == name
    assert mistake.message == f"`{name}` is not supported by this server"


def _kinds(base: type[Body] = Body) -> Iterator[type[Body]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def test_true_is_no_number_in_any_body() -> None:
    """For pydantic, as for Python, it is 1. Numbers that are spelled otherwise mean what they say."""
    fields = [
        (kind, name)
        for kind in _kinds()
        for name, field in kind.model_json_schema()["properties"].items()
        if {each.get("type") for each in [field, *field.get("anyOf", ())]} & {"integer", "number"}
    ]
    assert {kind.__name__ for kind, _ in fields} > {"MessagesRequest", "ResponsesRequest", "CompletionRequest"}
    for kind, name in fields:
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({name: True})
        assert (name,) in {error["loc"] for error in caught.value.errors()}, (kind, name)
    assert (
        ChatCompletionRequest.model_validate(CHAT | {"max_tokens": "5", "top_k": 5.0}).decoded().params.max_tokens == 5
    )


def test_what_can_only_be_false_is_refused_by_its_name() -> None:
    mistake = _mistake(ResponsesRequest, {"input": "Hi", "background": True})
    assert mistake.message == "`background` is not supported by this server; leave it out"


def test_what_is_missing_is_named() -> None:
    assert _mistake(ChatCompletionRequest, {"model": "org/m"}).param == "messages"


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}])
def test_a_model_that_is_not_named_is_the_default_or_missed(given: dict[str, Any]) -> None:
    body = ChatCompletionRequest.model_validate({"messages": CHAT["messages"], **given})
    with pytest.raises(InvalidRequest) as mistake:
        body.name(None)
    assert (mistake.value.param, mistake.value.message) == ("model", "`model`: field required")
    body.name("org/default")
    assert body.decoded().model == "org/default"


@pytest.mark.parametrize("body", [[], "text", 5, None])
def test_a_body_that_is_no_object_is_told_so(body: Any) -> None:
    mistake = _mistake(ChatCompletionRequest, body)
    assert mistake.param is None
    assert mistake.message


def test_a_body_that_is_no_json_is_told_so() -> None:
    mistake = wrong_field([{"type": "json_invalid", "loc": ("body", 17), "msg": "JSON decode error"}], "{")
    assert (mistake.param, mistake.code) == (None, "invalid_json")


def test_a_body_that_is_not_there_is_told_so() -> None:
    mistake = wrong_field([{"type": "missing", "loc": ("body",), "msg": "Field required"}], None)
    assert (mistake.param, mistake.code) == (None, "invalid_json")


def test_nulls_ask_for_nothing() -> None:
    optional = {name for name, field in ChatCompletionRequest.model_fields.items() if not field.is_required()} - {
        "model"
    }
    whole = ChatCompletionRequest.model_validate(CHAT | dict.fromkeys(optional))
    assert whole.decoded() == ChatCompletionRequest.model_validate(CHAT).decoded()


def test_an_image_comes_as_a_data_url() -> None:
    data = b"\x89PNG\r\n"
    found = image(f"data:image/png;base64,{base64.b64encode(data).decode()}", "here")
    assert (found.data, found.where) == (data, "here")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:image/png;base64",
        "data:image/png,x",
        "data:text/html;base64,eA==",
        "data:image/png;base64,e",
        "data:image/png;base64,\u20ac",
        "data:image/png;base64,e A==",
        "https://example.com/cat.png",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "/etc/passwd",
    ],
)
def test_no_other_url_is_fetched_or_opened(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        image(url, "messages[0].content[1].image_url.url")
    assert caught.value.param == "messages[0].content[1].image_url.url"


def test_an_image_in_a_tool_s_result_is_refused_by_its_own_place() -> None:
    image_block = {"type": "image", "source": {"type": "url", "url": "https://example.com/cat.png"}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "See:"}, image_block]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, result]}]
    body = MessagesRequest.model_validate({"model": "org/m", "max_tokens": 5, "messages": messages})
    with pytest.raises(InvalidRequest) as caught:
        body.decoded(has_beta=False)
    assert caught.value.param == "messages[0].content[1].content[1].source.url"
