"""litellm against the server in SERVER_URL: texts, streams and tools in three dialects."""

from __future__ import annotations

import json
import os

import litellm

URL = os.environ["SERVER_URL"]
ASKED = [{"role": "user", "content": "Hi"}]
HELLO = "Hello there, general Kenobi."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
    },
}

for provider, base in {
    "openai": f"{URL}/v1",
    "hosted_vllm": f"{URL}/v1",
    "lm_studio": f"{URL}/v1",
    "anthropic": URL,
}.items():
    to = {"api_base": base, "api_key": "any", "max_tokens": 200, "num_retries": 0}
    whole = litellm.completion(model=f"{provider}/acme/hello", messages=ASKED, **to)
    assert whole.choices[0].message.content == HELLO, provider
    assert whole.usage.completion_tokens == 4, provider
    chunks = litellm.completion(model=f"{provider}/acme/hello", messages=ASKED, stream=True, **to)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HELLO, provider
    called = litellm.completion(model=f"{provider}/acme/weather", messages=ASKED, tools=[TOOL], **to).choices[0].message
    (call,) = called.tool_calls
    assert json.loads(call.function.arguments) == {"location": "San Francisco, CA"}, provider
    turns = [*ASKED, called.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    told = litellm.completion(model=f"{provider}/acme/weather", messages=turns, tools=[TOOL], **to)
    assert told.choices[0].message.content == "It is sunny.", provider

text = litellm.text_completion(
    model="text-completion-openai/acme/hello", prompt="Hi", max_tokens=20, api_base=f"{URL}/v1", api_key="any"
)
assert text.choices[0].text == HELLO
response = litellm.responses(model="openai/acme/hello", input="Hi", api_base=f"{URL}/v1", api_key="any")
assert response.output[0].content[0].text == HELLO
