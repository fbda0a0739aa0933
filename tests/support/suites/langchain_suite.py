"""LangChain's standard tests of chat models, against the server in SERVER_URL; run by a pytest of its own."""

from __future__ import annotations

import os
from typing import Any

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

URL = os.environ["SERVER_URL"]
_MODELS = {
    "test_tool_calling_with_no_arguments": "noargs",
    "test_agent_loop": "weather",
    "test_unicode_tool_call_integration": "obliging",
    "test_tool_choice": "obliging",
    "test_tool_calling": "obliging",
    "test_bind_runnables_as_tools": "obliging",
    "test_json_mode": "joke",
    "test_structured_output": "obliging",
    "test_structured_few_shot_examples": "obliging",
}
"""The model that says what a test wants to hear, by the beginning of the test's name; the longest counts."""


class _Suite(ChatModelIntegrationTests):
    """The tests that apply to a server of texts and calls."""

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> BaseChatModel:
        test = request.node.name
        name = max((each for each in _MODELS if test.startswith(each)), key=len, default="")
        params = {
            **self.standard_chat_model_params,
            **self.chat_model_params,
            **(getattr(request, "param", None) or {}),
        }
        made: BaseChatModel = self.chat_model_class(**{**params, "model": f"acme/{_MODELS.get(name, 'hello')}"})
        return made


class TestChatCompletions(_Suite):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": f"{URL}/v1",
            "api_key": "any",
            "max_tokens": 200,
            "max_retries": 0,
            "stream_usage": True,
            "model": "acme/hello",
        }

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestResponses(TestChatCompletions):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "use_responses_api": True}


class TestMessages(_Suite):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"base_url": URL, "api_key": "any", "max_tokens": 200, "max_retries": 0, "model": "acme/hello"}

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True
