"""LlamaIndex's OpenAI-compatible model against the server in SERVER_URL: texts, streams, tools and typed answers."""

from __future__ import annotations

import os

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

URL = os.environ["SERVER_URL"]
HELLO = "Hello there, general Kenobi."


def get_weather(location: str) -> str:
    """The weather at a place."""
    return f"sunny in {location}"


def model(name: str, *, is_chat: bool = True) -> OpenAILike:
    """A model of the server's."""
    return OpenAILike(
        model=name,
        api_base=f"{URL}/v1",
        api_key="any",
        is_chat_model=is_chat,
        is_function_calling_model=True,
        max_tokens=200,
        max_retries=0,
    )


asked = [ChatMessage(role="system", content="Be kind."), ChatMessage(role="user", content="Hi")]
assert model("acme/hello").chat(asked).message.content == HELLO
assert "".join(part.delta or "" for part in model("acme/hello").stream_chat(asked)) == HELLO
assert model("acme/hello", is_chat=False).complete("Hi").text == HELLO
assert "".join(part.delta or "" for part in model("acme/hello", is_chat=False).stream_complete("Hi")) == HELLO
weather = model("acme/weather")
tool = FunctionTool.from_defaults(get_weather)
told = weather.chat_with_tools([tool], user_msg="Weather?")
(call,) = weather.get_tool_calls_from_response(told)
assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"location": "San Francisco, CA"})
