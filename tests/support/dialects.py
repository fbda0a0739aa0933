"""Anthropic's SDK at a server, and what a server read of a conversation, whichever dialect told it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

from anthropic import Anthropic, AsyncAnthropic, DefaultAsyncHttpxClient, DefaultHttpxClient

from tests.support.processes import SECONDS
from tests.support.server import Server


@contextmanager
def anthropic_sdk(server: Server, *, root: str = "", **options: Any) -> Iterator[Anthropic]:
    """Anthropic's SDK, pointed at `root` below the server's address. Tries once and checks the types of all it is told.

    `options` are the SDK's own: by default it sends the server's key as `x-api-key`.
    """
    with (
        DefaultHttpxClient(trust_env=False) as http,
        Anthropic(**_options(server, root, options), http_client=http) as client,
    ):
        yield client


@asynccontextmanager
async def async_anthropic_sdk(server: Server) -> AsyncIterator[AsyncAnthropic]:
    """The same, for one event loop."""
    async with (
        DefaultAsyncHttpxClient(trust_env=False) as http,
        AsyncAnthropic(**_options(server, "", {}), http_client=http) as client,
    ):
        yield client


def _options(server: Server, root: str, options: dict[str, Any]) -> dict[str, Any]:
    key = {} if options.keys() & {"api_key", "auth_token"} else {"api_key": server.api_key}
    return {
        "base_url": f"{server.url}{root}",
        "max_retries": 0,
        "timeout": SECONDS,
        "_strict_response_validation": True,
        **key,
        **options,
    }


class Read(NamedTuple):
    """How many tokens a prompt had, and how many of them were known from an earlier one."""

    tokens: int
    cached: int


def read_by_chat(server: Server, model: str, messages: Sequence[Any], **options: Any) -> Read:
    """Let a conversation be read as a chat completion.

    A prompt that is read next and is known but for its last token, which is always read again, is the same prompt.
    """
    usage = server.chat(model, messages, max_tokens=1, **options).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return Read(usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0)


def is_same(before: Read, now: Read) -> bool:
    """Whether a prompt, read right after another, has the same tokens."""
    return now == Read(before.tokens, before.tokens - 1)
