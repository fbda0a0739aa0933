"""Messages that Anthropic's SDK gets from a real server: blocks, events, tools, thinking, usage, models, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import pytest
from anthropic import Anthropic
from anthropic.types import Message
from pydantic import BaseModel

from tests.support.dialects import Read, anthropic_sdk, async_anthropic_sdk, is_same, read_by_chat
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model, make_random_model
from tests.support.server import Server, serving

PLAIN, THINKS, CALLS, BOTH, RANDOM = "acme/plain", "acme/thinks", "acme/calls", "acme/both", "acme/random"
MODELS = ["acme/both", "acme/calls", "acme/counts", "acme/hot", "acme/once", "acme/plain", "acme/random", "acme/thinks"]
HELLO = "Hello there, general Kenobi."
SUNNY = "It is sunny."
COUNTS = "One two three four."
HI: list[Any] = [{"role": "user", "content": "hi"}]
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
SIGNATURE = "bWx4LW9tbmk="
KEY = "a-secret-key"
PIXEL = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},
}
WEATHER: dict[str, Any] = {"name": "weather", "description": "Now.", "input_schema": SCHEMA}
CLOCK: dict[str, Any] = {"name": "clock", "input_schema": {"type": "object", "properties": {}}}


def _call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("models")
    folder = top / "acme"
    make_model(folder / "plain", HELLO)
    make_model(folder / "once", HELLO)
    make_model(folder / "counts", COUNTS)
    make_model(folder / "thinks", "<think>Hm. Well.</think>Yes, of course.", thinks=True)
    make_model(folder / "calls", f"Let me see. {_call('weather', city='Oslo')}", calls_tools=True, after_tool=SUNNY)
    both = f"<think>Hm.</think>Both. {_call('weather', city='Oslo')}{_call('weather', city='Rome')}"
    make_model(folder / "both", both, calls_tools=True, thinks=True)
    make_random_model(folder / "random")
    _by_chance(make_random_model(folder / "hot"))
    return top


def _by_chance(model: Path) -> None:
    """Let a model sample unless a request says otherwise, as most do."""
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 1.0}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("home"), models, options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[Anthropic]:
    with anthropic_sdk(server) as client:
        yield client


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    """A server that takes one key, small bodies and one request at a time."""
    options = ["--offline", "--max-body", "20K", "--max-batch", "1", "--max-queue", "0", "--max-messages", "3"]
    home = tmp_path_factory.mktemp("home")
    with serving(home, models, options=options, environ={"MLX_OMNI_API_KEY": KEY}, api_key=KEY) as server:
        yield server
        assert KEY not in server.log()


def _ask(sdk: Anthropic, model: str, messages: str | list[Any] = "hi", **options: Any) -> Message:
    message: Message = sdk.messages.create(model=model, messages=_messages(messages), **{"max_tokens": 100, **options})
    return message


def _messages(messages: str | list[Any]) -> Any:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def _text(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def _read(message: Message) -> Read:
    """What an answer says of its prompt."""
    cached = message.usage.cache_read_input_tokens or 0
    return Read(message.usage.input_tokens + cached, cached)


def _is_read_as(
    server: Server, sdk: Anthropic, model: str, chat: list[Any], messages: list[Any] | str = "hi", **options: Any
) -> bool:
    """Whether a request has the prompt that chat completions make of `chat`."""
    return is_same(read_by_chat(server, model, chat), _read(_ask(sdk, model, messages, max_tokens=1, **options)))


def _plain(event: Any) -> dict[str, Any]:
    """An event as it came, names of this one answer left out."""
    told: dict[str, Any] = json.loads(event) if isinstance(event, str) else event.to_dict(mode="json")
    for part in (told.get("message", {}), told.get("content_block", {})):
        if "id" in part:
            part["id"] = part["id"].partition("_")[0]
    return told


def _stream(sdk: Anthropic, model: str, **options: Any) -> list[dict[str, Any]]:
    with sdk.messages.create(model=model, messages=HI, stream=True, **{"max_tokens": 100, **options}) as events:
        return [_plain(event) for event in events]


def _wire(server: Server, path: str = "/v1/messages", **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """A stream as it is on the wire: the name and the data of each event."""
    answer = server.http.post(path, json={"messages": HI, "max_tokens": 100, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    found = []
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = [line for line in part.splitlines() if not line.startswith(":")]
        found.append((name.removeprefix("event: "), _plain(data.removeprefix("data: "))))
    return found


# Answers -------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_message_of_exactly_these_fields(sdk: Anthropic) -> None:
    message = _ask(sdk, PLAIN, "What a nice day!")
    assert message.id.startswith("msg_")
    assert message.to_dict(mode="json") == {
        "id": message.id,
        "type": "message",
        "role": "assistant",
        "model": PLAIN,
        "content": [{"type": "text", "text": HELLO}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": message.usage.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": message.usage.cache_read_input_tokens,
            "output_tokens": 4,
        },
    }


def test_an_answer_is_cut_at_max_tokens(sdk: Anthropic) -> None:
    message = _ask(sdk, PLAIN, max_tokens=2)
    assert (_text(message), message.stop_reason, message.usage.output_tokens) == ("Hello there,", "max_tokens", 2)


def test_a_stop_sequence_is_named_and_never_said(sdk: Anthropic) -> None:
    message = _ask(sdk, "acme/counts", stop_sequences=["nowhere", "three", "two th"])
    assert (_text(message), message.stop_reason, message.stop_sequence) == ("One ", "stop_sequence", "two th")
    message = _ask(sdk, "acme/counts", stop_sequences=["nowhere"])
    assert (_text(message), message.stop_reason, message.stop_sequence) == (COUNTS, "end_turn", None)


def test_the_async_sdk_gets_the_same(server: Server) -> None:
    async def ask() -> tuple[Message, list[Any], Message]:
        async with async_anthropic_sdk(server) as sdk:
            whole, stream = await asyncio.gather(
                sdk.messages.create(model=PLAIN, messages=HI, max_tokens=100),
                sdk.messages.create(model=THINKS, messages=HI, max_tokens=100, stream=True),
            )
            types = [event.type async for event in stream]
            async with sdk.messages.stream(model=PLAIN, messages=HI, max_tokens=100) as helped:
                return whole, types, await helped.get_final_message()

    whole, types, final = asyncio.run(ask())
    assert _text(whole) == _text(final) == HELLO
    assert (types[0], types[-2:]) == ("message_start", ["message_delta", "message_stop"])


# Streams -------------------------------------------------------------------------------------------------------


def _start(model: str, read: Read) -> dict[str, Any]:
    usage = _usage(read, 0)
    head: dict[str, Any] = {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
    }
    return {"type": "message_start", "message": {**head, "stop_sequence": None, "usage": usage}}


def _usage(read: Read, output: int) -> dict[str, int]:
    return {
        "input_tokens": read.tokens - read.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": read.cached,
        "output_tokens": output,
    }


def _block(index: int, block: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": block},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def _end(reason: str, usage: dict[str, int], sequence: str | None = None) -> list[dict[str, Any]]:
    delta = {"stop_reason": reason, "stop_sequence": sequence}
    return [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]


def _joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring deltas of one kind as one: how many there are says only how fast they came."""
    joined: list[dict[str, Any]] = []
    for event in events:
        last = joined[-1] if joined else {}
        if (
            event["type"] == "content_block_delta" == last.get("type")
            and event["delta"]["type"] == last["delta"]["type"]
        ):
            kind = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
            name = kind[event["delta"]["type"]]
            delta = {**last["delta"], name: last["delta"][name] + event["delta"][name]}
            joined[-1] = {**last, "delta": delta}
        else:
            joined.append(event)
    return joined


