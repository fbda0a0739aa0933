"""Responses that OpenAI's SDK gets from a real server: items, events, tools, reasoning, formats, stored responses."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel, ConfigDict

from tests.support.dialects import Read, is_same, read_by_chat
from tests.support.loopback_hub import LoopbackHub
from tests.support.models import make_model, make_random_model
from tests.support.server import Server, serving

PLAIN, THINKS, CALLS, BOTH, RANDOM = "acme/plain", "acme/thinks", "acme/calls", "acme/both", "acme/random"
HELLO = "Hello there, general Kenobi."
SUNNY = "It is sunny."
OSLO = '{"city": "Oslo"}'
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "Now.", "parameters": CITY}
WEATHER: dict[str, Any] = {"type": "function", **FUNCTION, "strict": True}
CLIMATE: dict[str, Any] = {"type": "function", **FUNCTION, "name": "climate", "strict": False}
CUSTOM: dict[str, Any] = {"type": "custom", "name": "apply", "description": "Takes text."}
SEARCH: dict[str, Any] = {"type": "web_search", "search_context_size": "low"}


def _call(name: str, **arguments: str) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("responses")
    folder = top / "models" / "acme"
    make_model(folder / "plain", HELLO)
    make_model(folder / "once", HELLO)
    make_model(folder / "thinks", "<think>Hm. Well.</think>Yes, of course.", thinks=True)
    make_model(folder / "calls", f"Let me see. {_call('weather', city='Oslo')}", calls_tools=True, after_tool=SUNNY)
    both = f"<think>Hm.</think>Both. {_call('weather', city='Oslo')}{_call('weather', city='Rome')}"
    make_model(folder / "both", both, calls_tools=True, thinks=True)
    make_model(folder / "applies", _call("apply", input="*** Begin é\n"), calls_tools=True, after_tool=SUNNY)
    make_model(folder / "apart", _call("sky__weather", city="Rome"), calls_tools=True)
    make_random_model(folder / "random")
    with serving(top / "home", top / "models", options=["--offline"]) as server:
        yield server


@pytest.fixture(scope="module")
def sdk(server: Server) -> OpenAI:
    return server.openai


def _ask(sdk: OpenAI, model: str, input_: Any = "hi", **options: Any) -> Response:
    response: Response = sdk.responses.create(model=model, input=input_, **options)
    return response


def _read(response: Response) -> Read:
    """What a response says of its prompt."""
    assert response.usage is not None
    return Read(response.usage.input_tokens, response.usage.input_tokens_details.cached_tokens)


def _is_read_as(server: Server, model: str, chat: list[Any], input_: Any = "hi", **options: Any) -> bool:
    """Whether a request has the prompt that chat completions make of `chat`."""
    read = read_by_chat(server, model, chat)
    return is_same(read, _read(_ask(server.openai, model, input_, max_output_tokens=1, **options)))


def _refused(
    sdk: OpenAI, param: str | None, model: str = PLAIN, input_: Any = "hi", **options: Any
) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(sdk, model, input_, **options)
    assert refused.value.param == param, refused.value.message
    assert refused.value.type == "invalid_request_error"
    return refused.value


def _stream(sdk: OpenAI, model: str, input_: Any = "hi", **options: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose numbers are contiguous, names of this one answer left out."""
    with sdk.responses.create(model=model, input=input_, stream=True, **options) as stream:
        events = [event.to_dict(mode="json") for event in stream]
    assert [event.pop("sequence_number") for event in events] == list(range(len(events)))
    return events


# Answers -------------------------------------------------------------------------------------------------------


