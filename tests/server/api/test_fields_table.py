"""docs/clients.md says of every field that the SDKs can send what becomes of it, and is right."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_params
from anthropic.types.beta import message_create_params as beta_create_params
from mlx_overlay_server.api.anthropic.wire import CountRequest, MessagesRequest
from mlx_overlay_server.api.audio.speech import SpeechBody
from mlx_overlay_server.api.audio.transcriptions import TranscriptionForm, TranslationForm
from mlx_overlay_server.api.fields import ModelBody
from mlx_overlay_server.api.openai.embeddings import EmbeddingsRequest
from mlx_overlay_server.api.openai.wire import ChatCompletionRequest, CompletionRequest
from mlx_overlay_server.api.rerank.routes import RerankRequest
from mlx_overlay_server.api.responses.wire import CompactRequest, InputTokensRequest, ResponsesRequest
from mlx_overlay_server.errors import InvalidRequest
from openai.types import completion_create_params, embedding_create_params
from openai.types.audio import speech_create_params, transcription_create_params, translation_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_compact_params, response_create_params
from pydantic import ValidationError
from starlette.datastructures import UploadFile

BODIES: dict[str, type[ModelBody]] = {
    "chat": ChatCompletionRequest,
    "text": CompletionRequest,
    "responses": ResponsesRequest,
    "input_tokens": InputTokensRequest,
    "compact": CompactRequest,
    "messages": MessagesRequest,
    "count_tokens": CountRequest,
    "embeddings": EmbeddingsRequest,
    "rerank": RerankRequest,
    "transcriptions": TranscriptionForm,
    "translations": TranslationForm,
    "speech": SpeechBody,
}
SDKS: dict[str, list[Any]] = {
    "chat": [
        chat_create_params.CompletionCreateParamsNonStreaming,
        chat_create_params.CompletionCreateParamsStreaming,
    ],
    "text": [
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ],
    "responses": [
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ],
    "input_tokens": [input_token_count_params.InputTokenCountParams],
    "compact": [response_compact_params.ResponseCompactParams],
    "messages": [
        message_create_params.MessageCreateParamsNonStreaming,
        message_create_params.MessageCreateParamsStreaming,
        beta_create_params.MessageCreateParamsNonStreaming,
        beta_create_params.MessageCreateParamsStreaming,
    ],
    "count_tokens": [
        message_count_tokens_params.MessageCountTokensParams,
        beta_count_params.MessageCountTokensParams,
    ],
    "embeddings": [embedding_create_params.EmbeddingCreateParams],
    "rerank": [],
    "transcriptions": [
        transcription_create_params.TranscriptionCreateParamsNonStreaming,
        transcription_create_params.TranscriptionCreateParamsStreaming,
    ],
    "translations": [translation_create_params.TranslationCreateParams],
    "speech": [speech_create_params.SpeechCreateParams],
}
LEAST: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
    "text": {"prompt": "Hi"},
    "responses": {"input": "Hi"},
    "input_tokens": {"input": "Hi"},
    "compact": {"input": "Hi"},
    "messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "embeddings": {"input": "Hi"},
    "rerank": {"query": "Hi", "documents": ["Hi"]},
    "transcriptions": {"file": UploadFile(io.BytesIO())},
    "translations": {"file": UploadFile(io.BytesIO())},
    "speech": {"input": "Hi", "voice": "anna"},
    "count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
}
STATUSES = {"done", "partly", "no effect", "refused"}


def _table() -> dict[str, dict[str, str]]:
    """The status of each field, by route."""
    page = (Path(__file__).resolve().parents[3] / "docs/clients.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for fields, routes, status in re.findall(r"^\| (`.+?`) \| ([a-z_, ]+) \| ([a-z ]+) \|", page, re.MULTILINE):
        for route in BODIES if routes == "all" else routes.split(", "):
            for field in re.findall(r"`([^`]+)`", fields):
                assert field not in found[route], f"{field} of {route} is in the table twice"
                found[route][field] = status
    return found


TABLE = _table()
_routes = pytest.mark.parametrize("route", BODIES)


def _sent_by_sdk(route: str) -> set[str]:
    return {name for params in SDKS[route] for name in params.__required_keys__ | params.__optional_keys__}


@_routes
def test_every_parameter_of_the_sdks_is_in_the_table(route: str) -> None:
    assert _sent_by_sdk(route) - {"betas"} <= TABLE[route].keys()


@_routes
def test_every_field_that_is_taken_is_in_the_table_and_no_other_is_said_to_be(route: str) -> None:
    taken = set(BODIES[route].model_fields)
    assert taken <= TABLE[route].keys()
    assert set(TABLE[route].values()) <= STATUSES
    said = {field for field, status in TABLE[route].items() if status in ("done", "partly")}
    if route != "count_tokens":  # which ignores what is not in the prompt
        said |= {field for field, status in TABLE[route].items() if status == "no effect"}
    assert said <= taken


@pytest.mark.parametrize(
    ("route", "field"),
    [(route, field) for route, fields in TABLE.items() for field, status in fields.items() if status == "refused"],
)
def test_a_field_that_is_refused_is_refused_by_its_name(route: str, field: str) -> None:
    sent = {"model": "m", **LEAST[route], field: {"x": 1}}
    if route == "messages":  # betas may add fields
        body = MessagesRequest.model_validate(sent)
        with pytest.raises(InvalidRequest) as refused:
            body.decoded(has_beta=False)
        assert refused.value.param == field
        return
    with pytest.raises(ValidationError) as wrong:
        BODIES[route].model_validate(sent)
    assert {error["loc"][0] for error in wrong.value.errors()} == {field}


# The names that other servers have ------------------------------------------------------------------------------


def _chat(**fields: Any) -> Any:
    return ChatCompletionRequest.model_validate({"model": "m", **LEAST["chat"], **fields}).decoded()


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("field", ["enable_thinking", "thinking", "reasoning"])
def test_reasoning_is_switched_by_the_names_that_other_servers_have(field: str, is_on: bool) -> None:
    values = {
        "enable_thinking": is_on,
        "thinking": {"type": "enabled" if is_on else "disabled"},
        "reasoning": {"enabled": is_on},
    }
    assert _chat(**{field: values[field]}).thinking is is_on
    assert _chat().thinking is None


def test_reasoning_has_an_effort_and_a_budget() -> None:
    asked = _chat(reasoning={"effort": "low", "max_tokens": 100})
    assert (asked.effort, asked.reasoning_budget) == ("low", 100)


def test_fields_that_disagree_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="disagree"):
        _chat(enable_thinking=True, thinking={"type": "disabled"})


@pytest.mark.parametrize("route", ["chat", "text"])
def test_the_repetition_penalty_has_two_names(route: str) -> None:
    body: Any = BODIES[route].model_validate({"model": "m", **LEAST[route], "repeat_penalty": 1.5})
    assert body.decoded().params.repetition_penalty == 1.5