def test_a_stream_of_text_is_these_events_in_this_order(sdk: Anthropic) -> None:
    read = _read(_ask(sdk, PLAIN))
    known = Read(read.tokens, read.tokens - 1)
    text = _block(0, {"type": "text", "text": ""}, {"type": "text_delta", "text": HELLO})
    expected = [_start(PLAIN, known), *text, *_end("end_turn", _usage(known, 4))]
    assert _joined(_stream(sdk, PLAIN)) == expected


def test_a_stream_of_thinking_text_and_calls_is_one_block_after_the_other(sdk: Anthropic) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "thinking": {"type": "adaptive"}}
    read = _read(_ask(sdk, BOTH, **options))
    known = Read(read.tokens, read.tokens - 1)
    call = {"type": "tool_use", "id": "call", "name": "weather", "input": {}}
    assert _joined(_stream(sdk, BOTH, **options)) == [
        _start(BOTH, known),
        *_block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "Hm."},
            {"type": "signature_delta", "signature": SIGNATURE},
        ),
        *_block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Both. "}),
        *_block(2, call, {"type": "input_json_delta", "partial_json": '{"city": "Oslo"}'}),
        *_block(3, call, {"type": "input_json_delta", "partial_json": '{"city": "Rome"}'}),
        *_end("tool_use", _usage(known, _ask(sdk, BOTH, **options).usage.output_tokens)),
    ]


def test_a_streams_end_names_the_stop_sequence(sdk: Anthropic) -> None:
    events = _stream(sdk, "acme/counts", stop_sequences=["three"])
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "three"}
    (_, whole, *_) = _joined(events)[1:]
    assert whole["delta"] == {"type": "text_delta", "text": "One two "}