def test_a_response_is_exactly_these_fields(sdk: OpenAI) -> None:
    response = _ask(sdk, "acme/once", metadata={"a": "b"}, user="me", temperature=0.5, top_p=0.9)
    (message,) = response.output
    assert response.id.startswith("resp_")
    told: dict[str, Any] = response.to_dict(mode="json")
    assert 0 < told.pop("created_at") <= told.pop("completed_at")
    assert told == {
        "id": response.id,
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {"a": "b"},
        "model": "acme/once",
        "output": [
            {
                "id": message.id,
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": HELLO, "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 0.9,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 22,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 26,
        },
        "user": "me",
    }
    assert response.output_text == HELLO
    assert _read(_ask(sdk, "acme/once")) == Read(22, 21)


@pytest.mark.parametrize("root", ["/v1", ""])
def test_the_route_is_there_with_and_without_v1(server: Server, root: str) -> None:
    answer = server.http.post(f"{root}/responses", json={"model": PLAIN, "input": "hi"})
    assert answer.json()["status"] == "completed"


def test_the_async_sdk_gets_the_same(server: Server) -> None:
    async def ask() -> tuple[str, list[str]]:
        async with server.async_openai() as sdk:
            whole, stream = await asyncio.gather(
                sdk.responses.create(model=PLAIN, input="hi"),
                sdk.responses.create(model=PLAIN, input="hi", stream=True),
            )
            return whole.output_text, [
                event.delta async for event in stream if event.type == "response.output_text.delta"
            ]

    text, deltas = asyncio.run(ask())
    assert text == "".join(deltas) == HELLO


def test_an_answer_that_is_cut_is_incomplete(sdk: OpenAI) -> None:
    response = _ask(sdk, PLAIN, max_output_tokens=2)
    assert (response.status, response.output_text) == ("incomplete", "Hello there,")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert message.type == "message"
    assert (message.status, response.completed_at) == ("incomplete", None)


def test_a_warm_up_of_one_token_and_no_input_works(server: Server, sdk: OpenAI) -> None:
    response = _ask(sdk, PLAIN, "", max_output_tokens=1)
    assert (response.output_text, response.status) == ("Hello", "incomplete")
    assert _is_read_as(server, PLAIN, [{"role": "user", "content": ""}], "")


# Input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "input_",
    [
        "Which one?",
        [{"role": "user", "content": "Which one?"}],
        [{"type": "message", "role": "user", "content": "Which one?"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "Which one?"}]}],
        [{"role": "user", "content": [{"type": "input_text", "text": t} for t in ("Which ", "one?")]}],
    ],
)
def test_input_is_a_string_or_items(server: Server, input_: Any) -> None:
    assert _is_read_as(server, PLAIN, [{"role": "user", "content": "Which one?"}], input_)


@pytest.mark.parametrize(
    ("input_", "options"),
    [
        ("hi", {"instructions": "Be kind."}),
        ([{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}], {}),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}], {}),
        ([{"role": "developer", "content": "kind."}, {"role": "user", "content": "hi"}], {"instructions": "Be"}),
    ],
)
def test_instructions_and_developer_items_are_the_system_prompt(server: Server, input_: Any, options: Any) -> None:
    text = "Be\n\nkind." if len(options) and not isinstance(input_, str) else "Be kind."
    chat = [{"role": "system", "content": text}, {"role": "user", "content": "hi"}]
    assert _is_read_as(server, PLAIN, chat, input_, **options)


def test_turns_of_all_roles_are_read_in_their_order(server: Server) -> None:
    said = {"type": "output_text", "text": "b", "annotations": [], "logprobs": []}
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [said]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "e"}]},
        {"role": "user", "content": "f"},
    ]
    chat = [
        {"role": role, "content": text}
        for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "de"), ("user", "f"))
    ]
    assert _is_read_as(server, PLAIN, chat, turns)


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_calls_and_their_outputs_goes_from_question_to_answer(
    server: Server, sdk: OpenAI, stream: bool
) -> None:
    items: list[Any] = [{"role": "user", "content": "What now?"}]
    asked = _told(sdk, CALLS, items, stream=stream, tools=[WEATHER])
    message, call = asked.output
    assert (message.type, call.type, asked.output_text) == ("message", "function_call", "Let me see. ")
    assert call.type == "function_call"
    assert (call.name, call.arguments, call.status) == ("weather", OSLO, "completed")
    items += [item.to_dict() for item in asked.output]
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    answered = _told(sdk, CALLS, items, stream=stream, tools=[WEATHER])
    assert (answered.output_text, answered.status) == (SUNNY, "completed")
    assert _read(answered).cached >= _read(asked).tokens


def _told(sdk: OpenAI, model: str, input_: Any = "hi", *, stream: bool, **options: Any) -> Response:
    """A response as the SDK has it in the end, however it came."""
    if not stream:
        return _ask(sdk, model, input_, **options)
    with sdk.responses.stream(model=model, input=input_, **options) as events:
        *_, last = events
        # Of a response that was cut the SDK keeps the event alone.
        return last.response if last.type == "response.incomplete" else events.get_final_response()


