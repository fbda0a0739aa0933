"""The answers that OpenAI's clients get in one piece: their types, and how they are made of events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NotRequired

from hf_overlay import Task
from typing_extensions import TypedDict

from mlx_overlay_server.api.openai.logprobs import (
    ChatLogprobs,
    PromptLogprobList,
    TextLogprobEncoder,
    TextLogprobs,
    chat_logprobs,
    no_logprobs,
    prompt_logprobs,
    prompt_tokens_of,
    tokens_of,
)
from mlx_overlay_server.chat.events import Done, Event, Reasoning, Text, ToolCall, Usage
from mlx_overlay_server.chat.requests import ChatRequest, TextRequest
from mlx_overlay_server.models.library import Listed

FinishName = Literal["stop", "length", "tool_calls", "function_call"]


class PromptTokenDetails(TypedDict):
    """Details on the prompt's tokens."""

    cached_tokens: int


class CompletionTokenDetails(TypedDict):
    """Details on the answer's tokens."""

    reasoning_tokens: int


class CompletionUsage(TypedDict):
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenDetails
    completion_tokens_details: CompletionTokenDetails


class CalledFunction(TypedDict):
    """The function that is called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class MessageToolCall(TypedDict):
    """A call of one of the request's tools."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatAnswerMessage(TypedDict):
    """The message that answers a conversation."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[MessageToolCall]]
    function_call: NotRequired[CalledFunction]
    """The call, where the request has `functions` and not `tools`."""


class ChatChoice(TypedDict):
    """One of `n` answers to a conversation."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName


class ChatCompletion(TypedDict):
    """The answer to `POST /v1/chat/completions` without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_logprobs: NotRequired[PromptLogprobList]
    metadata: NotRequired[dict[str, Any]]
    """Of a stored one: what its request, or a later one, has put there."""


class TextChoice(TypedDict):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishName
    prompt_logprobs: NotRequired[PromptLogprobList]


class Completion(TypedDict):
    """The answer to `POST /v1/completions` without `stream`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: CompletionUsage


class OpenAIModel(TypedDict):
    """A model; `created` is in seconds since 1970, `kind` what it does; `images` is there where it may be shown some.

    `context_length` is the number of tokens that its configuration gives prompt and answer together, `max_model_len`
    the number that this server takes: not more than fit in memory. Both are left out where they are not known.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Task
    images: NotRequired[Literal[True]]
    context_length: NotRequired[int]
    max_model_len: NotRequired[int]


class OpenAIModelList(TypedDict):
    """Every model."""

    object: Literal["list"]
    data: list[OpenAIModel]


def chat_completion(
    request: ChatRequest, answers: Sequence[Sequence[Event]], *, id_: str, has_functions: bool = False
) -> ChatCompletion:
    """Return the answers to a conversation; each is all of its events, in their order.

    `has_functions`: calls have the older form, which `tools` replaced.
    """
    has_logprobs = request.params.logprobs is not None
    made: ChatCompletion = {
        "id": id_,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [
            _chat_choice(index, events, has_logprobs=has_logprobs, has_functions=has_functions)
            for index, events in enumerate(answers)
        ],
        "usage": usage_of([done_of(events).usage for events in answers]),
    }
    if (scored := prompt_tokens_of(answers[0])) and request.params.prompt_logprobs is not None:
        made["prompt_logprobs"] = prompt_logprobs(scored, request.params.prompt_logprobs)
    return made


def completion(request: TextRequest, answers: Sequence[Sequence[Event]], *, scores: int | None = None) -> Completion:
    """Return the continuations of plain prompts; each is all of its events, in their order.

    `scores`: alternatives to each token of the prompt, where `prompt_logprobs` asks for them.
    """
    return {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [
            _text_choice(index, events, logprob_encoder(request), scores=scores) for index, events in enumerate(answers)
        ],
        "usage": usage_of([done_of(events).usage for events in answers], len(request.prompts)),
    }


def model_info(listed: Listed) -> OpenAIModel:
    """Return one model; its owner is the organisation in its id."""
    owner, slash, _ = listed.id.partition("/")
    info: OpenAIModel = {
        "id": listed.id,
        "object": "model",
        "created": listed.created,
        "owned_by": owner if slash else "local",
        "kind": listed.kind,
    }
    if listed.sees:
        info["images"] = True
    if listed.context is not None:
        info["context_length"] = listed.context
    if listed.usable is not None:
        info["max_model_len"] = listed.usable
    return info


def model_list(models: Iterable[Listed]) -> OpenAIModelList:
    """Return models as a list."""
    return {"object": "list", "data": [model_info(each) for each in models]}


# Parts that streams share --------------------------------------------------------------------------------------


def new_id(kind: str) -> str:
    """Return a new id that begins with its kind, such as `chatcmpl`."""
    return f"{kind}-{uuid.uuid4().hex}"


def done_of(events: Sequence[Event]) -> Done:
    """Return the last of an answer's events, which says how it ended."""
    done = events[-1]
    assert isinstance(done, Done)  # noqa: S101 - for the type checker
    return done


def usage_of(usages: Sequence[Usage], prompts: int = 1) -> CompletionUsage:
    """Add up the tokens of a request: a prompt counts once, however many answers it has."""
    once = usages[:: max(1, len(usages) // prompts)]
    prompt, completion = sum(each.prompt for each in once), sum(each.completion for each in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached for each in once)},
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning for each in usages)},
    }


def finish_name(done: Done, *, has_functions: bool = False) -> FinishName:
    """Return OpenAI's name for why an answer ended."""
    if done.reason == "tool_calls" and has_functions:
        return "function_call"
    return "stop" if done.reason == "stop_sequence" else done.reason


def tool_call(call: ToolCall) -> MessageToolCall:
    """Return a tool call as a message has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def joined(events: Iterable[Event], kind: type[Text | Reasoning]) -> str:
    """Return all text of one kind."""
    return "".join(event.text for event in events if isinstance(event, kind))


def _chat_choice(index: int, events: Sequence[Event], *, has_logprobs: bool, has_functions: bool) -> ChatChoice:
    calls = [tool_call(event) for event in events if isinstance(event, ToolCall)]
    text, reasoning = joined(events, Text), joined(events, Reasoning)
    message: ChatAnswerMessage = {
        "role": "assistant",
        "content": text if text or not calls else None,
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls and has_functions:
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(tokens_of(events)) if has_logprobs else None,
        "finish_reason": finish_name(done_of(events), has_functions=has_functions),
    }


def logprob_encoder(request: TextRequest) -> TextLogprobEncoder | None:
    """Return what encodes the log probabilities of one continuation; None where they were not asked for."""
    count = request.params.logprobs
    return None if count is None else TextLogprobEncoder(count, has_echo=request.echo)


def _text_choice(
    index: int, events: Sequence[Event], encoder: TextLogprobEncoder | None, *, scores: int | None
) -> TextChoice:
    made: TextChoice = {
        "index": index,
        "text": joined(events, Text),
        "logprobs": None if encoder is None else encoder.encode(events) or no_logprobs(),
        "finish_reason": finish_name(done_of(events)),
    }
    if scores is not None:
        made["prompt_logprobs"] = prompt_logprobs(prompt_tokens_of(events), scores)
    return made
