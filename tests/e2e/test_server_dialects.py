"""One meaning in three dialects: chat completions, messages and responses tell the same, and refuse alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import pytest
from anthropic import Anthropic

from tests.support.dialects import anthropic_sdk
from tests.support.models import make_model
from tests.support.server import ChatAnswer, Server, joined, serving

HELLO = "Hello there, general Kenobi."
SUNNY = "It is sunny."
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OSLO, ROME = ("weather", '{"city": "Oslo"}'), ("weather", '{"city": "Rome"}')


def _call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("dialects")
    folder = top / "models" / "acme"
    make_model(folder / "plain", HELLO)
    make_model(folder / "brief", HELLO, is_brief=True)
    make_model(folder / "thinks", "<think>Hm. Well.</think>Yes, of course.", thinks=True)
    make_model(folder / "calls", f"Let me see. {_call(*OSLO)}", calls_tools=True, after_tool=SUNNY)
    both = f"<think>Hm.</think>Both. {_call(*OSLO)}{_call(*ROME)}"
    make_model(folder / "both", both, calls_tools=True, thinks=True, after_tool=SUNNY)
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server
        assert server.http.get("/health").json()["engine"]["failures"] == 0


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[Anthropic]:
    with anthropic_sdk(server) as client:
        yield client


# The same conversation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation, in no dialect."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """(name, arguments)."""


@dataclass(frozen=True)
class Talk:
    """What is asked, and what the answer must be."""

    model: str
    turns: tuple[Turn, ...]
    text: str
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    end: Literal["end", "length", "tool"] = "end"
    tokens: int = 0
    limit: int | None = None
    stop: tuple[str, ...] = ()
    has_tools: bool = False


HI = (Turn("system", "Be kind."), Turn("user", "hi"))
TALKS = {
    "text": Talk("acme/plain", HI, HELLO, tokens=4),
    "several turns": Talk("acme/plain", (*HI, Turn("assistant", "ho"), Turn("user", "é 👋")), HELLO, tokens=4),
    "reasoning": Talk("acme/thinks", HI, "Yes, of course.", "Hm. Well.", tokens=7),
    "reasoning in the history": Talk(
        "acme/thinks",
        (*HI, Turn("assistant", "Yes.", "So."), Turn("user", "And?")),
        "Yes, of course.",
        "Hm. Well.",
        tokens=7,
    ),
    "reasoning that is cut": Talk("acme/thinks", HI, "", "Hm.", end="length", tokens=2, limit=2),
    "a call": Talk("acme/calls", HI, "Let me see. ", calls=(OSLO,), end="tool", tokens=10, has_tools=True),
    "two calls": Talk("acme/both", HI, "Both. ", "Hm.", (OSLO, ROME), end="tool", tokens=18, has_tools=True),
    "a tool's answer": Talk(
        "acme/calls",
        (*HI, Turn("assistant", "Let me see. ", calls=(OSLO,)), Turn("tool", "21")),
        SUNNY,
        tokens=3,
        has_tools=True,
    ),
    "two tools' answers": Talk(
        "acme/both",
        (*HI, Turn("assistant", "Both. ", "Hm.", (OSLO, ROME)), Turn("tool", "21"), Turn("tool", "30")),
        SUNNY,
        tokens=3,
        has_tools=True,
    ),
    "a limit": Talk("acme/plain", HI, "Hello there,", end="length", tokens=2, limit=2),
    "a limit that is not met": Talk("acme/plain", HI, HELLO, tokens=4, limit=5),
    "a stop sequence": Talk("acme/plain", HI, "Hello there, gen", tokens=4, stop=("nowhere", "eral K")),
}
UNSTOPPABLE = [name for name, talk in TALKS.items() if not talk.stop]
"""Those that responses, which know no stop sequences, can ask for."""


@dataclass
class Told:
    """What a client makes of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    end: str | None = None
    prompt: int = 0
    cached: int = 0
    completion: int = 0