@pytest.mark.parametrize("output", ["21", [{"type": "input_text", "text": "2"}, {"type": "input_text", "text": "1"}]])
def test_what_one_answer_was_made_of_is_one_turn_again(server: Server, output: Any) -> None:
    items: list[Any] = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"role": "assistant", "content": "Well."},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": OSLO},
        {"type": "function_call", "call_id": "call_2", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": output},
        {"type": "function_call_output", "call_id": "call_2", "output": "22"},
    ]
    calls = [
        {"id": f"call_{at}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for at, arguments in ((1, OSLO), (2, "{}"))
    ]
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Well.", "reasoning_content": "So.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
        {"role": "tool", "tool_call_id": "call_2", "content": "22"},
    ]
    assert _is_read_as(server, BOTH, chat, items)


def test_what_was_said_after_a_call_is_a_turn_of_its_own(server: Server) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": OSLO}
    items = [{"role": "user", "content": "hi"}, call, {"role": "assistant", "content": "Wait."}]
    function = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": OSLO}}
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [function]},
        {"role": "assistant", "content": "Wait."},
        {"role": "user", "content": "And?"},
    ]
    assert _is_read_as(server, CALLS, chat, [*items, {"role": "user", "content": "And?"}])


# Reasoning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_an_item_before_the_message(sdk: OpenAI, stream: bool) -> None:
    response = _told(sdk, THINKS, stream=stream)
    item, message = response.output
    assert item.type == "reasoning"
    assert (item.summary, item.encrypted_content, response.output_text) == ([], None, "Yes, of course.")
    assert [(part.type, part.text) for part in item.content or ()] == [("reasoning_text", "Hm. Well.")]
    assert message.type == "message"
    assert response.usage is not None
    # <think>, Hm., Well., </think>, Yes,, of, course.
    assert (response.usage.output_tokens, response.usage.output_tokens_details.reasoning_tokens) == (7, 3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("summary", ["auto", "concise", "detailed"])
def test_reasoning_is_told_as_a_summary_where_one_is_wanted(sdk: OpenAI, summary: str, stream: bool) -> None:
    item, _ = _told(sdk, THINKS, stream=stream, reasoning={"summary": summary}).output
    assert item.type == "reasoning"
    assert [(part.type, part.text) for part in item.summary] == [("summary_text", "Hm. Well.")]
    assert not item.content


def test_reasoning_is_also_told_for_clients_that_store_it(sdk: OpenAI) -> None:
    response = _ask(sdk, THINKS, include=["reasoning.encrypted_content"], store=False)
    item = response.output[0]
    assert item.type == "reasoning"
    assert item.encrypted_content


@pytest.mark.parametrize("include", [[], ["reasoning.encrypted_content"]])
@pytest.mark.parametrize("reasoning", [{}, {"summary": "auto"}])
def test_reasoning_given_back_is_read_again(server: Server, sdk: OpenAI, reasoning: Any, include: Any) -> None:
    question = {"role": "user", "content": f"Say {reasoning} {include}"}
    said = [item.to_dict() for item in _ask(sdk, THINKS, [question], reasoning=reasoning, include=include).output]
    chat = [question, {"role": "assistant", "content": "Yes, of course.", "reasoning_content": "Hm. Well."}, question]
    assert _is_read_as(server, THINKS, chat, [question, *said, question])


@pytest.mark.parametrize(
    "parts",
    [
        {"summary": [{"type": "summary_text", "text": "So."}]},
        {"summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"summary": [], "encrypted_content": base64.b64encode(b"So.").decode()},
        {"summary": [], "content": None, "encrypted_content": base64.b64encode(b"So.").decode(), "id": "rs_1"},
    ],
)
def test_reasoning_comes_back_in_any_of_its_forms(server: Server, parts: Any) -> None:
    question = {"role": "user", "content": "hi"}
    chat = [question, {"role": "assistant", "content": "ho", "reasoning_content": "So."}, question]
    items = [question, {"type": "reasoning", **parts}, {"role": "assistant", "content": "ho"}, question]
    assert _is_read_as(server, THINKS, chat, items)


@pytest.mark.parametrize("secret", ["gAAAA-of-another-server", "////", ""])
def test_reasoning_that_another_server_encrypted_is_left_out(server: Server, secret: str) -> None:
    question = {"role": "user", "content": "hi"}
    item = {"type": "reasoning", "summary": [], "encrypted_content": secret}
    chat = [question, {"role": "assistant", "content": "ho"}, question]
    assert _is_read_as(server, THINKS, chat, [question, item, {"role": "assistant", "content": "ho"}, question])


@pytest.mark.parametrize(("effort", "is_off"), [("none", True), ("minimal", True), ("low", False), ("high", False)])
def test_effort_switches_thinking_off_and_on(server: Server, sdk: OpenAI, effort: Any, is_off: bool) -> None:
    kwargs = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}} if is_off else {}
    read = read_by_chat(server, THINKS, [{"role": "user", "content": "hi"}], **kwargs)
    response = _ask(sdk, THINKS, reasoning={"effort": effort})
    assert is_same(read, _read(response))
    assert response.reasoning is not None
    assert response.reasoning.effort == effort


