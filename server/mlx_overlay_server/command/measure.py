"""Measures a server over HTTP: how long streams wait for their first token, and how fast they read and answer."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from hf_overlay import OverlayError

from mlx_overlay_server.command.client import Client, Refused

SECONDS = 3600.0
"""Longest wait for the next part of a stream."""
_WORDS = ("time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "family", "country")


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream as its client saw it. Times are in seconds since it was sent."""

    first: float
    """Its first token."""
    last: float
    prompt: int
    """Tokens of its prompt."""
    tokens: int
    """Tokens of its answer."""


@dataclass(frozen=True, slots=True)
class Round:
    """Some streams at once."""

    streams: int
    prompt: int
    """Tokens of the longest prompt."""
    first_p50: float
    first_max: float
    """Seconds until the first token."""
    prefill: float
    """Tokens of all prompts per second, until the last stream has its first token."""
    decode: float
    """Tokens of one stream per second, from its first to its last, the median."""
    total: float
    """Tokens of all answers per second, from the first to the last of all."""


def measured(server: Client, model: str, streams: int, *, prompt_tokens: int, tokens: int) -> Round:
    """Run some streams at once, with prompts that no cache has. Raises OverlayError."""
    done: list[Stream] = []
    failed: list[OverlayError] = []

    def run() -> None:
        try:
            done.append(_stream(server, model, _prompt(prompt_tokens), tokens))
        except OverlayError as error:
            failed.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return summary(done)


def summary(done: Sequence[Stream]) -> Round:
    """Return what some streams that were sent at once add up to."""
    first = [each.first for each in done]
    spans = [
        (each.tokens - 1) / (each.last - each.first) for each in done if each.tokens > 1 and each.last > each.first
    ]
    whole = max(each.last for each in done) - min(first)
    generated = sum(each.tokens for each in done) - 1
    return Round(
        streams=len(done),
        prompt=max(each.prompt for each in done),
        first_p50=statistics.median(first),
        first_max=max(first),
        prefill=sum(each.prompt for each in done) / max(first),
        decode=statistics.median(spans) if spans else 0.0,
        total=generated / whole if whole > 0 and generated > 0 else 0.0,
    )


def _prompt(tokens: int) -> str:
    """Return a text of about so many tokens, of which no other begins alike: words of one token each."""
    return " ".join([f"{random.getrandbits(64):x}", *random.choices(_WORDS, k=max(1, tokens - 16))])  # noqa: S311


def _stream(server: Client, model: str, prompt: str, tokens: int) -> Stream:
    """Run one stream to its end. Raises Refused, or OverlayError where it breaks off."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    if server.api_key:
        headers["Authorization"] = f"Bearer {server.api_key}"
    parts = urlsplit(server.url)
    connection = HTTPConnection(parts.hostname or "", parts.port or 80, timeout=SECONDS)
    try:
        began = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise Refused(_message(answer.read()), answer.status)
        return _read(answer, began)
    except (OSError, HTTPException, ValueError) as error:
        raise OverlayError(f"{server.url} broke off: {error}") from None
    finally:
        connection.close()


def _read(answer: HTTPResponse, began: float) -> Stream:
    first = last = None
    usage: dict[str, Any] = {}
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise OverlayError(str(event["error"]["message"]))
        if any(choice["text"] for choice in event["choices"]):
            last = time.monotonic() - began
            first = last if first is None else first
        usage = event.get("usage") or usage
    if first is None or last is None:
        raise OverlayError("the model ended its answer before it had a text; measure another one")
    return Stream(first, last, usage["prompt_tokens"], usage["completion_tokens"])


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server refused the request"