def test_a_streams_end_says_that_it_was_cut(sdk: Anthropic) -> None:
    events = _stream(sdk, PLAIN, max_tokens=1)
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 1


def test_on_the_wire_each_event_has_its_name_and_a_ping_follows_the_start(server: Server) -> None:
    events = _wire(server, model=PLAIN)
    assert all(name == data["type"] for name, data in events)
    assert events[1] == ("ping", {"type": "ping"})
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("model", [PLAIN, THINKS, CALLS, BOTH])
def test_the_sdk_puts_a_stream_together_to_the_same_message(sdk: Anthropic, model: str) -> None:
    options: dict[str, Any] = {
        "model": model,
        "messages": HI,
        "max_tokens": 100,
        "thinking": {"type": "adaptive"},
        "tools": [WEATHER],
    }
    whole = sdk.messages.create(**options)
    with sdk.messages.stream(**options) as stream:
        said = [(event.type, getattr(event, event.type, None)) for event in stream]
        final = stream.get_final_message()
    assert _without_ids(final) == _without_ids(whole)
    assert "".join(str(text) for kind, text in said if kind == "text") == _text(whole)
    thought = "".join(block.thinking for block in whole.content if block.type == "thinking")
    assert "".join(str(text) for kind, text in said if kind == "thinking") == thought


def _without_ids(message: Message) -> tuple[list[Any], Any, int]:
    content = [{**block.to_dict(), "id": None, "parsed_output": None} for block in message.content]
    return content, message.stop_reason, message.usage.output_tokens


def test_the_text_stream_is_the_text(sdk: Anthropic) -> None:
    with sdk.messages.stream(model=THINKS, messages=HI, max_tokens=100) as stream:
        assert "".join(stream.text_stream) == stream.get_final_text() == "Yes, of course."


# System --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("Be kind.", "Be kind."),
        ([{"type": "text", "text": "Be good."}], "Be good."),
        ([{"type": "text", "text": "One.", **EPHEMERAL}, {"type": "text", "text": "Two."}], "One.\n\nTwo."),
    ],
)
def test_the_system_prompt_is_text_or_blocks(server: Server, sdk: Anthropic, system: Any, text: str) -> None:
    chat = [{"role": "system", "content": text}, *HI]
    assert _is_read_as(server, sdk, PLAIN, chat, system=system)


def test_a_system_message_in_the_middle_stays_there(server: Server, sdk: Anthropic) -> None:
    turns: list[Any] = [
        {"role": "user", "content": "first"},
        {"role": "system", "content": "Now be brief."},
        {"role": "user", "content": "second"},
    ]
    chat = [{"role": "system", "content": "Be."}, *turns]
    assert _is_read_as(server, sdk, PLAIN, chat, turns, system="Be.")


def _billed(hash_: str) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.197.{hash_}; cc_entrypoint=sdk-cli;"},
        {"type": "text", "text": "You are an agent.", **EPHEMERAL},
    ]


def test_what_a_client_bills_by_is_no_part_of_the_prompt(server: Server, sdk: Anthropic) -> None:
    chat = [{"role": "system", "content": "You are an agent."}, *HI]
    assert _is_read_as(server, sdk, PLAIN, chat, system=_billed("abc"))
    count = sdk.messages.count_tokens
    counted = {count(model=PLAIN, messages=HI, system=_billed(each)).input_tokens for each in ("abc", "longer-hash")}  # type: ignore[arg-type]
    assert len(counted) == 1
    again = _read(_ask(sdk, PLAIN, system=_billed("longer-hash")))
    assert again == Read(counted.pop(), again.tokens - 1)


# History -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "Which one?",
        [{"type": "text", "text": "Which one?"}],
        [{"type": "text", "text": "Which one?", "citations": None, **EPHEMERAL}],
        [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Which one?"}}],
    ],
)
def test_a_users_text_is_a_string_or_blocks(server: Server, sdk: Anthropic, content: Any) -> None:
    messages = [{"role": "user", "content": content}]
    assert _is_read_as(server, sdk, PLAIN, [{"role": "user", "content": "Which one?"}], messages)