def _as_chat(talk: Talk) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn, ids in _with_ids(talk.turns):
        message: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.role == "tool":
            message["tool_call_id"] = ids[0]
        if turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [
                {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id_, (name, arguments) in zip(ids, turn.calls, strict=True)
            ]
        messages.append(message)
    tools = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": CITY}}]
    options = {"max_tokens": talk.limit, "stop": list(talk.stop) or None, "tools": tools if talk.has_tools else None}
    return {"model": talk.model, "messages": messages, **_given(options)}


def _as_messages(talk: Talk) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn, ids in _with_ids(talk.turns[1:]):
        blocks: list[dict[str, Any]] = []
        if turn.reasoning:
            blocks.append({"type": "thinking", "thinking": turn.reasoning, "signature": ""})
        if turn.role == "tool":
            blocks.append({"type": "tool_result", "tool_use_id": ids[0], "content": turn.text})
        elif turn.text:
            blocks.append({"type": "text", "text": turn.text})
        for id_, (name, arguments) in zip(ids, turn.calls, strict=turn.role != "tool"):
            blocks.append({"type": "tool_use", "id": id_, "name": name, "input": json.loads(arguments)})
        role = "user" if turn.role == "tool" else turn.role
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        else:
            messages.append({"role": role, "content": blocks})
    tools = [{"name": "weather", "description": "Now.", "input_schema": CITY}]
    options = {"stop_sequences": list(talk.stop) or None, "tools": tools if talk.has_tools else None}
    return {
        "model": talk.model,
        "system": talk.turns[0].text,
        "messages": messages,
        "max_tokens": talk.limit or 1000,
        "thinking": {"type": "adaptive"},
        **_given(options),
    }


def _as_responses(talk: Talk) -> dict[str, Any]:
    items: list[dict[str, Any]] = []
    for turn, ids in _with_ids(talk.turns[1:]):
        if turn.reasoning:
            content = [{"type": "reasoning_text", "text": turn.reasoning}]
            items.append({"type": "reasoning", "id": "rs_1", "summary": [], "content": content})
        if turn.role == "tool":
            items.append({"type": "function_call_output", "call_id": ids[0], "output": turn.text})
        else:
            items.append({"role": turn.role, "content": turn.text})
        for id_, (name, arguments) in zip(ids, turn.calls, strict=turn.role != "tool"):
            items.append({"type": "function_call", "call_id": id_, "name": name, "arguments": arguments})
    tools = [{"type": "function", "name": "weather", "description": "Now.", "parameters": CITY, "strict": False}]
    options = {"max_output_tokens": talk.limit, "tools": tools if talk.has_tools else None}
    return {"model": talk.model, "instructions": talk.turns[0].text, "input": items, **_given(options)}


def _with_ids(turns: Sequence[Turn]) -> Iterator[tuple[Turn, list[str]]]:
    """Turns with the ids of their calls, or of the call that they answer."""
    open_: list[str] = []
    count = 0
    for turn in turns:
        if turn.role == "tool":
            yield turn, [open_.pop(0)]
            continue
        open_ = [f"call_{count + at}" for at in range(len(turn.calls))]
        count += len(open_)
        yield turn, list(open_)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# The three askers ----------------------------------------------------------------------------------------------

_CHAT_ENDS = {"stop": "end", "length": "length", "tool_calls": "tool"}
_MESSAGES_ENDS = {"end_turn": "end", "stop_sequence": "end", "max_tokens": "length", "tool_use": "tool"}


def _chat(server: Server, sdk: Anthropic, talk: Talk, *, stream: bool) -> Told:
    asked = _as_chat(talk)
    if stream:
        chunks = server.chat_stream(**asked, stream_options={"include_usage": True})
        (answer,), usage = joined(chunks), chunks[-1].usage
    else:
        completion = server.chat(**asked)
        (choice,), usage = completion.choices, completion.usage
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]  # type: ignore[union-attr]
        reasoning = getattr(choice.message, "reasoning_content", None) or ""
        answer = ChatAnswer(choice.message.content or "", reasoning, calls, choice.finish_reason)
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    return Told(
        answer.content,
        answer.reasoning,
        answer.calls,
        _CHAT_ENDS[str(answer.finish)],
        usage.prompt_tokens,
        usage.prompt_tokens_details.cached_tokens or 0,
        usage.completion_tokens,
    )


