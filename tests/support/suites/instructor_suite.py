"""instructor against the server in SERVER_URL: typed answers in each of its modes."""

from __future__ import annotations

import os

import anthropic
import instructor
import openai
from pydantic import BaseModel

URL = os.environ["SERVER_URL"]
ASKED = [{"role": "user", "content": "A joke"}]


class Joke(BaseModel):
    setup: str
    punchline: str


client = openai.OpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0)
for mode, model in {
    instructor.Mode.TOOLS: "acme/obliging",
    instructor.Mode.JSON: "acme/joke",
    instructor.Mode.JSON_SCHEMA: "acme/obliging",
    instructor.Mode.MD_JSON: "acme/joke",
}.items():
    typed = instructor.from_openai(client, mode=mode)
    joke = typed.chat.completions.create(
        model=model, response_model=Joke, messages=ASKED, max_tokens=200, max_retries=0
    )
    assert isinstance(joke, Joke), mode
    parts = list(
        typed.chat.completions.create_partial(
            model=model, response_model=Joke, messages=ASKED, max_tokens=200, max_retries=0
        )
    )
    assert parts[-1].setup == joke.setup, mode

claude = anthropic.Anthropic(base_url=URL, api_key="any", max_retries=0)
for mode, model in {
    instructor.Mode.ANTHROPIC_TOOLS: "acme/obliging",
    instructor.Mode.ANTHROPIC_JSON: "acme/joke",
}.items():
    typed = instructor.from_anthropic(claude, mode=mode)
    joke = typed.messages.create(model=model, response_model=Joke, messages=ASKED, max_tokens=200, max_retries=0)
    assert isinstance(joke, Joke), mode
