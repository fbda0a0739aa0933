"""Tools and formats that OpenAI's SDK asks a real server for: the model's own calls, and answers held to schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Literal

import pytest
from openai import BadRequestError, pydantic_function_tool
from pydantic import BaseModel, ConfigDict

from tests.support.models import make_model, make_random_model
from tests.support.server import ChatAnswer, Server, joined, serving

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
OTHER = '<tool_call>{"name": "clock", "arguments": {"zones": ["é", null, 1.5]}}</tool_call>'
OSLO, ZONES = ("weather", '{"city": "Oslo"}'), ("clock", '{"zones": ["é", null, 1.5]}')
SUNNY = "It is sunny in Oslo."
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Now.", "parameters": CITY},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


class Unit(StrEnum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    town: Literal["Oslo", "Bergen"]
    is_near: bool


class Forecast(BaseModel):
    """Whatever a model babbles, it can say no more than a hundred characters of it."""

    model_config = ConfigDict(extra="forbid")
    places: tuple[Place, Place]
    unit: Unit
    kind: Literal["rain", "snow"]


def _tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}


FORECAST = _tool("forecast", Forecast.model_json_schema())
PLACE = _tool("place", Place.model_json_schema())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    top = tmp_path_factory.mktemp("tools")
    models = top / "models" / "acme"
    make_model(models / "plain", "Hello there.")
    make_model(models / "thinks", "<think>Hm.</think>Hello.", thinks=True)
    make_model(models / "json", '{"a": [1, 2], "b": {"c": null}} and so on')
    make_model(models / "calls", f"Let me see. {CALL}", calls_tools=True, after_tool=SUNNY)
    make_model(models / "both", f"{CALL}\n{OTHER}", calls_tools=True)
    make_model(models / "thinks-calls", f"<think>Hm.</think>Well. {CALL}", thinks=True, calls_tools=True)
    make_model(models / "one-call", CALL, calls_tools=True)
    make_model(models / "unclosed", '<tool_call>{"name": "weather", "argu', calls_tools=True)
    make_model(models / "broken", '<tool_call>{"name": "weather", "argu</tool_call>', calls_tools=True)
    make_model(models / "no-place", f"Let me see. {CALL}")
    make_random_model(models / "random")
    with serving(top / "home", models.parent) as server:
        yield server


# Calls that the model makes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_parsed_out_of_the_text(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/calls", "hi", stream=stream, tools=[WEATHER])
    assert answer == ChatAnswer("Let me see. ", calls=[OSLO], finish="tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_several_calls_come_in_their_order(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/both", "hi", stream=stream, tools=[WEATHER, CLOCK])
    assert (answer.calls, answer.content.strip(), answer.finish) == ([OSLO, ZONES], "", "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_only_one_call_comes_where_calls_may_not_be_parallel(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/both", "hi", stream=stream, tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    assert answer == ChatAnswer(calls=[OSLO], finish="tool_calls")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_comes_after_reasoning_and_text(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/thinks-calls", "hi", stream=stream, tools=[WEATHER])
    assert answer == ChatAnswer("Well. ", "Hm.", [OSLO], "tool_calls")


def test_a_message_that_is_only_calls_has_no_content(server: Server) -> None:
    message = server.chat("acme/both", "hi", tools=[WEATHER, CLOCK], parallel_tool_calls=False).choices[0].message
    assert message.content is None


def test_calls_have_ids_of_their_own(server: Server) -> None:
    answers = [server.chat("acme/both", "hi", tools=[WEATHER, CLOCK]).choices[0].message for _ in range(2)]
    ids = [call.id for message in answers for call in message.tool_calls or ()]
    assert len(set(ids)) == 4
    assert all(id_.startswith("call_") for id_ in ids)


@pytest.mark.parametrize("stream", [False, True])
def test_no_tools_may_be_called_with_tool_choice_none(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/calls", "hi", stream=stream, tools=[WEATHER], tool_choice="none")
    assert answer == ChatAnswer(f"Let me see. {CALL}", finish="stop")


def test_with_tool_choice_none_the_tools_are_no_part_of_the_prompt(server: Server) -> None:
    def size(**options: Any) -> int:
        usage = server.chat("acme/calls", "hi", **options).usage
        assert usage is not None
        return usage.prompt_tokens

    assert size(tools=[WEATHER], tool_choice="none") == size() < size(tools=[WEATHER])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_no_json_is_said_as_text(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/broken", "hi", stream=stream, tools=[WEATHER])
    assert answer == ChatAnswer('{"name": "weather", "argu', finish="stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_not_closed_is_said_without_its_mark(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/unclosed", "hi", stream=stream, tools=[WEATHER])
    assert answer == ChatAnswer('{"name": "weather", "argu', finish="stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_short_is_left_out(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/both", "hi", stream=stream, tools=[WEATHER], max_tokens=3)
    assert answer == ChatAnswer(finish="length")
    answer = server.chat_answer("acme/calls", "hi", stream=stream, tools=[WEATHER], stop="Oslo")
    assert answer == ChatAnswer("Let me see. ", finish="stop")


def test_the_sdk_puts_a_streamed_call_together(server: Server) -> None:
    class weather(BaseModel):  # noqa: N801 - the tool's name
        city: str

    with server.openai.chat.completions.stream(
        model="acme/calls", messages=[{"role": "user", "content": "hi"}], tools=[pydantic_function_tool(weather)]
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        completion = stream.get_final_completion()
    assert [(event.name, event.parsed_arguments) for event in done] == [("weather", weather(city="Oslo"))]
    (call,) = list(completion.choices[0].message.tool_calls or [])
    assert (call.type, call.function.name, call.function.arguments) == ("function", *OSLO)
    assert completion.choices[0].message.content == "Let me see. "
    assert completion.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tools_answer_leads_to_the_models(server: Server, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    called = server.chat("acme/calls", messages, tools=[WEATHER]).choices[0].message
    (call,) = list(called.tool_calls or [])
    messages += [called, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    assert server.chat_answer("acme/calls", messages, stream=stream, tools=[WEATHER]) == ChatAnswer(
        SUNNY, finish="stop"
    )


@pytest.mark.parametrize("content", ["21", [{"type": "text", "text": "2"}, {"type": "text", "text": "1"}]])
def test_a_tools_answer_may_be_text_parts(server: Server, content: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": content},
    ]
    assert server.chat_answer("acme/calls", messages, stream=False) == ChatAnswer(SUNNY, finish="stop")


# A model whose template has no place for tools ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_whose_template_takes_no_tools_calls_them_all_the_same(server: Server, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    answer = server.chat_answer("acme/no-place", messages, stream=stream, tools=[WEATHER])
    assert answer == ChatAnswer("Let me see. ", calls=[OSLO], finish="tool_calls")


def test_tools_calls_and_results_are_never_the_same_prompt_as_none(server: Server) -> None:
    def size(*more: dict[str, Any], **options: Any) -> int:
        usage = server.chat("acme/no-place", [{"role": "user", "content": "hi"}, *more], **options).usage
        assert usage is not None
        return usage.prompt_tokens

    def calls(city: str) -> dict[str, Any]:
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        return {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}

    def result(text: str) -> dict[str, Any]:
        return {"role": "tool", "tool_call_id": "call_1", "content": text}

    assert size() < size(tools=[WEATHER]) < size(tools=[WEATHER, CLOCK])
    assert size(calls("Oslo")) + len("Trondheim") - len("Oslo") == size(calls("Trondheim"))
    assert size(calls("Oslo"), result("21")) + 1 == size(calls("Oslo"), result("121"))


def test_arguments_in_the_history_may_be_an_object(server: Server) -> None:
    def size(arguments: Any) -> int:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
        answer = server.http.post("/v1/chat/completions", json={"model": "acme/calls", "messages": messages})
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens"])

    assert size({"city": "Oslo"}) == size('{"city": "Oslo"}')


# Calls that a request demands ----------------------------------------------------------------------------------


def _check_arguments(name: str, arguments: str) -> None:
    tools: dict[str, type[BaseModel]] = {"forecast": Forecast, "place": Place}
    tools[name].model_validate_json(arguments)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["acme/plain", "acme/random", "acme/calls"])
def test_a_required_call_is_one_of_the_tools_and_fits_its_schema(server: Server, model: str, stream: bool) -> None:
    answer = server.chat_answer(model, "hi", stream=stream, tools=[FORECAST, PLACE], tool_choice="required")
    assert (answer.content, answer.finish) == ("", "tool_calls")
    ((name, arguments),) = answer.calls
    _check_arguments(name, arguments)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["forecast", "place"])
def test_a_named_call_is_that_tools_at_any_temperature(server: Server, name: str, seed: int) -> None:
    choice = {"type": "function", "function": {"name": name}}
    answer = server.chat_answer(
        "acme/random", "hi", stream=False, tools=[FORECAST, PLACE], tool_choice=choice, temperature=1, seed=seed
    )
    ((called, arguments),) = answer.calls
    assert called == name
    _check_arguments(called, arguments)


def test_a_required_call_comes_after_reasoning(server: Server) -> None:
    answer = server.chat_answer("acme/thinks", "hi", stream=False, tools=[PLACE], tool_choice="required")
    assert (answer.content, answer.reasoning, answer.finish) == ("", "Hm.", "tool_calls")
    ((name, arguments),) = answer.calls
    _check_arguments(name, arguments)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_cut_short_is_no_call(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/plain", "hi", stream=stream, tools=[PLACE], tool_choice="required", max_tokens=3)
    assert answer == ChatAnswer(finish="length")


def test_the_sdk_parses_a_required_call(server: Server) -> None:
    completion = server.openai.chat.completions.parse(
        model="acme/random",
        messages=[{"role": "user", "content": "hi"}],
        tools=[pydantic_function_tool(Forecast)],
        tool_choice="required",
    )
    (call,) = list(completion.choices[0].message.tool_calls or [])
    assert isinstance(call.function.parsed_arguments, Forecast)


# Formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_object_ends_where_it_is_complete(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/json", "hi", stream=stream, response_format={"type": "json_object"})
    assert answer == ChatAnswer('{"a": [1, 2], "b": {"c": null}}', finish="stop")


@pytest.mark.parametrize("stream", [False, True])
def test_the_format_text_asks_for_nothing(server: Server, stream: bool) -> None:
    answer = server.chat_answer("acme/plain", "hi", stream=stream, response_format={"type": "text"})
    assert answer == ChatAnswer("Hello there.", finish="stop")


@pytest.mark.parametrize("model", ["acme/plain", "acme/random", "acme/json"])
def test_the_sdk_parses_an_answer_held_to_a_schema(server: Server, model: str) -> None:
    completion = server.openai.chat.completions.parse(
        model=model, messages=[{"role": "user", "content": "hi"}], response_format=Forecast
    )
    (choice,) = completion.choices
    assert isinstance(choice.message.parsed, Forecast)
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools_may_be_called_before_an_answer_held_to_a_schema(server: Server, stream: bool) -> None:
    place = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}
    answer = server.chat_answer("acme/one-call", "hi", stream=stream, tools=[WEATHER], response_format=place)
    assert (answer.calls, answer.finish) == ([OSLO], "tool_calls")
    answer = server.chat_answer(
        "acme/one-call", "hi", stream=stream, tools=[WEATHER], tool_choice="none", response_format=place
    )
    assert (answer.calls, answer.finish) == ([], "stop")
    Place.model_validate_json(answer.content)
    Place.model_validate_json(
        server.chat_answer("acme/plain", "hi", stream=stream, tools=[WEATHER], response_format=place).content
    )


def test_log_probabilities_of_what_a_schema_forbids_are_numbers(server: Server) -> None:
    place = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}
    body = {"model": "acme/plain", "messages": [{"role": "user", "content": "hi"}], "response_format": place}
    answer = server.http.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 20})
    (choice,) = json.loads(answer.text, parse_constant=pytest.fail)["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert min(top["logprob"] for token in tokens for top in token["top_logprobs"]) == -9999.0


def test_the_sdk_parses_an_answer_after_reasoning(server: Server) -> None:
    completion = server.openai.chat.completions.parse(
        model="acme/thinks", messages=[{"role": "user", "content": "hi"}], response_format=Place
    )
    message = completion.choices[0].message
    assert isinstance(message.parsed, Place)
    assert getattr(message, "reasoning_content", None) == "Hm."


def test_the_sdk_parses_a_streamed_answer_held_to_a_schema(server: Server) -> None:
    with server.openai.chat.completions.stream(
        model="acme/random", messages=[{"role": "user", "content": "hi"}], response_format=Forecast
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        completion = stream.get_final_completion()
    assert completion.choices[0].message.parsed == Forecast.model_validate_json(text)


def test_several_answers_each_fit_the_schema(server: Server) -> None:
    schema = {"name": "place", "schema": Place.model_json_schema(), "strict": True}
    answers = server.chat_answers(
        "acme/random",
        "hi",
        stream=True,
        n=4,
        temperature=1,
        seed=1,
        response_format={"type": "json_schema", "json_schema": schema},
    )
    places = [Place.model_validate_json(answer.content) for answer in answers]
    assert len(places) == 4
    assert len({place.model_dump_json() for place in places}) > 1


def test_an_answer_held_to_a_schema_runs_beside_one_that_is_not(server: Server) -> None:
    place = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}
    with server.openai.chat.completions.create(
        model="acme/random", messages=[{"role": "user", "content": "hi"}], max_tokens=1000, stream=True
    ) as free:
        first = next(free)
        Place.model_validate_json(server.chat_answer("acme/random", "hi", stream=False, response_format=place).content)
        (answer,) = joined([first, *free])
    words = answer.content.split()
    assert len(words) == 1000
    assert all(word.isalpha() for word in words)


def test_a_schema_that_cannot_be_enforced_is_refused(server: Server) -> None:
    with pytest.raises(BadRequestError) as refused:
        server.chat(
            "acme/plain",
            "hi",
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )
    assert refused.value.param == "response_format"
    with pytest.raises(BadRequestError) as refused:
        server.chat("acme/plain", "hi", tools=[_tool("x", {"type": "nonsense"})], tool_choice="required")
    assert refused.value.param == "tools"


def test_arguments_in_the_history_must_be_an_object(server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(["Oslo"])}}
    with pytest.raises(BadRequestError) as refused:
        server.chat("acme/calls", [{"role": "assistant", "tool_calls": [call]}])
    assert refused.value.param == "messages[0].tool_calls[0].function.arguments"


# The older form: functions --------------------------------------------------------------------------------------

FUNCTIONS = [WEATHER["function"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "function", "choice"),
    [
        ("acme/one-call", WEATHER["function"], "auto"),
        ("acme/one-call", WEATHER["function"], None),
        ("acme/random", PLACE["function"], {"name": "place"}),
    ],
)
def test_functions_are_called_in_the_older_form(
    server: Server, model: str, function: dict[str, Any], choice: Any, stream: bool
) -> None:
    options = {"functions": [function]} | ({} if choice is None else {"function_call": choice})
    if stream:
        chunks = server.chat_stream(model, "Where?", **options)
        calls: list[Any] = [c.choices[0].delta.function_call for c in chunks if c.choices[0].delta.function_call]
        finish = chunks[-1].choices[0].finish_reason
        assert not any(chunk.choices[0].delta.tool_calls for chunk in chunks)
    else:
        (whole,) = server.chat(model, "Where?", **options).choices
        calls, finish = [whole.message.function_call], whole.finish_reason
        assert whole.message.tool_calls is None
    (call,) = calls
    assert (call.name, finish) == (function["name"], "function_call")
    assert isinstance(json.loads(call.arguments or ""), dict)


def test_an_answer_of_a_function_is_read_as_a_tool_s(server: Server) -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "weather", "content": "21"},
    ]
    assert server.chat("acme/calls", turns, functions=FUNCTIONS).choices[0].message.content == SUNNY


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"functions": FUNCTIONS, "tools": [WEATHER]}, "functions"),
        ({"functions": FUNCTIONS, "function_call": {"name": "other"}}, "function_call"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(server: Server, options: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        server.chat("acme/calls", "Weather?", **options)
    assert refused.value.param == param