@pytest.mark.parametrize("signature", ["", SIGNATURE, "of-another-server"])
def test_thinking_of_earlier_turns_is_read_and_redacted_thinking_is_left_out(
    server: Server, sdk: Anthropic, signature: str
) -> None:
    said = [
        {"type": "redacted_thinking", "data": "secret"},
        {"type": "thinking", "thinking": "So.", "signature": signature},
        {"type": "text", "text": "ho", **EPHEMERAL},
    ]
    last = {"role": "user", "content": "And?"}
    chat = [*HI, {"role": "assistant", "content": "ho", "reasoning_content": "So."}, last]
    messages = [*HI, {"role": "assistant", "content": said}, last]
    assert _is_read_as(server, sdk, THINKS, chat, messages, thinking={"type": "adaptive"})


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"content": "21 degrees"}, "21 degrees"),
        (
            {"content": [{"type": "text", "text": "21 "}, {"type": "text", "text": "degrees", **EPHEMERAL}]},
            "21 degrees",
        ),
        ({"content": "no such city", "is_error": True}, "Error: no such city"),
        ({"content": [{"type": "text", "text": "none"}], "is_error": True}, "Error: none"),
        ({"content": "fine", "is_error": False}, "fine"),
        ({"content": []}, ""),
        ({}, ""),
    ],
)
def test_a_tools_result_is_read_and_leads_to_the_models_answer(
    server: Server, sdk: Anthropic, result: dict[str, Any], text: str
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    use = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}, **EPHEMERAL}
    answered = {"type": "tool_result", "tool_use_id": "call_1", **result, **EPHEMERAL}
    messages: list[Any] = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "Well."}, use]}]
    messages += [{"role": "user", "content": [answered]}]
    chat = [*HI, {"role": "assistant", "content": "Well.", "tool_calls": [call]}]
    chat += [{"role": "tool", "tool_call_id": "call_1", "content": text}]
    assert _is_read_as(server, sdk, CALLS, chat, messages)
    assert _text(_ask(sdk, CALLS, messages)) == SUNNY


def test_several_results_come_before_what_the_user_says_with_them(server: Server, sdk: Anthropic) -> None:
    uses = [{"type": "tool_use", "id": f"call_{at}", "name": "weather", "input": {"at": at}} for at in range(2)]
    results = [{"type": "tool_result", "tool_use_id": f"call_{at}", "content": f"result {at}"} for at in range(2)]
    messages: list[Any] = [*HI, {"role": "assistant", "content": uses}]
    messages += [{"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]}]
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "weather", "arguments": f'{{"at": {at}}}'}}
        for at in range(2)
    ]
    chat = [*HI, {"role": "assistant", "content": "", "tool_calls": calls}]
    chat += [{"role": "tool", "tool_call_id": f"call_{at}", "content": f"result {at}"} for at in range(2)]
    assert _is_read_as(server, sdk, CALLS, [*chat, {"role": "user", "content": "And now?"}], messages)


def test_a_tool_loop_goes_from_the_question_to_the_answer(sdk: Anthropic) -> None:
    messages: list[Any] = list(HI)
    asked = _ask(sdk, CALLS, messages, tools=[WEATHER])
    text, use = asked.content
    assert (text.type, use.type, asked.stop_reason) == ("text", "tool_use", "tool_use")
    assert use.type == "tool_use"
    assert (use.name, use.input) == ("weather", {"city": "Oslo"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21"}
    messages += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    answered = _ask(sdk, CALLS, messages, tools=[WEATHER])
    assert (_text(answered), answered.stop_reason) == (SUNNY, "end_turn")
    assert (answered.usage.cache_read_input_tokens or 0) >= _read(asked).tokens


def test_an_image_is_refused_by_a_model_that_takes_none(sdk: Anthropic) -> None:
    image = {"type": "image", "source": PIXEL}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [image]}
    for content in ([image], [result]):
        with pytest.raises(anthropic.BadRequestError, match="does not take images"):
            _ask(sdk, PLAIN, [{"role": "user", "content": content}])


# Tools ---------------------------------------------------------------------------------------------------------


def test_any_json_schema_reaches_the_model_whole(server: Server, sdk: Anthropic) -> None:
    function = {"name": "weather", "description": "Now.", "parameters": SCHEMA}
    read = read_by_chat(server, CALLS, HI, tools=[{"type": "function", "function": function}])
    for tool in (WEATHER, {**WEATHER, **EPHEMERAL}, {"type": "custom", **WEATHER}):
        assert is_same(read, _read(_ask(sdk, CALLS, tools=[tool])))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "auto"}, None])
def test_the_model_decides_by_itself(sdk: Anthropic, choice: Any, stream: bool) -> None:
    message = _told(sdk, BOTH, stream=stream, tools=[WEATHER], **({"tool_choice": choice} if choice else {}))
    assert [(block["type"], block.get("input")) for block in message["content"]] == [
        ("text", None),
        ("tool_use", {"city": "Oslo"}),
        ("tool_use", {"city": "Rome"}),
    ]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_where_parallel_use_is_disabled(sdk: Anthropic, stream: bool) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = _told(sdk, BOTH, stream=stream, tools=[WEATHER], tool_choice=choice)
    assert [block["input"] for block in message["content"] if block["type"] == "tool_use"] == [{"city": "Oslo"}]
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [PLAIN, RANDOM, CALLS])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_that_is_demanded_is_made_and_fits_its_schema(
    sdk: Anthropic, choice: Any, model: str, stream: bool
) -> None:
    message = _told(sdk, model, stream=stream, tools=[WEATHER, {**WEATHER, "name": "climate"}], tool_choice=choice)
    (use,) = message["content"]
    assert (use["type"], message["stop_reason"]) == ("tool_use", "tool_use")
    assert use["name"] in ({"weather"} if "name" in choice else {"weather", "climate"})
    assert use["input"] in ({"city": "Oslo"}, {"city": "Rome"})


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_the_tool_that_is_named_is_called(sdk: Anthropic, name: str) -> None:
    message = _ask(sdk, PLAIN, tools=[WEATHER, CLOCK], tool_choice={"type": "tool", "name": name})
    assert [block.name for block in message.content if block.type == "tool_use"] == [name]