# Tools ---------------------------------------------------------------------------------------------------------


def _calls(response: Response) -> list[tuple[Any, ...]]:
    """(namespace, name, arguments) of each function call."""
    return [(item.namespace, item.name, item.arguments) for item in response.output if item.type == "function_call"]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_items_of_their_own(sdk: OpenAI, stream: bool) -> None:
    response = _told(sdk, BOTH, stream=stream, tools=[WEATHER])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
    assert _calls(response) == [(None, "weather", OSLO), (None, "weather", '{"city": "Rome"}')]
    assert len({item.id for item in response.output}) == 4
    assert len({item.call_id for item in response.output if item.type == "function_call"}) == 2
    assert response.tools[0].to_dict() == WEATHER


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_where_calls_may_not_be_parallel(sdk: OpenAI, stream: bool) -> None:
    response = _told(sdk, BOTH, stream=stream, tools=[WEATHER], parallel_tool_calls=False)
    assert (_calls(response), response.parallel_tool_calls) == ([(None, "weather", OSLO)], False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", [PLAIN, RANDOM, CALLS])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "climate"}])
def test_a_call_that_is_demanded_is_made_and_fits_its_schema(
    sdk: OpenAI, choice: Any, model: str, stream: bool
) -> None:
    response = _told(sdk, model, stream=stream, tools=[WEATHER, CLIMATE], tool_choice=choice)
    ((_, name, arguments),) = _calls(response)
    assert name in ({"climate"} if isinstance(choice, dict) else {"weather", "climate"})
    assert json.loads(arguments) in ({"city": "Oslo"}, {"city": "Rome"})
    told = response.tool_choice
    assert (told if isinstance(told, str) else told.to_dict()) == choice


def test_without_a_choice_of_tools_the_model_is_shown_none(server: Server, sdk: OpenAI) -> None:
    assert _is_read_as(server, CALLS, [{"role": "user", "content": "hi"}], tools=[WEATHER], tool_choice="none")
    assert _calls(_ask(sdk, CALLS, tools=[WEATHER], tool_choice="none")) == []


def test_tools_that_others_run_are_left_out(server: Server, sdk: OpenAI) -> None:
    read = read_by_chat(
        server, CALLS, [{"role": "user", "content": "hi"}], tools=[{"type": "function", "function": FUNCTION}]
    )
    response = _ask(sdk, CALLS, tools=[SEARCH, WEATHER])
    assert is_same(read, _read(response))
    assert [tool.type for tool in response.tools] == ["web_search", "function"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tool_is_called_with_plain_text(sdk: OpenAI, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "hi"}]
    response = _told(sdk, "acme/applies", items, stream=stream, tools=[CUSTOM])
    (call,) = response.output
    assert call.type == "custom_tool_call"
    assert (call.name, call.input, call.namespace) == ("apply", "*** Begin é\n", None)
    items += [call.to_dict(), {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}]
    assert _told(sdk, "acme/applies", items, stream=stream, tools=[CUSTOM]).output_text == SUNNY


def test_a_custom_call_in_the_history_is_read_as_what_the_model_said(server: Server, sdk: OpenAI) -> None:
    question = {"role": "user", "content": "Go"}
    (call,) = _ask(sdk, "acme/applies", [question], tools=[CUSTOM]).output
    assert call.type == "custom_tool_call"
    function = {"name": "apply", "arguments": json.dumps({"input": "*** Begin é\n"})}
    chat = [
        question,
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "done"},
    ]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    assert _is_read_as(server, "acme/applies", chat, [question, call.to_dict(), output])