def _anthropic(server: Server, sdk: Anthropic, talk: Talk, *, stream: bool) -> Told:
    asked = _as_messages(talk)
    message: Any
    if stream:
        with sdk.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = sdk.messages.create(**asked)
    assert (message.stop_reason == "stop_sequence") == (message.stop_sequence in talk.stop)
    told = Told(end=_MESSAGES_ENDS[message.stop_reason])
    for block in message.content:
        if block.type == "text":
            told.text += block.text
        elif block.type == "thinking":
            told.reasoning += block.thinking
        else:
            told.calls.append((block.name, json.dumps(block.input)))
    told.cached = message.usage.cache_read_input_tokens
    told.prompt = message.usage.input_tokens + told.cached
    told.completion = message.usage.output_tokens
    return told


def _responses(server: Server, sdk: Anthropic, talk: Talk, *, stream: bool) -> Told:
    response: Any
    if stream:
        with server.openai.responses.stream(**_as_responses(talk)) as events:
            *_, last = events
        response = last.response  # type: ignore[union-attr]  # the last event of any response has it
    else:
        response = server.openai.responses.create(**_as_responses(talk))
    told = Told(response.output_text)
    for item in response.output:
        if item.type == "reasoning":
            told.reasoning += "".join(part.text for part in item.content)
        elif item.type == "function_call":
            told.calls.append((item.name, item.arguments))
    told.end = "length" if response.status == "incomplete" else "tool" if told.calls else "end"
    told.prompt, told.completion = response.usage.input_tokens, response.usage.output_tokens
    told.cached = response.usage.input_tokens_details.cached_tokens
    assert response.usage.total_tokens == told.prompt + told.completion
    return told


Ask = Callable[..., Told]
ASKERS: dict[str, Ask] = {"chat": _chat, "messages": _anthropic, "responses": _responses}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("dialect", "name"),
    [(dialect, name) for dialect in ASKERS for name in (UNSTOPPABLE if dialect == "responses" else TALKS)],
)
def test_a_conversation_means_the_same_in_every_dialect(
    server: Server, sdk: Anthropic, dialect: str, name: str, stream: bool
) -> None:
    talk = TALKS[name]
    prompt = _chat(server, sdk, talk, stream=False).prompt
    told = ASKERS[dialect](server, sdk, talk, stream=stream)
    # The prompt was read just before, through chat completions: only its last token is not known.
    assert told == Told(talk.text, talk.reasoning, list(talk.calls), talk.end, prompt, prompt - 1, talk.tokens)


# Malformed bodies ----------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "acme/brief",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "call_1", "content": "21"},
        ],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["x"],
        "seed": 1,
        "n": 1,
        "logprobs": True,
        "top_logprobs": 1,
        "logit_bias": {"5": 1.5},
        "presence_penalty": 0.5,
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
        "tool_choice": "auto",
        "stream": False,
        "user": "me",
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "model": "acme/brief",
        "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "call_1",
                        "content": [{"type": "text", "text": "21"}],
                        "is_error": False,
                    }
                ],
            },
        ],
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop_sequences": ["x"],
        "tools": [{"name": "weather", "description": "Now.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1},
        "output_config": {"effort": "low"},
        "metadata": {"user_id": "me"},
        "stream": False,
    },
    "/v1/responses": {
        "model": "acme/brief",
        "instructions": "Be kind.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "eA=="},
            {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "21"},
            {"type": "custom_tool_call", "call_id": "call_2", "name": "apply", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "1"}]},
        ],
        "max_output_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_logprobs": 1,
        "tools": [
            {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False},
            {"type": "namespace", "name": "sky", "tools": [{"type": "function", "name": "weather"}]},
            {"type": "custom", "name": "apply", "description": "x"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": True,
        "stream": False,
        "metadata": {"a": "b"},
    },
    "/v1/completions": {
        "model": "acme/brief",
        "prompt": ["Hi", "So?"],
        "max_tokens": 2,
        "n": 1,
        "logprobs": 1,
        "echo": False,
        "stop": ["x"],
    },
}
WRONG: list[Any] = [
    *(None, True, -1, 1.5, 10**30, "", "\ud800\x00", [], [[None]]),
    *({"type": None}, {"type": "x"}, {"\ud800": "\ud800"}),
]
RAW = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
    "very deep": b"[" * 30_000,
    "deep in a field": b'{"model": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "no finite number": b'{"model": NaN, "temperature": Infinity, "messages": 1e999}',
    "a long number": b'{"model": ' + b"9" * 6_000 + b"}",
    "a field twice": b'{"model": "x", "model": 5}',
    "a byte order mark": b'\xef\xbb\xbf{"model": 5}',
}