def test_without_a_choice_of_tools_the_model_is_shown_none(server: Server, sdk: Anthropic) -> None:
    assert _is_read_as(server, sdk, CALLS, HI, tools=[WEATHER], tool_choice={"type": "none"})
    message = _ask(sdk, CALLS, tools=[WEATHER], tool_choice={"type": "none"})
    assert {block.type for block in message.content} == {"text"}
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "none"}}, "no tool 'none'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
    ],
)
def test_tools_that_cannot_be_are_refused_by_name(sdk: Anthropic, options: Any, said: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=said):
        _ask(sdk, CALLS, **options)


def _told(sdk: Anthropic, model: str, *, stream: bool, **options: Any) -> dict[str, Any]:
    """A message as the SDK has it in the end, however it came."""
    if not stream:
        return _ask(sdk, model, **options).to_dict(mode="json")
    with sdk.messages.stream(model=model, messages=HI, **{"max_tokens": 100, **options}) as events:
        return events.get_final_message().to_dict(mode="json")


# Thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [{"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}])
def test_thinking_that_is_asked_for_is_a_block_with_a_signature(sdk: Anthropic, thinking: Any, stream: bool) -> None:
    thought, said = _told(sdk, THINKS, stream=stream, thinking=thinking)["content"]
    assert thought == {"type": "thinking", "thinking": "Hm. Well.", "signature": SIGNATURE}
    assert (said["type"], said["text"]) == ("text", "Yes, of course.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"thinking": {"type": "disabled"}}])
def test_thinking_that_is_not_asked_for_is_not_told(sdk: Anthropic, options: Any, stream: bool) -> None:
    (said,) = _told(sdk, THINKS, stream=stream, **options)["content"]
    assert (said["type"], said["text"]) == ("text", "Yes, of course.")


def test_the_template_is_told_whether_to_think(server: Server, sdk: Anthropic) -> None:
    off = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
    assert is_same(read_by_chat(server, THINKS, HI, **off), _read(_ask(sdk, THINKS)))
    disabled = _ask(sdk, THINKS, thinking={"type": "disabled"})
    assert is_same(read_by_chat(server, THINKS, HI, **off), _read(disabled))
    on = _read(_ask(sdk, THINKS, thinking={"type": "adaptive"}))
    assert is_same(on, read_by_chat(server, THINKS, HI))
    assert on.tokens < _read(disabled).tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_of_one_token_cuts_the_thinking_and_the_answer_follows(sdk: Anthropic, stream: bool) -> None:
    message = _told(sdk, THINKS, stream=stream, thinking={"type": "enabled", "budget_tokens": 1})
    assert [block.get("thinking") or block.get("text") for block in message["content"]] == ["Hm.", "Yes, of course."]
    assert message["usage"]["output_tokens"] == 6  # <think>, Hm., </think>, Yes,, of, course.


# Sampling and formats ------------------------------------------------------------------------------------------

COLD = [{"temperature": 0}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 1, "top_k": 1}, {"top_p": 0}]


@pytest.mark.parametrize("options", COLD)
def test_temperature_zero_means_zero(server: Server, sdk: Anthropic, options: Any) -> None:
    greedy = server.chat("acme/hot", HI, max_tokens=40, temperature=0).choices[0].message.content
    message = _ask(sdk, "acme/hot", max_tokens=40, extra_body=options)
    assert _text(message) == greedy


@pytest.mark.parametrize("options", [{}, {"temperature": 1}, {"top_p": 0.999}, {"top_k": 400}])
def test_other_temperatures_are_warm(server: Server, sdk: Anthropic, options: Any) -> None:
    greedy = server.chat("acme/hot", HI, max_tokens=40, temperature=0).choices[0].message.content
    assert _text(_ask(sdk, "acme/hot", max_tokens=40, extra_body=options)) != greedy


class Place(BaseModel):
    town: Literal["Oslo", "Bergen"]
    is_near: bool


