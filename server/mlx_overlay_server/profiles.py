"""Profiles: what requests for a model get where they say nothing themselves. Pure functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from hf_overlay import configfile

from mlx_overlay_server.chat.requests import OURS, ChatRequest, Message, TextRequest
from mlx_overlay_server.settings import KV_BITS, KV_GROUP_SIZES, Profile

R = TypeVar("R", bound=ChatRequest | TextRequest)


class Mistake(ValueError):
    """A profile that is not valid; `keys` leads to the mistake in it."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def read(name: str, table: Mapping[str, Any]) -> Profile:
    """Return the profile that a table of the configuration file describes. Raises Mistake."""
    known = {each.name for each in fields(Profile)}
    for key, value in table.items():
        if key not in known:
            raise Mistake(f"a profile has no setting {key!r}; it has {', '.join(sorted(known))}", key)
        is_good, wanted = _RULES[key]
        if not is_good(value):
            raise Mistake(f"{key} must be {wanted}", key)
    if ours := sorted(OURS & table.get("chat_template_kwargs", {}).keys()):
        raise Mistake(
            f"the server sets {ours[0]} of chat templates itself; leave it out", "chat_template_kwargs", ours[0]
        )
    if "model" not in table and "/" not in name:
        raise Mistake(f'the profile {name!r} needs the model that it is for; write model = "org/name" below it')
    if "num_draft_tokens" in table and "draft_model" not in table:
        raise Mistake("num_draft_tokens is for a draft model; write draft_model beside it", "num_draft_tokens")
    given = {"model": name, **table}
    for key in ("chat_template", "adapter_path"):
        if key in given:
            given[key] = os.path.expanduser(given[key])
    if "chat_template" in given:
        try:
            text = configfile.read_file(given["chat_template"]).decode("utf-8")
            given["chat_template"] = text.replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise Mistake(f"the chat template cannot be read: {reason}; correct its path", "chat_template") from None
    return Profile(**given)


def applied(profile: Profile, request: R) -> R:
    """Return a request in which the profile's values stand where it has none of its own."""
    own = request.params
    params = replace(
        own,
        temperature=_first(own.temperature, profile.temperature),
        top_p=_first(own.top_p, profile.top_p),
        top_k=_first(own.top_k, profile.top_k),
        min_p=_first(own.min_p, profile.min_p),
        repetition_penalty=_first(own.repetition_penalty, profile.repetition_penalty),
        max_tokens=_first(own.max_tokens, profile.max_tokens),
    )
    request = replace(request, params=params, context=profile.context)
    if not isinstance(request, ChatRequest):
        return request
    messages = request.messages
    if profile.system is not None and not any(message.role == "system" for message in messages):
        messages = (Message("system", (profile.system,)), *messages)
    return replace(
        request,
        messages=messages,
        chat_template=profile.chat_template,
        template_kwargs={**profile.chat_template_kwargs, **request.template_kwargs},
        reasoning_budget=_first(request.reasoning_budget, profile.reasoning_budget),
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _is_number(low: float, high: float) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_count(least: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_one_of(*choices: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value in choices


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and (os.path.isabs(value) or value.startswith("~/"))


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, 'the id of a model; write "org/name"'),
    "context": (_is_count(1), "a number of tokens, 1 or more"),
    "max_tokens": (_is_count(1), "a number of tokens, 1 or more"),
    "temperature": (_is_number(0, 2), "a number from 0 to 2"),
    "top_p": (_is_number(0, 1), "a number from 0 to 1"),
    "top_k": (_is_count(0), "a whole number, 0 or more"),
    "min_p": (_is_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (_is_number(0.01, 10), "a number above 0"),
    "system": (_is_text, "a text"),
    "chat_template": (_is_path, "the whole path of a file, or one that begins with ~/"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "a table of the template's arguments"),
    "reasoning_budget": (_is_count(0), "a number of tokens, 0 or more"),
    "draft_model": (_is_text, 'the id of a model; write "org/name"'),
    "adapter_path": (_is_path, "the whole path of a folder, or one that begins with ~/"),
    "kv_bits": (_is_one_of(0, *KV_BITS), f"one of {', '.join(map(str, KV_BITS))}, or 0 for KV caches as they are"),
    "kv_group_size": (_is_one_of(*KV_GROUP_SIZES), f"one of {', '.join(map(str, KV_GROUP_SIZES))}"),
    "quantized_kv_start": (_is_count(0), "a number of tokens, 0 or more"),
    "num_draft_tokens": (_is_count(1), "a number of tokens, 1 or more"),
    "pin": (lambda value: isinstance(value, bool), "true or false"),
    "idle_ttl": (_is_number(0, 1e9), "a number of seconds, 0 or more"),
}
"""For each setting: whether a value is valid, and what the message about an invalid one asks for."""
