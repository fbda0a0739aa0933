"""Measures a server over HTTP: the time to the first token, and the speed of reading and answering."""

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
"""The longest wait for the next part of a stream."""
_WORDS = ("time", "year", "people", "way", "day", "thing", "life", "child", "world", "school", "family", "country")


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream, as its client saw it. Times are in seconds since the request was sent."""

    first: float
    """When its first token came."""
    last: float
    prompt: int
    """Tokens of its prompt."""
    tokens: int
    """Tokens of its answer."""


@dataclass(frozen=True, slots=True)
class Round:
    """The figures of some streams that ran at once."""

    streams: int
    prompt: int
    """Tokens of the longest prompt."""
    first_p50: float
    first_max: float
    """The longest time to a first token, in seconds."""
    prefill: float
    """Tokens of all prompts per second, until the last stream had its first token."""
    decode: float
    """Tokens per second of one stream, from its first token to its last; the median of all streams."""
    total: float
    """Tokens of all answers per second, from the first token of all to the last."""


def measured(server: Client, model: str, streams: int, *, prompt_tokens: int, tokens: int) -> Round:
    """Run some streams at once, with prompts that are in no cache. Raises OverlayError."""
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
    """Return the figures of some streams that ran at once."""
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
    """Return a text of about so many tokens that begins like no other one: words of one token each."""
    return " ".join([f"{random.getrandbits(64):x}", *random.choices(_WORDS, k=max(1, tokens - 16))])  # noqa: S311


def _stream(server: Client, model: str, prompt: str, tokens: int) -> Stream:
    """Run one stream to its end. Raises Refused, and OverlayError where it breaks off."""
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