def test_an_answer_is_held_to_a_schema(sdk: Anthropic) -> None:
    parsed = sdk.messages.parse(model=RANDOM, messages=HI, max_tokens=100, output_format=Place)
    assert isinstance(parsed.parsed_output, Place)
    schema = {"type": "json_schema", "schema": {**Place.model_json_schema(), "additionalProperties": False}}
    message = _ask(sdk, PLAIN, output_config={"format": schema, "effort": "low"})
    Place.model_validate_json(_text(message))


def test_what_asks_for_nothing_here_is_taken(sdk: Anthropic) -> None:
    message = _ask(
        sdk,
        PLAIN,
        metadata={"user_id": "user_1"},
        service_tier="auto",
        cache_control={"type": "ephemeral"},
        output_config={"effort": "high"},
    )
    assert _text(message) == HELLO


# Betas ---------------------------------------------------------------------------------------------------------


def test_unknown_betas_are_taken_with_the_fields_they_bring(sdk: Anthropic) -> None:
    message = _ask(
        sdk,
        PLAIN,
        extra_headers={"anthropic-beta": "nobody-knows-2099-01-01,other-2099-01-02"},
        extra_body={"new_field": {"type": "x"}, "context_management": {"edits": []}},
    )
    assert _text(message) == HELLO


def test_unknown_fields_without_a_beta_are_refused_by_name(sdk: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="`new_field` is not supported"):
        _ask(sdk, PLAIN, extra_body={"new_field": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_the_beta_client_speaks_at_the_same_address_with_a_query(sdk: Anthropic, stream: bool) -> None:
    answer: Any = sdk.beta.messages.create(
        model=PLAIN,
        messages=HI,
        max_tokens=100,
        betas=["interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        stream=stream,
    )
    if not stream:
        assert answer.content[0].text == HELLO
        return
    events = list(answer)
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == HELLO


@pytest.mark.parametrize(
    "path", ["/v1/messages?beta=true", "/anthropic/v1/messages?beta=true&x=y", "/anthropic/v1/messages"]
)
def test_every_address_answers_whatever_its_query(server: Server, path: str) -> None:
    names = [name for name, _ in _wire(server, path, model=PLAIN)]
    assert (names[0], names[-1]) == ("message_start", "message_stop")


def test_the_sdk_takes_the_anthropic_address_as_its_base(server: Server) -> None:
    with anthropic_sdk(server, root="/anthropic") as sdk:
        assert _text(_ask(sdk, PLAIN)) == HELLO
        assert sdk.messages.count_tokens(model=PLAIN, messages=HI).input_tokens == 22
        assert [model.id for model in sdk.models.list()] == MODELS
        assert sdk.models.retrieve(PLAIN).id == PLAIN


def test_another_version_of_the_api_is_answered_alike(sdk: Anthropic) -> None:
    assert _text(_ask(sdk, PLAIN, extra_headers={"anthropic-version": "2099-01-01"})) == HELLO


def test_a_request_without_a_version_is_answered(server: Server) -> None:
    answer = server.http.post("/v1/messages", json={"model": PLAIN, "messages": HI, "max_tokens": 1})
    assert answer.json()["content"] == [{"type": "text", "text": "Hello"}]


def test_clients_find_somebody_at_the_root(server: Server) -> None:
    answer = server.http.head("/")
    assert (answer.status_code, answer.content) == (200, b"")


# Usage ---------------------------------------------------------------------------------------------------------


def test_usage_says_what_the_cache_really_gave(sdk: Anthropic) -> None:
    """22: the markers of a prompt, "user", "assistant" and the line ends between; and "hi"."""
    first = _ask(sdk, "acme/once", HI)
    assert (first.usage.input_tokens, first.usage.cache_read_input_tokens) == (22, 0)
    turns: list[Any] = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And?"}]
    second = _ask(sdk, "acme/once", turns)
    assert second.usage.cache_read_input_tokens == 22
    assert _read(_ask(sdk, "acme/once", turns)) == Read(_read(second).tokens, _read(second).tokens - 1)


HISTORY: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "é 👋", **EPHEMERAL}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "So.", "signature": ""},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "21"}]},
]


@pytest.mark.parametrize("model", [PLAIN, THINKS, CALLS, BOTH])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system": _billed("x")},
        {"tools": [WEATHER, CLOCK]},
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        {"thinking": {"type": "adaptive"}},
        {"thinking": {"type": "disabled"}, "system": "Be brief.", "messages": HISTORY},
    ],
)
def test_the_count_of_tokens_is_that_of_the_real_request(sdk: Anthropic, model: str, options: dict[str, Any]) -> None:
    asked = {"model": model, "messages": HI, **options}
    counted = sdk.messages.count_tokens(**asked).input_tokens
    assert counted == sdk.beta.messages.count_tokens(**asked, betas=["any-2099-01-01"]).input_tokens
    assert counted == _read(sdk.messages.create(**asked, max_tokens=1)).tokens