def _namespace(*tools: dict[str, Any], name: str = "sky") -> dict[str, Any]:
    return {"type": "namespace", "name": name, "description": "Above.", "tools": list(tools)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_in_a_namespace_names_it(server: Server, sdk: OpenAI, stream: bool) -> None:
    items: list[Any] = [{"role": "user", "content": "Where?"}]
    response = _told(sdk, CALLS, items, stream=stream, tools=[_namespace(WEATHER), SEARCH])
    assert _calls(response) == [("sky", "weather", OSLO)]
    items += [item.to_dict() for item in response.output]
    call = response.output[-1]
    assert call.type == "function_call"
    items += [{"type": "function_call_output", "call_id": call.call_id, "output": "21"}]
    answered = _told(sdk, CALLS, items, stream=stream, tools=[_namespace(WEATHER), SEARCH])
    assert answered.output_text == SUNNY
    assert _read(answered).cached >= _read(response).tokens


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER, _namespace(CLIMATE, WEATHER)],
        [_namespace(WEATHER), WEATHER],
        [_namespace(WEATHER), _namespace(WEATHER, name="sea"), WEATHER],
    ],
)
def test_tools_of_one_name_are_told_apart_whatever_their_order(sdk: OpenAI, tools: Any) -> None:
    """The model says "weather" or "sky__weather": the tool without a namespace keeps its name."""
    assert _calls(_ask(sdk, CALLS, tools=tools)) == [(None, "weather", OSLO)]
    assert _calls(_ask(sdk, "acme/apart", tools=tools)) == [("sky", "weather", '{"city": "Rome"}')]


