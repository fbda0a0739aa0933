"""pydantic-ai against the server in SERVER_URL: texts, tools and typed answers, whole and streamed."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

URL = os.environ["SERVER_URL"]
OPENAI = OpenAIProvider(base_url=f"{URL}/v1", api_key="any")
ANTHROPIC = AnthropicProvider(base_url=URL, api_key="any")
SETTINGS = ModelSettings(max_tokens=200)


class Joke(BaseModel):
    setup: str
    punchline: str


def get_weather(location: str) -> str:
    """The weather at a place."""
    return f"sunny in {location}"


def _model(kind: str, name: str) -> Any:
    if kind == "messages":
        return AnthropicModel(name, provider=ANTHROPIC)
    return (OpenAIChatModel if kind == "chat" else OpenAIResponsesModel)(name, provider=OPENAI)


async def main() -> None:
    """Ask in every way."""
    for kind in ("chat", "responses", "messages"):
        plain = await Agent(_model(kind, "acme/hello"), model_settings=SETTINGS, system_prompt="Be kind.").run("Hi")
        assert plain.output == "Hello there, general Kenobi.", plain.output
        async with Agent(_model(kind, "acme/hello"), model_settings=SETTINGS).run_stream("Hi") as streamed:
            assert await streamed.get_output() == plain.output
        again = await Agent(_model(kind, "acme/hello"), model_settings=SETTINGS).run(
            "And?", message_history=plain.all_messages()
        )
        assert again.output == plain.output
        assert plain.usage.output_tokens == 4, plain.usage
        told = await Agent(_model(kind, "acme/weather"), model_settings=SETTINGS, tools=[get_weather]).run("Weather?")
        assert told.output == "It is sunny.", told.output
        forced = await Agent(_model(kind, "acme/obliging"), model_settings=SETTINGS, output_type=ToolOutput(Joke)).run(
            "A joke"
        )
        assert isinstance(forced.output, Joke)
        prompted = await Agent(
            _model(kind, "acme/joke"), model_settings=SETTINGS, output_type=PromptedOutput(Joke)
        ).run("A joke")
        assert prompted.output == Joke(setup="Why?", punchline="So.")
    for model in (
        OpenAIChatModel("acme/obliging", provider=OPENAI),
        OpenAIResponsesModel("acme/obliging", provider=OPENAI),
    ):
        native = await Agent(model, model_settings=SETTINGS, output_type=NativeOutput(Joke)).run("A joke")
        assert isinstance(native.output, Joke)


asyncio.run(main())