# Models --------------------------------------------------------------------------------------------------------


def test_models_are_listed_in_anthropics_shape_for_its_clients(server: Server, sdk: Anthropic) -> None:
    page = sdk.models.list(limit=1000)
    assert [model.id for model in page.data] == MODELS
    assert {(model.type, model.id == model.display_name) for model in page.data} == {("model", True)}
    assert (page.has_more, page.first_id, page.last_id) == (False, MODELS[0], MODELS[-1])
    openai = server.http.get("/v1/models").json()
    assert (openai["object"], [model["object"] for model in openai["data"]]) == ("list", ["model"] * len(MODELS))


@pytest.mark.parametrize("root", ["", "/anthropic"])
def test_models_come_in_pages(server: Server, root: str) -> None:
    with anthropic_sdk(server, root=root) as sdk:
        first = sdk.models.list(limit=3)
        assert ([model.id for model in first.data], first.has_more) == (MODELS[:3], True)
        assert [model.id for model in first] == MODELS  # the SDK asks for the others
        last = sdk.models.list(limit=3, after_id=MODELS[5])
        assert ([model.id for model in last.data], last.has_more) == (MODELS[6:], False)
        before = sdk.models.list(limit=2, before_id=MODELS[3])
        assert ([model.id for model in before.data], before.has_more) == (MODELS[1:3], True)
        with pytest.raises(anthropic.BadRequestError, match="acme/none"):
            sdk.models.list(after_id="acme/none")
        with pytest.raises(anthropic.BadRequestError, match="limit"):
            sdk.models.list(limit=0)


@pytest.mark.parametrize("root", ["", "/anthropic"])
def test_one_model_is_found_by_its_id(server: Server, root: str) -> None:
    with anthropic_sdk(server, root=root) as sdk:
        model = sdk.models.retrieve(PLAIN)
        assert (model.id, model.display_name, model.type) == (PLAIN, PLAIN, "model")
        assert model.created_at.year > 2000
        with pytest.raises(anthropic.NotFoundError) as refused:
            sdk.models.retrieve("acme/none")
        assert refused.value.type == "not_found_error"


# Errors --------------------------------------------------------------------------------------------------------


def _check(error: anthropic.APIStatusError, status: int, kind: str) -> None:
    """An error has Anthropic's shape, and a message of one line."""
    body: Any = error.body
    assert (error.status_code, error.type) == (status, kind)
    assert body.keys() == {"type", "error", "request_id"}
    assert (body["type"], body["error"].keys()) == ("error", {"type", "message"})
    assert body["error"]["message"]
    assert "\n" not in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(sdk: Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.NotFoundError) as refused:
        _ask(sdk, "acme/none", stream=stream)
    _check(refused.value, 404, "not_found_error")
    with pytest.raises(anthropic.NotFoundError) as refused:
        sdk.messages.count_tokens(model="acme/none", messages=HI)
    _check(refused.value, 404, "not_found_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_know(sdk: Anthropic, stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum") as refused:
        _ask(sdk, PLAIN, "x" * 5000, stream=stream)
    _check(refused.value, 400, "invalid_request_error")


def test_a_foreign_host_is_refused(server: Server) -> None:
    with (
        anthropic_sdk(server, default_headers={"Host": "evil.example"}) as sdk,
        pytest.raises(anthropic.PermissionDeniedError) as refused,
    ):
        _ask(sdk, PLAIN)
    _check(refused.value, 403, "permission_error")


@pytest.mark.parametrize("options", [{"api_key": KEY}, {"auth_token": KEY}])
def test_the_sdk_opens_the_server_with_its_key(narrow: Server, options: dict[str, str]) -> None:
    with anthropic_sdk(narrow, **options) as sdk:
        assert _text(_ask(sdk, PLAIN)) == HELLO
        assert sdk.models.retrieve(PLAIN).id == PLAIN


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/anthropic/v1/messages"])
@pytest.mark.parametrize("headers", [{"x-api-key": KEY}, {"Authorization": f"Bearer {KEY}"}])
def test_a_key_is_taken_from_either_header(narrow: Server, headers: dict[str, str], path: str) -> None:
    body = {"model": PLAIN, "messages": HI, "max_tokens": 1}
    assert narrow.http.post(path, json=body, headers=headers).status_code == 200
    wrong = {name: f"{value}r" for name, value in headers.items()}
    for refused in (narrow.http.post(path, json=body, headers=wrong), narrow.http.post(path, json=body)):
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize("options", [{"api_key": "wrong"}, {"auth_token": "wrong"}, {"api_key": "é"}])
def test_a_wrong_key_opens_nothing(narrow: Server, options: dict[str, str]) -> None:
    with anthropic_sdk(narrow, **options) as sdk:
        for ask in (lambda: _ask(sdk, PLAIN), lambda: sdk.models.list(), lambda: sdk.models.retrieve(PLAIN)):
            with pytest.raises(anthropic.AuthenticationError) as refused:
                ask()
            _check(refused.value, 401, "authentication_error")
            assert "wrong" not in refused.value.message