@pytest.mark.parametrize(
    ("kind", "more"), [("function_call", {"arguments": "{}"}), ("custom_tool_call", {"input": "x"})]
)
def test_a_call_in_the_history_has_the_name_that_the_model_gave_it(server: Server, kind: str, more: Any) -> None:
    tool = {"type": "custom", "name": "weather"} if kind == "custom_tool_call" else WEATHER
    question = {"role": "user", "content": f"A {kind}"}
    call = {"type": kind, "call_id": "call_1", "name": "weather", "namespace": "sky", **more}
    output = {"type": f"{kind}_output", "call_id": "call_1", "output": "21"}
    arguments = json.dumps({"input": "x"} if kind == "custom_tool_call" else {})
    function = {"name": "sky__weather", "arguments": arguments}
    chat = [
        question,
        {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21"},
    ]
    offered = [WEATHER, _namespace(tool)]
    assert _is_read_as(server, CALLS, chat, [question, call, output], tools=offered, tool_choice="none")


# Formats -------------------------------------------------------------------------------------------------------


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    town: Literal["Oslo", "Bergen"]
    is_near: bool


@pytest.mark.parametrize("model", [PLAIN, RANDOM, THINKS])
def test_the_sdk_parses_an_answer_held_to_a_schema(sdk: OpenAI, model: str) -> None:
    response = sdk.responses.parse(model=model, input="hi", text_format=Place)
    assert isinstance(response.output_parsed, Place)
    with sdk.responses.stream(model=model, input="hi", text_format=Place) as stream:
        streamed = stream.get_final_response()
    assert isinstance(streamed.output_parsed, Place)


def test_the_format_is_told_again(sdk: OpenAI) -> None:
    wanted = {"type": "json_schema", "name": "place", "schema": Place.model_json_schema(), "strict": True}
    response = _ask(sdk, RANDOM, text={"format": wanted})
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.to_dict() == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_object_is_one(sdk: OpenAI, stream: bool) -> None:
    response = _told(sdk, PLAIN, stream=stream, text={"format": {"type": "json_object"}}, max_output_tokens=40)
    assert response.output_text.startswith("{")
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_object"


def test_log_probabilities_are_told_for_every_token(sdk: OpenAI) -> None:
    options: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (message,) = _ask(sdk, PLAIN, **options).output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    tokens = [(each.token, bytes(each.bytes), round(each.logprob, 3)) for each in part.logprobs or ()]
    said = ["Hello", " there,", " general", " Kenobi."]
    assert tokens == [(text, text.encode(), 0.0) for text in said]
    assert {len(each.top_logprobs) for each in part.logprobs or ()} == {2}
    deltas = [event for event in _stream(sdk, PLAIN, **options) if event["type"] == "response.output_text.delta"]
    streamed = [(event["delta"], [each["token"] for each in event["logprobs"]]) for event in deltas]
    assert [token for _, tokens in streamed for token in tokens] == said
    assert all(text == "".join(tokens) for text, tokens in streamed)


def test_log_probabilities_may_be_asked_for_without_alternatives(sdk: OpenAI) -> None:
    (message,) = _ask(sdk, PLAIN, include=["message.output_text.logprobs"]).output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    told = [(each.token, each.top_logprobs) for each in part.logprobs or ()]
    assert told == [("Hello", []), (" there,", []), (" general", []), (" Kenobi.", [])]


# Events --------------------------------------------------------------------------------------------------------


def _joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring deltas as one: how many there are says only how fast they came. Ids as their kind."""
    joined: list[dict[str, Any]] = []
    for event in events:
        last = joined[-1] if joined else {}
        if event["type"].endswith(".delta") and event["type"] == last.get("type"):
            joined[-1] = {**last, "delta": last["delta"] + event["delta"]}
        else:
            joined.append(_anonymous(event))
    return joined


def _anonymous(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: each.partition("_")[0] if name in ("id", "item_id", "call_id") else _anonymous(each)
            for name, each in value.items()
        }
    return [_anonymous(each) for each in value] if isinstance(value, list) else value


def _message_events(index: int, text: str, status: str = "completed") -> list[dict[str, Any]]:
    place = {"item_id": "msg", "output_index": index, "content_index": 0}
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    item = {"id": "msg", "type": "message", "role": "assistant"}
    return [
        {
            "type": "response.output_item.added",
            "output_index": index,
            "item": {**item, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
        {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []},
        {"type": "response.output_text.done", **place, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": status, "content": [part]},
        },
    ]


def _reasoning_events(index: int, text: str, *, is_summary: bool) -> list[dict[str, Any]]:
    place = {"item_id": "rs", "output_index": index, "summary_index" if is_summary else "content_index": 0}
    part_name = "response.reasoning_summary_part" if is_summary else "response.content_part"
    text_name = "response.reasoning_summary_text" if is_summary else "response.reasoning_text"
    part = {"type": "summary_text" if is_summary else "reasoning_text", "text": text}
    whole = {"summary": [part]} if is_summary else {"summary": [], "content": [part]}
    item = {"id": "rs", "type": "reasoning"}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": {**item, "summary": []}},
        {"type": f"{part_name}.added", **place, "part": {**part, "text": ""}},
        {"type": f"{text_name}.delta", **place, "delta": text},
        {"type": f"{text_name}.done", **place, "text": text},
        {"type": f"{part_name}.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": index, "item": {**item, **whole}},
    ]


def _call_events(index: int, arguments: str) -> list[dict[str, Any]]:
    place = {"item_id": "fc", "output_index": index}
    item = {"id": "fc", "type": "function_call", "call_id": "call", "name": "weather"}
    name = "response.function_call_arguments"
    return [
        {
            "type": "response.output_item.added",
            "output_index": index,
            "item": {**item, "status": "in_progress", "arguments": ""},
        },
        {"type": f"{name}.delta", **place, "delta": arguments},
        {"type": f"{name}.done", **place, "arguments": arguments, "name": "weather"},
        {
            "type": "response.output_item.done",
            "output_index": index,
            "item": {**item, "status": "completed", "arguments": arguments},
        },
    ]


@pytest.mark.parametrize("is_summary", [False, True])
def test_every_event_comes_in_its_order(sdk: OpenAI, is_summary: bool) -> None:
    options: dict[str, Any] = {"tools": [WEATHER], "reasoning": {"summary": "auto"} if is_summary else {}}
    created, in_progress, *events, completed = _joined(_stream(sdk, BOTH, **options))
    assert events == [
        *_reasoning_events(0, "Hm.", is_summary=is_summary),
        *_message_events(1, "Both. "),
        *_call_events(2, OSLO),
        *_call_events(3, '{"city": "Rome"}'),
    ]
    assert [created["type"], in_progress["type"], completed["type"]] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert completed["response"]["output"] == items
    assert (completed["response"]["status"], completed["response"]["usage"] is None) == ("completed", False)


def test_a_stream_that_is_cut_ends_with_incomplete(sdk: OpenAI) -> None:
    _, _, *events, last = _joined(_stream(sdk, PLAIN, max_output_tokens=2))
    assert events == _message_events(0, "Hello there,", status="incomplete")
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_custom_tools_input_has_events_of_its_own(sdk: OpenAI) -> None:
    _, _, *events, _ = _joined(_stream(sdk, "acme/applies", tools=[CUSTOM]))
    item = {"id": "ctc", "type": "custom_tool_call", "call_id": "call", "name": "apply"}
    name, text = "response.custom_tool_call_input", "*** Begin é\n"
    told = [{key: value for key, value in event.items() if key != "name"} for event in events]
    assert told == [
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "input": ""}},
        {"type": f"{name}.delta", "item_id": "ctc", "output_index": 0, "delta": text},
        {"type": f"{name}.done", "item_id": "ctc", "output_index": 0, "input": text},
        {"type": "response.output_item.done", "output_index": 0, "item": {**item, "input": text}},
    ]


def test_on_the_wire_each_event_has_its_name(server: Server) -> None:
    answer = server.http.post("/v1/responses", json={"model": PLAIN, "input": "hi", "stream": True})
    assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
    for part in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.splitlines()
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


@pytest.mark.parametrize("model", [PLAIN, THINKS, CALLS, BOTH])
@pytest.mark.parametrize("options", [{}, {"max_output_tokens": 3}, {"reasoning": {"summary": "auto"}}])
def test_the_sdk_puts_a_stream_together_to_the_same_response(sdk: OpenAI, model: str, options: Any) -> None:
    def told(response: Response) -> Any:
        parsed: dict[str, Any] = response.to_dict(mode="json", exclude_none=True)
        for name in ("created_at", "completed_at", "usage"):
            parsed.pop(name, None)
        for item in parsed["output"]:
            item.pop("parsed_arguments", None)
        return _anonymous(parsed)

    options = {"tools": [WEATHER], **options}
    whole, streamed = (_told(sdk, model, stream=stream, **options) for stream in (False, True))
    assert told(streamed) == told(whole)
    assert whole.usage is not None
    assert streamed.usage is not None
    assert streamed.usage.output_tokens == whole.usage.output_tokens


# Stored responses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_can_be_had_again_until_it_is_deleted(sdk: OpenAI, stream: bool) -> None:
    response = _told(sdk, BOTH, stream=stream, tools=[WEATHER], store=True)
    again = sdk.responses.retrieve(response.id)
    assert _without_parsed(again) == _without_parsed(response)
    sdk.responses.delete(response.id)
    for ask in (sdk.responses.retrieve, sdk.responses.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(response.id)
        assert (refused.value.code, refused.value.type) == ("response_not_found", "invalid_request_error")


def _without_parsed(response: Response) -> Any:
    told: dict[str, Any] = response.to_dict(mode="json", exclude_none=True)
    for item in told["output"]:
        item.pop("parsed_arguments", None)
    return told


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_not_stored_is_not_there(sdk: OpenAI, stream: bool) -> None:
    response = _told(sdk, PLAIN, stream=stream, store=False)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    refused = _refused(sdk, "previous_response_id", previous_response_id=response.id)
    assert refused.code == "previous_response_not_found"


def test_deletion_says_what_is_gone(server: Server, sdk: OpenAI) -> None:
    response = _ask(sdk, PLAIN)
    answer = server.http.delete(f"/v1/responses/{response.id}")
    assert answer.json() == {"id": response.id, "object": "response", "deleted": True}


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_the_response_before(server: Server, sdk: OpenAI, stream: bool) -> None:
    first = _told(sdk, THINKS, f"One {stream}", stream=stream, instructions="Be kind.")
    second = _told(sdk, THINKS, "Two", stream=stream, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    said = {"role": "assistant", "content": "Yes, of course.", "reasoning_content": "Hm. Well."}
    turns = [{"role": "user", "content": f"One {stream}"}, said, {"role": "user", "content": "Two"}, said]
    chat = [*turns, {"role": "user", "content": "Three"}]  # the instructions were those of the first response alone
    assert _is_read_as(server, THINKS, chat, "Three", previous_response_id=second.id)
    branch = [*turns[:2], {"role": "user", "content": "Else"}]
    assert _is_read_as(server, THINKS, branch, "Else", previous_response_id=first.id)


def test_a_chain_outlives_the_deletion_of_its_beginning(server: Server, sdk: OpenAI) -> None:
    first = _ask(sdk, PLAIN, "One")
    second = _ask(sdk, PLAIN, "Two", previous_response_id=first.id)
    sdk.responses.delete(first.id)
    said = {"role": "assistant", "content": HELLO}
    chat = [{"role": "user", "content": "One"}, said, {"role": "user", "content": "Two"}, said]
    chat.append({"role": "user", "content": "Three"})
    assert _is_read_as(server, PLAIN, chat, "Three", previous_response_id=second.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_calls_output_may_follow_the_response_that_made_it(sdk: OpenAI, stream: bool) -> None:
    asked = _told(sdk, CALLS, stream=stream, tools=[_namespace(WEATHER)])
    call = asked.output[-1]
    assert call.type == "function_call"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    answered = _told(sdk, CALLS, [output], stream=stream, tools=[_namespace(WEATHER)], previous_response_id=asked.id)
    assert answered.output_text == SUNNY
    assert _read(answered).cached >= _read(asked).tokens


# Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(sdk: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        _ask(sdk, "acme/none", stream=stream)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


def test_a_prompt_that_is_too_long_is_refused(sdk: OpenAI) -> None:
    refused = _refused(sdk, "input", input_="x" * 5000)
    assert refused.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("background", {"background": True}),
        ("truncation", {"truncation": "auto"}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("temperature", {"temperature": 3}),
        ("top_p", {"top_p": -1}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("new_field", {"extra_body": {"new_field": 1}}),
        ("stop", {"extra_body": {"stop": ["x"]}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "required", "tools": [SEARCH]}),
        ("tool_choice", {"tool_choice": {"type": "function", "name": "none"}, "tools": [WEATHER]}),
        ("tool_choice", {"tool_choice": {"type": "web_search"}, "tools": [WEATHER, SEARCH]}),
        ("tools", {"tools": [{"type": "function", "parameters": CITY}]}),
        (
            "tools",
            {"tools": [{"type": "function", "name": "x", "parameters": {"type": "none"}}], "tool_choice": "required"},
        ),
        ("text.format", {"text": {"format": {"type": "xml"}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "none"}}}}),
        ("previous_response_id", {"previous_response_id": "resp_none"}),
    ],
)
def test_what_cannot_be_done_is_refused_by_the_name_of_its_field(sdk: OpenAI, param: str, options: Any) -> None:
    _refused(sdk, param, CALLS, **options)


@pytest.mark.parametrize(
    ("param", "input_"),
    [
        ("input", []),
        ("input[0]", [{"type": "item_reference", "id": "msg_1"}]),
        ("input[1]", [{"role": "user", "content": "x"}, {"type": "file_search_call", "id": "x"}]),
        ("input[0].role", [{"role": "robot", "content": "x"}]),
        ("input[0].content[0]", [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]),
        ("input[0].arguments", [{"type": "function_call", "call_id": "x", "name": "y", "arguments": "[1]"}]),
        ("input[0].content[0].image_url", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
        ("input[0].output", [{"type": "function_call_output", "call_id": "x"}]),
    ],
)
def test_items_that_cannot_be_read_are_refused_by_their_place(sdk: OpenAI, param: str, input_: Any) -> None:
    _refused(sdk, param, input_=input_)


def test_a_failure_after_waiting_is_told_in_the_protocols_own_events(tmp_path_factory: pytest.TempPathFactory) -> None:
    top = tmp_path_factory.mktemp("failing")
    with LoopbackHub() as hub:
        environ = hub.environment(top / "home", HF_HUB_OFFLINE="0")
        own = {name: value for name, value in environ.items() if name.startswith(("HF_", "NO_PROXY"))}
        with serving(top / "home", environ=own) as server:
            hub.hang(60)
            with server.http.stream(
                "POST", "/v1/responses", json={"model": "acme/nowhere", "input": "hi", "stream": True}
            ) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith(": ")  # the stream has begun: its status can no longer tell
                hub.heal()
                told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [(event["type"], event["sequence_number"]) for event in told] == [
        ("response.created", 0),
        ("response.in_progress", 1),
        ("response.failed", 2),
    ]
    assert told[-1]["response"]["status"] == "failed"
    assert "acme/nowhere" in told[-1]["response"]["error"]["message"]