def _check_refusal(path: str, answer: httpx2.Response) -> None:
    """An error has its dialect's shape, and a message of one line."""
    body = answer.json()
    error = body["error"]
    if "messages" in path:
        assert body.keys() == {"type", "error", "request_id"}
        assert (body["type"], error.keys()) == ("error", {"type", "message"})
        assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[answer.status_code]
    else:
        assert body.keys() == {"error"}
        assert (error.keys(), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")
        assert error["param"] is None or isinstance(error["param"], str)
    assert error["message"].strip()
    assert "\n" not in error["message"]
    assert len(answer.content) < 5000, "an error is no place to give back what was sent"


def _mutants(value: Any) -> Iterator[Any]:
    """A body with one part of it wrong, or left out: every part in turn."""
    yield from WRONG
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for place, part in list(places):
        for mutant in _mutants(part):
            changed = value.copy()
            changed[place] = mutant
            yield changed
        without = value.copy()
        del without[place]
        yield without


@pytest.mark.parametrize("path", BODIES)
def test_the_body_that_the_wrong_ones_are_made_of_is_right(server: Server, path: str) -> None:
    answer = server.http.post(path, json=BODIES[path])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "share"),
    [
        ("/v1/chat/completions", slice(None)),
        ("/v1/completions", slice(None)),
        ("/v1/responses", slice(None)),
        ("/v1/messages", slice(0, None, 2)),  # the same code reads the other half
        ("/v1/messages/count_tokens", slice(1, None, 2)),
    ],
)
def test_whatever_is_wrong_in_a_body_is_refused_in_the_dialects_shape(server: Server, path: str, share: slice) -> None:
    statuses = set()
    body = BODIES[path.removesuffix("/count_tokens")]
    for mutant in [*_mutants(body)][share]:
        answer = server.http.post(path, content=json.dumps(mutant), headers={"Content-Type": "application/json"})
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), f"{answer.status_code} {answer.text}: {mutant}"
        if answer.status_code != 200:
            _check_refusal(path, answer)
        elif answer.headers["content-type"].startswith("application/json"):
            json.loads(answer.content, parse_constant=pytest.fail)
    assert statuses >= {200, 400}


@pytest.mark.parametrize("path", [*BODIES, "/v1/messages/count_tokens", "/anthropic/v1/messages"])
@pytest.mark.parametrize("raw", RAW)
def test_a_body_that_is_no_request_is_refused_in_the_dialects_shape(server: Server, path: str, raw: str) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        answer = server.http.post(path, content=RAW[raw], headers={"Content-Type": kind})
        assert answer.status_code == 400, answer.text
        _check_refusal(path, answer)


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_is_refused_with_a_status_too(server: Server, path: str) -> None:
    for change, status in (({"model": "acme/none"}, 404), ({"temperature": 9}, 400), ({"model": 5}, 400)):
        for _ in range(10):  # a machine that is busy for a second has the stream begin before the model is looked for
            answer = server.http.post(path, json={**BODIES[path], "stream": True, **change})
            if answer.status_code == status:
                break
        assert answer.status_code == status
        _check_refusal(path, answer)