def test_a_body_that_is_too_large_is_refused(narrow: Server) -> None:
    with anthropic_sdk(narrow) as sdk, pytest.raises(anthropic.RequestTooLargeError) as refused:
        _ask(sdk, PLAIN, "x" * 30_000)
    _check(refused.value, 413, "request_too_large")


def test_too_many_messages_are_refused(narrow: Server) -> None:
    with anthropic_sdk(narrow) as sdk, pytest.raises(anthropic.BadRequestError) as refused:
        _ask(sdk, PLAIN, HI * 5)
    _check(refused.value, 400, "invalid_request_error")


def test_a_request_too_many_is_told_to_come_again(narrow: Server) -> None:
    with anthropic_sdk(narrow) as sdk:
        with sdk.messages.create(model=RANDOM, messages=HI, max_tokens=4000, stream=True) as first:
            next(iter(first))
            with pytest.raises(anthropic.RateLimitError) as refused:
                _ask(sdk, PLAIN)
        _check(refused.value, 429, "rate_limit_error")
        assert refused.value.response.headers["retry-after"] == "1"


def test_a_route_that_is_not_there_answers_in_anthropics_shape(server: Server) -> None:
    for path, status in (("/anthropic/v1/nothing", 404), ("/v1/messages/batches", 404)):
        answer = server.http.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "not_found_error")
    answer = server.http.get("/v1/messages")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")


# Waiting -------------------------------------------------------------------------------------------------------

SLOW = "acme/slow"


@pytest.fixture(scope="module")
def downloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, LoopbackHub]]:
    """A server that has nothing yet, and the Hub from which it gets a model as fast as the test wants."""
    top = tmp_path_factory.mktemp("downloading")
    with LoopbackHub() as hub:
        hub.add_repo(SLOW, make_model(top / "slow", HELLO))
        environ = hub.environment(top / "home", HF_HUB_OFFLINE="0")
        own = {name: value for name, value in environ.items() if name.startswith(("HF_", "NO_PROXY"))}
        with serving(top / "home", environ=own) as server:
            yield server, hub


def test_pings_come_while_a_model_is_on_its_way(downloading: tuple[Server, LoopbackHub]) -> None:
    server, hub = downloading
    hub.hang(60)
    body = {"model": SLOW, "messages": HI, "max_tokens": 100, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith(": ")
        assert [next(lines), next(lines)] == ["event: ping", 'data: {"type":"ping"}']
        hub.heal()
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    names = names[names.index("message_start") :]
    assert (names[1:3], names[-1]) == (["ping", "content_block_start"], "message_stop")


def test_the_sdk_waits_through_pings(downloading: tuple[Server, LoopbackHub]) -> None:
    with anthropic_sdk(downloading[0]) as sdk, sdk.messages.stream(model=SLOW, messages=HI, max_tokens=100) as stream:
        assert stream.get_final_text() == HELLO


def test_an_error_after_pings_is_an_event_that_the_sdk_raises(downloading: tuple[Server, LoopbackHub]) -> None:
    server, hub = downloading
    hub.hang(60)
    body = {"model": "acme/nowhere", "messages": HI, "max_tokens": 100, "stream": True}
    with server.http.stream("POST", "/v1/messages", json=body) as answer:
        lines = answer.iter_lines()
        assert "event: ping" in (next(lines), next(lines))
        hub.heal()
        names = [line for line in lines if line.startswith("event: ")]
    assert names[-1] == "event: error"
    with anthropic_sdk(server) as sdk:
        hub.hang(2)  # twice as long as a stream waits before it begins
        with pytest.raises(anthropic.APIStatusError, match="acme/nowhere") as refused:
            _stream(sdk, "acme/nowhere")
    assert refused.value.type == "not_found_error"


def test_an_assistant_message_at_the_end_is_the_beginning_of_the_answer(server: Server) -> None:
    """Nothing comes between it and the answer: no end of a turn, no beginning of another."""
    question = {"role": "user", "content": "Hi"}
    sizes = [
        server.http.post("/v1/messages/count_tokens", json={"model": PLAIN, "messages": messages}).json()
        for messages in ([question], [question, {"role": "assistant", "content": "It is"}])
    ]
    assert sizes[1]["input_tokens"] - sizes[0]["input_tokens"] == len("It is"), "a byte is a token of this model"
