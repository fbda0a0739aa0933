"""Betas, usage and the list of models of the Messages API."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.e2e.anthropic.asking import (
    BOTH,
    CALLS,
    CLOCK,
    EPHEMERAL,
    HELLO,
    HI,
    PLAIN,
    THINKS,
    WEATHER,
    billed,
    reading_of,
    reply,
    text_of,
    wire,
)
from tests.support.dialects import Read, anthropic_sdk
from tests.support.server import Server

MODELS = ["acme/both", "acme/calls", "acme/counts", "acme/hot", "acme/once", "acme/plain", "acme/random", "acme/thinks"]


# Betas ----------------------------------------------------------------------------------------------------------


def test_unknown_betas_are_taken_with_the_fields_they_bring(sdk: Anthropic) -> None:
    message = reply(
        sdk,
        PLAIN,
        extra_headers={"anthropic-beta": "nobody-knows-2099-01-01,other-2099-01-02"},
        extra_body={"new_field": {"type": "x"}, "context_management": {"edits": []}},
    )
    assert text_of(message) == HELLO


def test_unknown_fields_without_a_beta_are_refused_by_name(sdk: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="`new_field` is not supported"):
        reply(sdk, PLAIN, extra_body={"new_field": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_the_beta_client_speaks_at_the_same_address_with_a_query(sdk: Anthropic, stream: bool) -> None:
    answer: Any = sdk.beta.messages.create(
        model=PLAIN,
        messages=HI,
        max_tokens=100,
        betas=["interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        stream=stream,
    )
    if not stream:
        assert answer.content[0].text == HELLO
        return
    events = list(answer)
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == HELLO


@pytest.mark.parametrize(
    "path", ["/v1/messages?beta=true", "/anthropic/v1/messages?beta=true&x=y", "/anthropic/v1/messages"]
)
def test_every_address_answers_whatever_its_query(server: Server, path: str) -> None:
    names = [name for name, _ in wire(server, path, model=PLAIN)]
    assert (names[0], names[-1]) == ("message_start", "message_stop")


def test_the_sdk_takes_the_anthropic_address_as_its_base(server: Server) -> None:
    with anthropic_sdk(server, root="/anthropic") as sdk:
        assert text_of(reply(sdk, PLAIN)) == HELLO
        assert sdk.messages.count_tokens(model=PLAIN, messages=HI).input_tokens == 22
        assert [model.id for model in sdk.models.list()] == MODELS
        assert sdk.models.retrieve(PLAIN).id == PLAIN


def test_another_version_of_the_api_is_answered_alike(sdk: Anthropic) -> None:
    assert text_of(reply(sdk, PLAIN, extra_headers={"anthropic-version": "2099-01-01"})) == HELLO


def test_a_request_without_a_version_is_answered(server: Server) -> None:
    answer = server.http.post("/v1/messages", json={"model": PLAIN, "messages": HI, "max_tokens": 1})
    assert answer.json()["content"] == [{"type": "text", "text": "Hello"}]


def test_clients_find_somebody_at_the_root(server: Server) -> None:
    answer = server.http.head("/")
    assert (answer.status_code, answer.content) == (200, b"")


# Usage ----------------------------------------------------------------------------------------------------------


def test_usage_says_what_the_cache_really_gave(sdk: Anthropic) -> None:
    """22: the markers of a prompt, "user", "assistant" and the line ends between; and "hi"."""
    first = reply(sdk, "acme/once", HI)
    assert (first.usage.input_tokens, first.usage.cache_read_input_tokens) == (22, 0)
    turns: list[Any] = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And?"}]
    second = reply(sdk, "acme/once", turns)
    assert second.usage.cache_read_input_tokens == 22
    assert reading_of(reply(sdk, "acme/once", turns)) == Read(reading_of(second).tokens, reading_of(second).tokens - 1)


HISTORY: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "é 👋", **EPHEMERAL}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "So.", "signature": ""},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "21"}]},
]


@pytest.mark.parametrize("model", [PLAIN, THINKS, CALLS, BOTH])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system": billed("x")},
        {"tools": [WEATHER, CLOCK]},
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "disabled"}, "system": "Be brief.", "messages": HISTORY},
    ],
)
def test_the_count_of_tokens_is_that_of_the_real_request(sdk: Anthropic, model: str, options: dict[str, Any]) -> None:
    asked = {"model": model, "messages": HI, **options}
    counted = sdk.messages.count_tokens(**asked).input_tokens
    assert counted == sdk.beta.messages.count_tokens(**asked, betas=["any-2099-01-01"]).input_tokens
    assert counted == reading_of(sdk.messages.create(**asked, max_tokens=1)).tokens


# Models ---------------------------------------------------------------------------------------------------------


def test_models_are_listed_in_anthropics_shape_for_its_clients(server: Server, sdk: Anthropic) -> None:
    page = sdk.models.list(limit=1000)
    assert [model.id for model in page.data] == MODELS
    assert {(model.type, model.id == model.display_name) for model in page.data} == {("model", True)}
    assert (page.has_more, page.first_id, page.last_id) == (False, MODELS[0], MODELS[-1])
    openai = server.http.get("/v1/models").json()
    assert (openai["object"], [model["object"] for model in openai["data"]]) == ("list", ["model"] * len(MODELS))


@pytest.mark.parametrize("root", ["", "/anthropic"])
def test_models_come_in_pages(server: Server, root: str) -> None:
    with anthropic_sdk(server, root=root) as sdk:
        first = sdk.models.list(limit=3)
        assert ([model.id for model in first.data], first.has_more) == (MODELS[:3], True)
        assert [model.id for model in first] == MODELS  # the SDK asks for the others
        last = sdk.models.list(limit=3, after_id=MODELS[5])
        assert ([model.id for model in last.data], last.has_more) == (MODELS[6:], False)
        before = sdk.models.list(limit=2, before_id=MODELS[3])
        assert ([model.id for model in before.data], before.has_more) == (MODELS[1:3], True)
        with pytest.raises(anthropic.BadRequestError, match="acme/none"):
            sdk.models.list(after_id="acme/none")
        with pytest.raises(anthropic.BadRequestError, match="limit"):
            sdk.models.list(limit=0)


@pytest.mark.parametrize("root", ["", "/anthropic"])
def test_one_model_is_found_by_its_id(server: Server, root: str) -> None:
    with anthropic_sdk(server, root=root) as sdk:
        model = sdk.models.retrieve(PLAIN)
        assert (model.id, model.display_name, model.type) == (PLAIN, PLAIN, "model")
        assert model.created_at.year > 2000
        with pytest.raises(anthropic.NotFoundError) as refused:
            sdk.models.retrieve("acme/none")
        assert refused.value.type == "not_found_error"
